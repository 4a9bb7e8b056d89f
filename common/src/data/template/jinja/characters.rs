//! Characters as Python's `str` methods class them.

mod printable;

use printable::NOT_PRINTABLE;

/// `str.isspace` of one character. Python counts four separators that Unicode's property leaves out.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

pub fn trim_end(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

pub fn trim(text: &str) -> &str {
    text.trim_matches(is_space)
}

pub fn is_name_start(c: char) -> bool {
    c.is_alphabetic() || c == '_'
}

pub fn is_name_part(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// `str.isprintable` of one character.
pub fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return !c.is_ascii_control();
    }
    let code = u32::from(c);
    let after = NOT_PRINTABLE.partition_point(|(first, _)| *first <= code);
    after == 0 || NOT_PRINTABLE[after - 1].1 < code
}

/// Has a case, as `isupper`, `islower` and `title` ask.
pub fn is_cased(c: char) -> bool {
    c.is_uppercase() || c.is_lowercase() || is_title(c)
}

/// Letters such as ǅ that are upper and lower at once.
pub fn is_title(c: char) -> bool {
    let code = u32::from(c);
    matches!(
        code,
        0x1c5 | 0x1c8 | 0x1cb | 0x1f2 | 0x1fbc | 0x1fcc | 0x1ffc
    ) || matches!(code, 0x1f88..=0x1f8f | 0x1f98..=0x1f9f | 0x1fa8..=0x1faf)
}

/// The first character in title case, the rest in lower case.
pub fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => titlecase(first) + &lower(chars.as_str(), Some(first)),
        None => String::new(),
    }
}

/// `str.title`: every cased character after one that is not is in title case.
pub fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.push_str(&titlecase(c));
        }
        inside = is_cased(c);
    }
    out
}

/// Lower case, where a final sigma knows that a letter may come before.
fn lower(text: &str, before: Option<char>) -> String {
    match before {
        Some(before) if text.contains('Σ') => {
            let whole = format!("{before}{text}").to_lowercase();
            let skipped: usize = before.to_lowercase().map(char::len_utf8).sum();
            whole[skipped..].to_owned()
        }
        _ => text.to_lowercase(),
    }
}

/// Title case, which differs from upper case for a few letters (Unicode, SpecialCasing.txt and UnicodeData.txt).
fn titlecase(c: char) -> String {
    match c {
        'ß' => "Ss".to_owned(),
        'ŉ' => "ʼN".to_owned(),
        'ﬀ' => "Ff".to_owned(),
        'ﬁ' => "Fi".to_owned(),
        'ﬂ' => "Fl".to_owned(),
        'ﬃ' => "Ffi".to_owned(),
        'ﬄ' => "Ffl".to_owned(),
        'ﬅ' | 'ﬆ' => "St".to_owned(),
        'Ǆ' | 'ǅ' | 'ǆ' => "ǅ".to_owned(),
        'Ǉ' | 'ǈ' | 'ǉ' => "ǈ".to_owned(),
        'Ǌ' | 'ǋ' | 'ǌ' => "ǋ".to_owned(),
        'Ǳ' | 'ǲ' | 'ǳ' => "ǲ".to_owned(),
        'ა'..='ჿ' => c.to_string(),
        other => other.to_uppercase().collect(),
    }
}

/// The value of a decimal digit of any script (`str.isdecimal`).
pub fn decimal_digit(c: char) -> Option<u32> {
    if c.is_ascii() {
        return c.to_digit(10);
    }
    let code = u32::from(c);
    let after = DECIMAL_ZEROS.partition_point(|zero| *zero <= code);
    let zero = *DECIMAL_ZEROS.get(after.checked_sub(1)?)?;
    (code - zero < 10).then_some(code - zero)
}

/// Digits that are no decimal digits, such as ² (`str.isdigit`, Unicode 14.0).
pub fn is_other_digit(c: char) -> bool {
    matches!(
        u32::from(c),
        0xb2 | 0xb3 | 0xb9 | 0x1369..=0x1371 | 0x19da | 0x2070 | 0x2074..=0x2079 | 0x2080..=0x2089
            | 0x2460..=0x2468 | 0x2474..=0x247c | 0x2488..=0x2490 | 0x24ea | 0x24f5..=0x24fd | 0x24ff
            | 0x2776..=0x277e | 0x2780..=0x2788 | 0x278a..=0x2792 | 0x10a40..=0x10a43 | 0x10e60..=0x10e68
            | 0x11052..=0x1105a | 0x1f100..=0x1f10a
    )
}

/// Zeros of the scripts that have decimal digits (Unicode 14.0).
#[rustfmt::skip]
const DECIMAL_ZEROS: [u32; 65] = [
    0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66, 0xde6, 0xe50, 0xed0, 0xf20,
    0x1040, 0x1090, 0x17e0, 0x1810, 0x1946, 0x19d0, 0x1a80, 0x1a90, 0x1b50, 0x1bb0, 0x1c40, 0x1c50, 0xa620, 0xa8d0,
    0xa900, 0xa9d0, 0xa9f0, 0xaa50, 0xabf0, 0xff10, 0x104a0, 0x10d30, 0x11066, 0x110f0, 0x11136, 0x111d0, 0x112f0,
    0x11450, 0x114d0, 0x11650, 0x116c0, 0x11730, 0x118e0, 0x11950, 0x11c50, 0x11d50, 0x11da0, 0x16a60, 0x16ac0,
    0x16b50, 0x1d7ce, 0x1d7d8, 0x1d7e2, 0x1d7ec, 0x1d7f6, 0x1e140, 0x1e2f0, 0x1e950, 0x1fbf0,
];
