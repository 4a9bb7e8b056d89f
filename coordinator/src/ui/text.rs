//! Small pieces of text: colours, numbers, and user data made safe to print.

pub use common::memory::bytes;
pub use common::text::{count, grouped, rate, visible};

/// What the terminal can show beside plain text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    pub colour: bool,
    /// Bars and curves may be drawn with more than ASCII.
    pub unicode: bool,
}

impl Style {
    pub fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    pub fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    /// What is learned.
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

/// At most `limit` characters, and how many were left out.
pub fn cut(text: &str, limit: usize) -> (String, usize) {
    let length = text.chars().count();
    (
        text.chars().take(limit).collect(),
        length.saturating_sub(limit),
    )
}

/// Every line behind `margin`.
pub fn indent(text: &str, margin: &str) -> String {
    text.lines()
        .map(|line| format!("{margin}{line}\n"))
        .collect()
}

/// `0:07`, `12:34`, `3:25:45`, `2 d 3:25:45`; `?` where nobody knows.
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
