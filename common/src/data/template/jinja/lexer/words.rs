//! The words inside of tags: names, numbers, strings and operators.

use super::super::characters::{is_name_part, is_name_start};
use super::super::failure::Result;
use super::super::integer::Integer;
use super::{Token, syntax};

/// Longer operators first.
const OPERATORS: [&str; 27] = [
    "**", "//", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";", "!",
];

/// The first word of the text, and its length in bytes.
pub(super) fn word(text: &str, line: usize) -> Result<(Token, usize)> {
    let first = text.chars().next().unwrap_or_default();
    if first.is_ascii_digit() {
        return number(text, line);
    }
    if is_name_start(first) {
        let length = text.find(|c| !is_name_part(c)).unwrap_or(text.len());
        return Ok((Token::Name(text[..length].to_owned()), length));
    }
    if matches!(first, '\'' | '"') {
        return string(text, first, line);
    }
    let operator = OPERATORS
        .iter()
        .find(|operator| text.starts_with(**operator));
    match operator {
        Some(operator) if *operator != "!" => Ok((Token::Operator(operator), operator.len())),
        _ => Err(syntax(format!("unexpected character {first:?}"), line)),
    }
}

fn number(text: &str, line: usize) -> Result<(Token, usize)> {
    for (prefix, base) in [
        ("0x", 16),
        ("0o", 8),
        ("0b", 2),
        ("0X", 16),
        ("0O", 8),
        ("0B", 2),
    ] {
        let Some(digits) = text.strip_prefix(prefix) else {
            continue;
        };
        let length = run(digits, |c| c.is_digit(base));
        if length > 0 {
            let digits = digits[..length].replace('_', "");
            let value = i128::from_str_radix(&digits, base);
            let value = value.map_err(|_| syntax("an integer is too long", line))?;
            return Ok((
                Token::Integer(Integer::from_i128(value)),
                prefix.len() + length,
            ));
        }
    }
    let is_digit = |c: char| c.is_ascii_digit();
    let whole = run(text, is_digit);
    let mut length = whole;
    let fraction = text[length..]
        .strip_prefix('.')
        .map_or(0, |rest| run(rest, is_digit));
    if fraction > 0 {
        length += 1 + fraction;
    }
    let exponent = text[length..].strip_prefix(['e', 'E']).map_or(0, |rest| {
        let signs = usize::from(rest.starts_with(['+', '-']));
        match run(&rest[signs..], is_digit) {
            0 => 0,
            digits => 1 + signs + digits,
        }
    });
    length += exponent;
    let digits = text[..length].replace('_', "");
    if length > whole {
        let value = digits
            .parse()
            .map_err(|_| syntax("a number is not understood", line))?;
        return Ok((Token::Float(value), length));
    }
    if digits.starts_with('0') && digits.bytes().any(|digit| digit != b'0') {
        return Err(syntax(
            format!("`{digits}` is no number: it begins with 0"),
            line,
        ));
    }
    let value = Integer::parse(&digits).ok_or_else(|| syntax("an integer is too long", line))?;
    Ok((Token::Integer(value), length))
}

/// The length of digits with single underscores between them.
fn run(text: &str, is_digit: impl Fn(char) -> bool) -> usize {
    let mut length = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if is_digit(c) {
            length = at + 1;
        } else if c != '_' || at == 0 || !chars.peek().is_some_and(|(_, next)| is_digit(*next)) {
            break;
        }
    }
    length
}

fn string(text: &str, quote: char, line: usize) -> Result<(Token, usize)> {
    let mut escaped = false;
    let end = text[1..].find(|c| {
        let ends = c == quote && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    });
    let Some(length) = end else {
        return Err(syntax(format!("a string has no end ({quote})"), line));
    };
    let value = unescape(&text[1..=length], line)?;
    Ok((Token::Text(value), length + 2))
}

/// Python's escapes.
fn unescape(text: &str, line: usize) -> Result<String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let Some(c) = rest.chars().next() else {
            out.push('\\');
            break;
        };
        rest = &rest[c.len_utf8()..];
        match c {
            '\n' => {}
            '\\' | '\'' | '"' => out.push(c),
            'a' => out.push('\u{7}'),
            'b' => out.push('\u{8}'),
            'f' => out.push('\u{c}'),
            'n' => out.push('\n'),
            'r' => out.push('\r'),
            't' => out.push('\t'),
            'v' => out.push('\u{b}'),
            '0'..='7' => {
                let more = rest
                    .bytes()
                    .take(2)
                    .take_while(|b| matches!(b, b'0'..=b'7'))
                    .count();
                let digits = format!("{c}{}", &rest[..more]);
                rest = &rest[more..];
                out.extend(
                    u32::from_str_radix(&digits, 8)
                        .ok()
                        .and_then(char::from_u32),
                );
            }
            'x' | 'u' | 'U' => {
                let length = match c {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                };
                let (code, after) = hex(rest, length, line)?;
                rest = after;
                out.push(code_point(code, &mut rest, line)?);
            }
            'N' => {
                return Err(syntax(
                    "characters by name (`\\N{...}`) are not known here",
                    line,
                ));
            }
            other => out.extend(['\\', other]),
        }
    }
    out.push_str(rest);
    Ok(out)
}

fn hex(text: &str, length: usize, line: usize) -> Result<(u32, &str)> {
    let digits = text.get(..length);
    let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
    match code {
        Some(code) => Ok((code, &text[length..])),
        None => Err(syntax(
            "an escape (`\\x`, `\\u`) in a string has too few digits",
            line,
        )),
    }
}

/// The character; two halves of one (surrogates) are put together.
fn code_point(code: u32, rest: &mut &str, line: usize) -> Result<char> {
    if let Some(c) = char::from_u32(code) {
        return Ok(c);
    }
    let low = rest
        .strip_prefix("\\u")
        .map(|rest| hex(rest, 4, line))
        .transpose()?;
    if let Some((low, after)) = low
        && (0xd800..0xdc00).contains(&code)
        && (0xdc00..0xe000).contains(&low)
    {
        *rest = after;
        let joined = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        return char::from_u32(joined).ok_or_else(|| syntax("no such character", line));
    }
    Err(syntax(format!("`\\u{code:04x}` is no character"), line))
}
