//! Small pieces of text: colours, numbers, and user data made safe to print.

pub use common::memory::bytes;
pub use common::text::{count, grouped, rate, visible};

/// What the terminal can show beside plain text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    pub colour: bool,
    /// Whether bars and curves may be drawn with more than ASCII.
    pub unicode: bool,
}

impl Style {
    pub fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    pub fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    /// Marks text that is learned.
    pub fn trained(self, text: &str) -> String {
        self.wrap("1;32", text)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        match self.colour && !text.is_empty() {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }
}

/// The first `limit` characters of a text, and how many were left out.
pub fn cut(text: &str, limit: usize) -> (String, usize) {
    let length = text.chars().count();
    (
        text.chars().take(limit).collect(),
        length.saturating_sub(limit),
    )
}

/// The text in lines of at most so many characters, broken between words only.
pub fn wrapped(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split_inclusive(' ') {
        let length = word.trim_end().chars().count();
        if used > 0 && length > 0 && used + length > columns {
            lines.push(String::new());
            used = 0;
        }
        if let Some(line) = lines.last_mut() {
            line.push_str(word);
        }
        used += word.chars().count();
    }
    lines
        .iter()
        .map(|line| line.trim_end().to_owned())
        .collect()
}

/// The text with `margin` before every line.
pub fn indent(text: &str, margin: &str) -> String {
    text.lines()
        .map(|line| format!("{margin}{line}\n"))
        .collect()
}

/// A duration for people: `0:07`, `12:34`, `3:25:45`, `2 d 3:25:45`; `?` where nobody knows.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || !(0.0..=3e9).contains(&seconds) {
        return "?".to_owned();
    }
    let whole = seconds.round() as u64;
    let (days, hours) = (whole / 86_400, whole / 3600 % 24);
    let (minutes, seconds) = (whole / 60 % 60, whole % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes}:{seconds:02}"),
        (0, _) => format!("{hours}:{minutes:02}:{seconds:02}"),
        _ => format!("{days} d {hours}:{minutes:02}:{seconds:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_between_words() {
        assert_eq!(wrapped("one two  three", 7), ["one two", "three"]);
        assert_eq!(wrapped("models/tiny/of/many", 7), ["models/tiny/of/many"]);
        assert_eq!(wrapped("a models/tiny b", 7), ["a", "models/tiny", "b"]);
        assert_eq!(wrapped("", 7), [""]);
    }
}
