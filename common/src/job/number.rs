//! Numbers as job files write them.

/// A number without the underscores that Python allows, as in `1_000`.
pub(super) fn without_separators(text: &str) -> String {
    text.replace('_', "")
}

pub(super) fn parse_number(text: &str) -> Option<f64> {
    let starts_well = text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c));
    without_separators(text)
        .parse::<f64>()
        .ok()
        .filter(|number| starts_well && number.is_finite())
}
