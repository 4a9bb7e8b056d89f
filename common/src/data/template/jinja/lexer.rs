//! Template source becomes tokens, with Jinja's white space control.
//!
//! Enters: source with Transformers' settings (`trim_blocks`, `lstrip_blocks`). Leaves: text to print, and the words of
//! tags with their lines. Follows `jinja2/lexer.py`.

mod words;

use super::characters::{is_space, trim_end};
use super::failure::{Failure, Reason, Result};
use super::integer::Integer;

/// Longest template, in bytes.
const MAX_SOURCE_BYTES: usize = 4 << 20;

#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    /// Text outside of tags.
    Data(String),
    BlockBegin,
    BlockEnd,
    VariableBegin,
    VariableEnd,
    Name(String),
    Text(String),
    Integer(Integer),
    Float(f64),
    Operator(&'static str),
    End,
}

#[derive(Clone, Debug)]
pub struct Located {
    pub token: Token,
    pub line: usize,
}

pub fn syntax(text: impl Into<String>, line: usize) -> Box<Failure> {
    Failure::new(Reason::Syntax(text.into())).at(line)
}

pub fn tokenize(source: &str) -> Result<Vec<Located>> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(syntax(
            format!("it is longer than {MAX_SOURCE_BYTES} bytes"),
            0,
        ));
    }
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut lexer = Lexer {
        rest: source.strip_suffix('\n').unwrap_or(&source),
        line: 1,
        line_starts: true,
        tokens: Vec::new(),
    };
    while !lexer.rest.is_empty() {
        lexer.data()?;
    }
    lexer.add(Token::End);
    Ok(lexer.tokens)
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
    /// Nothing but what was taken away is before `rest` in its line.
    line_starts: bool,
    tokens: Vec<Located>,
}

impl<'a> Lexer<'a> {
    /// Text up to the next tag, and that tag.
    fn data(&mut self) -> Result<()> {
        let openings = self.rest.match_indices('{');
        let tag = openings
            .map(|(at, _)| at)
            .find(|at| matches!(self.rest.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')));
        let Some(at) = tag else {
            let text = self.take(self.rest.len());
            self.add_data(text);
            return Ok(());
        };
        let kind = self.rest.as_bytes()[at + 1];
        let sign = self.rest.as_bytes().get(at + 2).copied();
        let text = &self.rest[..at];
        let kept = match sign {
            Some(b'-') => trim_end(text),
            Some(b'+') => text,
            _ if kind == b'{' => text,
            _ => self.without_indent(text),
        };
        self.add_data(kept);
        let signed = matches!(sign, Some(b'-' | b'+'));
        self.take(at + 2 + usize::from(signed));
        match kind {
            b'#' => self.comment(),
            b'%' => match self.raw_begin() {
                Some(length) => {
                    self.take(length);
                    self.raw()
                }
                None => self.tag(Token::BlockBegin, Token::BlockEnd),
            },
            _ => self.tag(Token::VariableBegin, Token::VariableEnd),
        }
    }

    /// A block that stands first in its line takes the white space before it away.
    fn without_indent<'t>(&self, text: &'t str) -> &'t str {
        let line = text.rfind('\n').map_or(0, |at| at + 1);
        let starts = line > 0 || self.line_starts;
        if starts && text[line..].chars().all(is_space) {
            &text[..line]
        } else {
            text
        }
    }

    fn comment(&mut self) -> Result<()> {
        let line = self.line;
        let Some(end) = self.rest.find("#}") else {
            return Err(syntax("a comment has no end (`#}`)", line));
        };
        let sign = self.rest[..end].chars().next_back();
        self.take(end + 2);
        self.after_block(sign);
        Ok(())
    }

    /// What the end of a block takes with it: a line end, or all white space, by the sign before it.
    fn after_block(&mut self, sign: Option<char>) {
        match sign {
            Some('-') => self.skip_space(),
            Some('+') => {}
            _ if self.rest.starts_with('\n') => drop(self.take(1)),
            _ => {}
        }
    }

    fn skip_space(&mut self) {
        let length = self.rest.len() - self.rest.trim_start_matches(is_space).len();
        self.take(length);
    }

    /// The length of ` raw %}`, if that is what comes.
    fn raw_begin(&self) -> Option<usize> {
        let after = self.rest.trim_start_matches(is_space).strip_prefix("raw")?;
        let after = after.trim_start_matches(is_space);
        let after = match after.strip_prefix("-%}") {
            Some(after) => after.trim_start_matches(is_space),
            None => after.strip_prefix("%}")?,
        };
        Some(self.rest.len() - after.len())
    }

    fn raw(&mut self) -> Result<()> {
        let line = self.line;
        for (at, _) in self.rest.match_indices("{%") {
            let inside = &self.rest[at + 2..];
            let sign = inside.chars().next().filter(|c| matches!(c, '-' | '+'));
            let inside = &inside[sign.map_or(0, char::len_utf8)..];
            let Some(inside) = inside.trim_start_matches(is_space).strip_prefix("endraw") else {
                continue;
            };
            let inside = inside.trim_start_matches(is_space);
            let end_sign = inside.chars().next().filter(|c| matches!(c, '-' | '+'));
            let Some(after) = inside[end_sign.map_or(0, char::len_utf8)..].strip_prefix("%}")
            else {
                continue;
            };
            let length = self.rest.len() - after.len();
            let text = &self.rest[..at];
            let kept = match sign {
                Some('-') => trim_end(text),
                Some(_) => text,
                None => self.without_indent(text),
            };
            self.add_data(kept);
            self.take(length);
            self.after_block(end_sign);
            return Ok(());
        }
        Err(syntax("a raw block has no end (`{% endraw %}`)", line))
    }

    /// The words of a tag, up to its end.
    fn tag(&mut self, begin: Token, end: Token) -> Result<()> {
        let line = self.line;
        self.add(begin);
        let closing = if end == Token::BlockEnd { "%}" } else { "}}" };
        let mut open: Vec<char> = Vec::new();
        loop {
            self.skip_space();
            let Some(first) = self.rest.chars().next() else {
                return Err(syntax(format!("a tag has no end (`{closing}`)"), line));
            };
            if open.is_empty()
                && let Some(sign) = self.closing(closing)
            {
                self.add(end);
                self.take(closing.len() + usize::from(sign.is_some()));
                match end_of(closing, sign) {
                    Space::All => self.skip_space(),
                    Space::Line => self.after_block(None),
                    Space::None => {}
                }
                return Ok(());
            }
            let (token, length) = words::word(self.rest, self.line)?;
            match (&token, first) {
                (Token::Operator(_), '(' | '[' | '{') => open.push(first),
                (Token::Operator(_), ')' | ']' | '}') => {
                    let opening = open.pop();
                    let fits = matches!(
                        (opening, first),
                        (Some('('), ')') | (Some('['), ']') | (Some('{'), '}')
                    );
                    if !fits {
                        return Err(syntax(format!("unexpected `{first}`"), self.line));
                    }
                }
                _ => {}
            }
            self.add(token);
            self.take(length);
        }
    }

    /// The sign before the end of a tag, if the end comes.
    fn closing(&self, closing: &str) -> Option<Option<char>> {
        if self.rest.starts_with(closing) {
            return Some(None);
        }
        let sign = self.rest.chars().next()?;
        let may_sign = sign == '-' || (sign == '+' && closing == "%}");
        (may_sign && self.rest[1..].starts_with(closing)).then_some(Some(sign))
    }

    fn take(&mut self, length: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(length);
        self.line += taken.matches('\n').count();
        if let Some(last) = taken.chars().next_back() {
            self.line_starts = last == '\n';
        }
        self.rest = rest;
        taken
    }

    fn add(&mut self, token: Token) {
        let line = self.line;
        self.tokens.push(Located { token, line });
    }

    fn add_data(&mut self, text: &str) {
        if !text.is_empty() {
            self.add(Token::Data(text.to_owned()));
        }
    }
}

enum Space {
    None,
    Line,
    All,
}

fn end_of(closing: &str, sign: Option<char>) -> Space {
    match (closing, sign) {
        (_, Some('-')) => Space::All,
        ("%}", None) => Space::Line,
        _ => Space::None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn data(source: &str) -> Vec<String> {
        let tokens = tokenize(source).unwrap();
        let data = tokens
            .into_iter()
            .filter_map(|located| match located.token {
                Token::Data(text) => Some(text),
                _ => None,
            });
        data.collect()
    }

    #[test]
    fn blocks_take_white_space_as_in_jinja() {
        assert_eq!(data("a\n  {% if x %}\nb\n{% endif %}\n"), ["a\n", "b\n"]);
        assert_eq!(data("a  {% if x %} b"), ["a  ", " b"]);
        assert_eq!(data("  {{ x }}\n"), ["  "]);
        assert_eq!(data("a \n {%- if x -%} \n b"), ["a", "b"]);
        assert_eq!(data("  {%+ if x +%}\nb"), ["  ", "\nb"]);
        assert_eq!(data("  {# c #}\n  b\r\n\r\n"), ["  b\n"]);
        assert_eq!(
            data("{% raw %}{{ x }}\n {% endraw %}\nb"),
            ["{{ x }}\n", "b"]
        );
    }

    #[test]
    fn lines_are_counted() {
        let error = tokenize("a\n{{ x\n $ }}").unwrap_err();
        assert_eq!(error.line, 3);
        assert_eq!(tokenize("a\n\n{{ x").unwrap_err().line, 3);
    }
}
