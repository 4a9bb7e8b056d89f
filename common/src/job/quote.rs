//! Text that a user wrote, cut for messages.

/// At most 60 characters of user text, on one line, for messages.
pub(super) fn shorten(text: &str) -> String {
    let one_line = |c: char| if c.is_control() { ' ' } else { c };
    let mut short: String = text.chars().take(60).map(one_line).collect();
    if text.chars().nth(60).is_some() {
        short.push('…');
    }
    short
}
