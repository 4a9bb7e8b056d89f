//! Text from rows, models and peers, made safe to print: whatever it holds, it neither repaints a terminal nor fills a log;
//! and numbers as people write them.

/// Of a reason that a peer gives: what follows is counted and left out.
pub const MAX_REASON_CHARACTERS: usize = 500;
/// Of an error that this program tells: several lines, such as those of a job file.
const MAX_ERROR_CHARACTERS: usize = 16_000;

/// Control characters become visible signs; line breaks and tabs stay.
pub fn visible(text: &str) -> String {
    text.chars().map(visible_character).collect()
}

fn visible_character(c: char) -> char {
    match c {
        '\n' | '\t' => c,
        '\u{0}'..='\u{1f}' => char::from_u32(0x2400 + c as u32).unwrap_or('\u{fffd}'),
        // Delete, C1 controls and the marks that change the direction of writing.
        '\u{7f}'..='\u{9f}'
        | '\u{200e}'
        | '\u{200f}'
        | '\u{202a}'..='\u{202e}'
        | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        _ => c,
    }
}

/// What a peer says of itself or of its end: one line of at most [`MAX_REASON_CHARACTERS`].
pub fn reason(text: &str) -> String {
    one_line(text, MAX_REASON_CHARACTERS)
}

/// One line of at most `limit` characters and a word on how many bytes follow, however long the text is.
pub fn one_line(text: &str, limit: usize) -> String {
    let (kept, left_out) = split(text.trim_end_matches(['\n', '\r']), limit);
    let line: String = kept
        .chars()
        .map(|c| match c {
            '\n' | '\t' => ' ',
            c => visible_character(c),
        })
        .collect();
    line + &rest(left_out)
}

/// What a program says before it ends: as it is, but visible, and cut where nobody would read on.
pub fn error(text: &str) -> String {
    let (kept, left_out) = split(text, MAX_ERROR_CHARACTERS);
    visible(kept) + &rest(left_out)
}

/// Errors of a line each, all of them called so. Lines that are set in belong to the one before.
pub fn error_lines(text: &str) -> String {
    let lines = text
        .lines()
        .map(|line| match line.starts_with([' ', '\t']) {
            true => line.to_owned(),
            false => format!("error: {line}"),
        });
    lines.collect::<Vec<_>>().join("\n")
}

/// `1 worker`, `2 workers`.
pub fn count(number: u64, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", grouped(number))
}

/// 1234567 as 1,234,567.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A learning rate as people write it: `2e-4`, `1.93e-4`.
pub fn rate(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let text = format!("{value:.2e}");
    match text.split_once('e') {
        Some((digits, exponent)) if digits.contains('.') => {
            let digits = digits.trim_end_matches('0').trim_end_matches('.');
            format!("{digits}e{exponent}")
        }
        _ => text,
    }
}

/// The first 12 characters of a digest: enough for people to tell two apart.
pub fn short_digest(digest: &str) -> String {
    digest.chars().take(12).collect()
}

/// The first `limit` characters, and how many bytes follow.
fn split(text: &str, limit: usize) -> (&str, usize) {
    match text.char_indices().nth(limit) {
        Some((at, _)) => (&text[..at], text.len() - at),
        None => (text, 0),
    }
}

fn rest(bytes: usize) -> String {
    match bytes {
        0 => String::new(),
        bytes => format!("… and {bytes} more bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_peer_says_moves_the_cursor_or_fills_the_log() {
        assert_eq!(reason("gone\x1b[2J\nfor good\r\n"), "gone␛[2J for good");
        assert_eq!(reason("\u{9b}31m\u{202e}"), "\u{fffd}31m\u{fffd}");
        let long = reason(&"x".repeat(15_000_000));
        assert!(
            long.ends_with("x… and 14999500 more bytes"),
            "{}",
            long.len()
        );
        assert_eq!(long.chars().filter(|c| *c == 'x').count(), 500);
    }

    #[test]
    fn an_error_keeps_its_lines() {
        assert_eq!(error("a\n\tb\x07"), "a\n\tb␇");
        assert!(error(&"é".repeat(20_000)).ends_with("é… and 8000 more bytes"));
        assert_eq!(error_lines("a\n  more\nb"), "error: a\n  more\nerror: b");
    }
}
