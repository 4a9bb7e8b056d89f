//! JSON of rows, as Python's `json.dumps` writes it too: NaN, Infinity and integers of any size are no JSON that is read
//! exactly, but common.
//!
//! Enters: bytes. Leaves: a value in which each such number is a mark, or why the bytes are no JSON. A key that stands twice
//! in an object is refused: which of its values is meant, nobody knows.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value as Json};

/// Prefix of the text that stands for a number which would not be read as it is, until it is known whether anything reads it. No
/// other text begins like this.
const MARK: &str = "\u{10fffe}\u{10ffff}";

/// Digits of the longest integers that fit into 64 bits; fewer always do.
const LONG_INTEGER: usize = 19;

/// Parses the JSON value of a row. The error is one line for people.
pub fn parse(bytes: &[u8]) -> Result<Json, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let byte = error.valid_up_to() + 1;
        format!("not UTF-8 (byte {byte} of the line): save the file as UTF-8")
    })?;
    parse_text(text.trim_ascii())
}

/// Parses JSON that is text already, as [`parse`] does.
pub fn parse_text(text: &str) -> Result<Json, String> {
    let read = |text: &str| serde_json::from_str(text).map(|Unique(json)| json);
    if has_long_integer(text)
        && let Cow::Owned(marked) = mark_numbers(text)
    {
        return read(&marked).map_err(|error| broken(&error, text));
    }
    read(text).or_else(|error| {
        let marked = match mark_numbers(text) {
            Cow::Owned(marked) => Some(read(&marked)),
            Cow::Borrowed(_) => None,
        };
        match marked {
            Some(Ok(json)) => Ok(json),
            // A key that stands twice is told rather than the NaN before it.
            Some(Err(other)) if other.is_data() => Err(broken(&other, text)),
            _ => Err(broken(&error, text)),
        }
    })
}

/// What kind of thing a value is, for messages.
pub fn kind_of(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(text) if text.starts_with(MARK) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

/// serde_json's reason with the column; its line number is always 1 here.
fn broken(error: &serde_json::Error, text: &str) -> String {
    let reason = error.to_string();
    let reason = reason
        .rsplit_once(" at line ")
        .map_or(&*reason, |(reason, _)| reason);
    // Of what was read, only a key that stands twice is at fault.
    if error.is_data() {
        return reason.to_owned();
    }
    let hint = match text.trim_ascii_start().as_bytes() {
        [b'{', b'\'', ..] => {
            "; it looks like a Python dict: write rows with `json.dumps`, not `str`"
        }
        _ => "",
    };
    format!("broken JSON: {reason} (column {}){hint}", error.column())
}

/// A value that stands for something no JSON can hold (`NaN`), until it is known whether anything reads it.
pub fn marked(what: &str) -> Json {
    Json::String(format!("{MARK}{what}"))
}

/// Why the value cannot be used, where it holds a number that is not read as it is written.
pub fn unreadable_number(value: &Json) -> Option<String> {
    let number = marked_number(value)?;
    Some(match number.ends_with(|c: char| c.is_ascii_digit()) {
        true => format!(
            "{number}, an integer beyond 64 bits, which would be rounded: write it as a string"
        ),
        false => format!("{number}, which is no value in JSON: write null or a number"),
    })
}

/// The first marked number, as it was written.
fn marked_number(value: &Json) -> Option<&str> {
    match value {
        Json::String(text) => text.strip_prefix(MARK),
        Json::Array(items) => items.iter().find_map(marked_number),
        Json::Object(fields) => fields.values().find_map(marked_number),
        _ => None,
    }
}

/// Whether some run of digits is so long that it may be an integer beyond 64 bits.
fn has_long_integer(text: &str) -> bool {
    let mut run = 0;
    text.bytes().any(|byte| {
        run = if byte.is_ascii_digit() { run + 1 } else { 0 };
        run >= LONG_INTEGER
    })
}

/// The text with a string in place of each NaN, Infinity, -Infinity and integer beyond 64 bits outside of strings.
fn mark_numbers(text: &str) -> Cow<'_, str> {
    let bytes = text.as_bytes();
    let mut out = String::new();
    let (mut copied, mut at) = (0, 0);
    let mut in_string = false;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if in_string => at += 1,
            b'"' => in_string = !in_string,
            b'N' | b'I' | b'-' | b'0'..=b'9' if !in_string => {
                let (length, is_marked) = number_at(&text[at..]);
                if is_marked {
                    out += &text[copied..at];
                    out += &format!("\"{MARK}{}\"", &text[at..at + length]);
                    copied = at + length;
                }
                at += length.max(1) - 1;
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

/// Bytes of the number with which the text begins, and whether it is one that is marked.
fn number_at(text: &str) -> (usize, bool) {
    let words = ["NaN", "Infinity", "-Infinity"];
    if let Some(word) = words.iter().find(|word| text.starts_with(**word)) {
        return (word.len(), true);
    }
    let digits = text.strip_prefix('-').unwrap_or(text);
    let digits = digits.bytes().take_while(u8::is_ascii_digit).count();
    let length = digits + usize::from(text.starts_with('-'));
    let (number, rest) = text.split_at(length);
    let is_integer = digits > 0 && !rest.starts_with(['.', 'e', 'E']);
    let fits = number.parse::<i64>().is_ok() || number.parse::<u64>().is_ok();
    match is_integer {
        true => (length, !fits),
        // The rest of a float is no number of its own.
        false => {
            let is_of_float = |byte: &u8| byte.is_ascii_digit() || b".eE+-".contains(byte);
            (text.bytes().take_while(is_of_float).count(), false)
        }
    }
}

/// A value without a key that stands twice in its object.
struct Unique(Json);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Self)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Json, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Json, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Json, E> {
        Ok(Number::from_f64(value).map_or(Json::Null, Json::Number))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Json, E> {
        Ok(Json::String(value.to_owned()))
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Json, E> {
        Ok(Json::String(value))
    }

    // As deep as serde_json reads, which has a bound.
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
        let mut list = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Json::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Json, A::Error> {
        let mut object = Map::new();
        while let Some(key) = pairs.next_key::<String>()? {
            if object.contains_key(&key) {
                let shown: String = key.chars().take(MAX_KEY_CHARACTERS).collect();
                return Err(Error::custom(format!(
                    "the key `{shown}` stands twice in one object: keep one of them"
                )));
            }
            let Unique(value) = pairs.next_value()?;
            object.insert(key, value);
        }
        Ok(Json::Object(object))
    }
}

/// Most characters of a key that are shown in a message.
const MAX_KEY_CHARACTERS: usize = 60;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_not_read_as_they_are_are_told_from_text() {
        let row = parse(br#"{"a": NaN, "b": [1, -Infinity], "c": "NaN \" Infinity", "d": -1}"#);
        let row = row.unwrap();
        assert_eq!(marked_number(&row["a"]), Some("NaN"));
        assert_eq!(marked_number(&row["b"]), Some("-Infinity"));
        assert_eq!(marked_number(&row["c"]), None);
        assert_eq!(row["c"], "NaN \" Infinity");
        assert_eq!(row["d"], -1);
        let text = r#"{"most": 18446744073709551615, "least": -9223372036854775808, "more": [18446744073709551616],
            "less": -9223372036854775809, "float": 123456789012345678901.5e-3, "text": "123456789012345678901"}"#;
        let row = parse_text(text).unwrap();
        assert_eq!(row["most"], u64::MAX);
        assert_eq!(row["least"], i64::MIN);
        assert_eq!(marked_number(&row["more"]), Some("18446744073709551616"));
        assert_eq!(marked_number(&row["less"]), Some("-9223372036854775809"));
        assert_eq!(
            row["float"],
            "123456789012345678901.5e-3".parse::<f64>().unwrap()
        );
        assert_eq!(row["text"], "123456789012345678901");
        assert_eq!(kind_of(&row["less"]), "a number");
        assert!(unreadable_number(&row["less"]).unwrap().contains("64 bits"));
    }

    #[test]
    fn a_key_that_stands_twice_is_named_wherever_it_is() {
        for (text, key) in [
            (r#"{"text": "a", "text": "b"}"#, "text"),
            (r#"{"a": [{"role": 1, "b": NaN, "role": 1}]}"#, "role"),
            (r#"{"n": 123456789012345678901, "x": 1, "\u0078": 2}"#, "x"),
        ] {
            let error = parse_text(text).unwrap_err();
            let expected = format!("the key `{key}` stands twice in one object: keep one of them");
            assert_eq!(error, expected);
        }
        let apart = r#"{"a": {"x": 1}, "b": {"x": 1}}"#;
        assert_eq!(parse_text(apart).unwrap()["b"]["x"], 1);
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
