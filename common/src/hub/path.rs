//! Names of files in a repository, checked before they become paths on this disk, and written into web addresses.

use std::fmt::Write as _;

const MAX_PATH_BYTES: usize = 1024;
const MAX_PART_BYTES: usize = 255;
/// Names of devices on Windows, whatever follows their first dot.
const RESERVED: [&str; 4] = ["con", "prn", "aux", "nul"];

/// Why a file of this name is not taken; None where the name is fine on every system.
pub(super) fn fault(path: &str) -> Option<&'static str> {
    if path.is_empty() || path.len() > MAX_PATH_BYTES {
        return Some("it is empty or too long");
    }
    if path.starts_with('/') {
        return Some("it is absolute");
    }
    if path.contains('\\') {
        return Some("it has a backslash");
    }
    if path.chars().any(char::is_control) {
        return Some("it has control characters");
    }
    path.split('/').find_map(part_fault)
}

/// The path as it stands in a web address.
pub(super) fn encode_path(path: &str) -> String {
    encode(path, b"/")
}

/// One part of a path as it stands in a web address: slashes are written as `%2F`.
pub(super) fn encode_part(part: &str) -> String {
    encode(part, b"")
}

fn part_fault(part: &str) -> Option<&'static str> {
    if part == ".." || part == "." {
        return Some("it leads out of its folder");
    }
    if part.is_empty() {
        return Some("it has an empty part");
    }
    if part.len() > MAX_PART_BYTES {
        return Some("a part of it is too long");
    }
    if part.contains([':', '<', '>', '"', '|', '?', '*']) || part.ends_with(['.', ' ']) {
        return Some("it cannot be written on Windows");
    }
    let stem = part.split('.').next().unwrap_or(part).to_ascii_lowercase();
    let is_port = |prefix: &str| {
        let number = stem.strip_prefix(prefix);
        number.is_some_and(|number| number.len() == 1 && number.as_bytes()[0].is_ascii_digit())
    };
    if RESERVED.contains(&stem.as_str()) || is_port("com") || is_port("lpt") {
        return Some("it is the name of a device on Windows");
    }
    None
}

fn encode(text: &str, kept: &[u8]) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || kept.contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_or_are_no_files_on_windows_have_a_fault() {
        for name in [
            "",
            "/etc/passwd",
            "../a",
            "a/../b",
            "a/./b",
            "a//b",
            "a/",
            "a\\b",
            "a\0b",
            "a\nb",
            "C:a",
            "con",
            "data/NUL.txt",
            "com1.json",
            "a.",
            "a?b",
        ] {
            assert!(fault(name).is_some(), "{name:?}");
        }
        for name in [
            "config.json",
            "data/train-00000-of-00002.parquet",
            ".gitattributes",
            "console.txt",
            "com10",
            "a b/ü.json",
            "a..b",
        ] {
            assert_eq!(fault(name), None, "{name:?}");
        }
    }

    #[test]
    fn what_an_address_cannot_hold_is_encoded() {
        assert_eq!(encode_path("a b/ü#.json"), "a%20b/%C3%BC%23.json");
        assert_eq!(encode_part("refs/pr/1"), "refs%2Fpr%2F1");
    }
}
