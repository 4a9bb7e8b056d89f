//! One line or item of JSON, as Python's `json.dumps` writes it too: NaN and Infinity are no JSON, but common.
//!
//! Enters: bytes. Leaves: a value in which each NaN or Infinity is a mark, or why the bytes are no JSON.

use std::borrow::Cow;

use serde_json::Value as Json;

/// Stands for a number that JSON does not have, until it is known whether anything reads it. No text begins like this.
const NOT_A_NUMBER: &str = "\u{10fffe}\u{10ffff}";

/// The value on a line. The error is one line for people.
pub fn parse(bytes: &[u8]) -> Result<Json, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let byte = error.valid_up_to() + 1;
        format!("not UTF-8 (byte {byte} of the line): save the file as UTF-8")
    })?;
    let text = text.trim_ascii();
    serde_json::from_str(text).or_else(|error| {
        let marked = mark_numbers(text);
        let marked = match marked {
            Cow::Owned(marked) => serde_json::from_str(&marked).ok(),
            Cow::Borrowed(_) => None,
        };
        marked.ok_or_else(|| broken(&error, text))
    })
}

/// serde_json's reason with the column; its line number is always 1 here.
pub fn broken(error: &serde_json::Error, text: &str) -> String {
    let reason = error.to_string();
    let reason = reason.split(" at line ").next().unwrap_or(&reason);
    let hint = match text.trim_ascii_start().as_bytes() {
        [b'{', b'\'', ..] => {
            "; it looks like a Python dict: write rows with `json.dumps`, not `str`"
        }
        _ => "",
    };
    format!("broken JSON: {reason} (column {}){hint}", error.column())
}

/// The first NaN or Infinity in the value, as it was written.
pub fn number_that_json_has_not(value: &Json) -> Option<&str> {
    match value {
        Json::String(text) => text.strip_prefix(NOT_A_NUMBER),
        Json::Array(items) => items.iter().find_map(number_that_json_has_not),
        Json::Object(fields) => fields.values().find_map(number_that_json_has_not),
        _ => None,
    }
}

/// The text with a string in place of each NaN, Infinity and -Infinity outside of strings.
fn mark_numbers(text: &str) -> Cow<'_, str> {
    let bytes = text.as_bytes();
    let mut out = String::new();
    let (mut copied, mut at) = (0, 0);
    let mut in_string = false;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if in_string => at += 1,
            b'"' => in_string = !in_string,
            b'N' | b'I' | b'-' if !in_string => {
                let words = ["NaN", "Infinity", "-Infinity"];
                let word = words.iter().find(|word| text[at..].starts_with(**word));
                if let Some(word) = word {
                    out += &text[copied..at];
                    out += &format!("\"{NOT_A_NUMBER}{word}\"");
                    copied = at + word.len();
                    at = copied - 1;
                }
            }
            _ => {}
        }
        at += 1;
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    out += &text[copied..];
    Cow::Owned(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_json_has_not_are_told_from_text() {
        let row = parse(br#"{"a": NaN, "b": [1, -Infinity], "c": "NaN \" Infinity", "d": -1}"#);
        let row = row.unwrap();
        assert_eq!(number_that_json_has_not(&row["a"]), Some("NaN"));
        assert_eq!(number_that_json_has_not(&row["b"]), Some("-Infinity"));
        assert_eq!(number_that_json_has_not(&row["c"]), None);
        assert_eq!(row["c"], "NaN \" Infinity");
        assert_eq!(row["d"], -1);
    }

    #[test]
    fn what_is_no_json_stays_none() {
        for text in [r#"{"a": NaNa}"#, r#"{"a": nan}"#, "{NaN: 1", "N"] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.starts_with("broken JSON: "), "{error}");
        }
        let error = parse(b"{'a': 1}").unwrap_err();
        assert!(error.contains("Python dict"), "{error}");
    }
}
