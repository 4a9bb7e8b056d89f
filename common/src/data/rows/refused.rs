//! Recognises files that hold no rows that are read, by how they begin.
//!
//! Enters: the first bytes of a file, unpacked. Leaves: what it is and what to do, where it is something that people give for rows.

/// First bytes of formats that hold data, and what to do with them.
const MAGIC: [(&[u8], &str); 11] = [
    (
        b"\x04\x22\x4d\x18",
        "compressed with LZ4: unpack it first (`unlz4`)",
    ),
    (
        b"7z\xbc\xaf\x27\x1c",
        "a 7-Zip archive: unpack it and name a file of rows in it",
    ),
    (
        b"Rar!",
        "a RAR archive: unpack it and name a file of rows in it",
    ),
    (
        b"FEA1",
        "a Feather file, which is not read: write it as JSON Lines (pandas' `to_json(..., orient=\"records\", lines=True)`)",
    ),
    (
        b"Obj\x01",
        "an Avro file, which is not read: write it as JSON Lines",
    ),
    (
        b"ORC",
        "an ORC file, which is not read: write it as JSON Lines",
    ),
    (
        b"SQLite format 3\0",
        "an SQLite database, which is not read: export the rows as JSON Lines",
    ),
    (
        b"\x89HDF",
        "an HDF5 file, which is not read: write it as JSON Lines",
    ),
    (
        b"\x93NUMPY",
        "a NumPy array, which is not read: write the text as JSON Lines",
    ),
    (
        b"%PDF",
        "a PDF, which is not read: write its text as JSON Lines, `{\"text\": ...}`",
    ),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the data itself: fetch it (`git lfs pull`), or download the file",
    ),
];

/// What the file is instead of rows, and what to do about it. None where it may be rows.
pub fn other_than_rows(start: &[u8]) -> Option<String> {
    let known = MAGIC.iter().find(|(magic, _)| start.starts_with(magic));
    if let Some((_, what)) = known {
        return Some(format!("is {what}"));
    }
    if is_utf16_without_mark(start) {
        return Some(
            "is UTF-16 text without a byte order mark: save it as UTF-8 (`iconv -f UTF-16LE -t UTF-8`, or PowerShell's `-Encoding utf8`)"
                .to_owned(),
        );
    }
    let text = start.trim_ascii_start();
    if let [b'\x80', 2..=5, ..] = text {
        return Some("is a Python pickle, which is not read: write it as JSON Lines".to_owned());
    }
    let is_page = ["<!doctype", "<html", "<?xml"].iter().any(|word| {
        let first = text.get(..word.len());
        first.is_some_and(|first| first.eq_ignore_ascii_case(word.as_bytes()))
    });
    is_page.then(|| {
        "is an HTML or XML page, not data: was an error or login page downloaded? Take the link of the raw file".to_owned()
    })
}

/// Whether every other byte of what may be JSON is zero.
fn is_utf16_without_mark(start: &[u8]) -> bool {
    matches!(start, [b'{' | b'[', 0, ..] | [0, b'{' | b'[', ..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(start: &[u8], word: Option<&str>) {
        let found = other_than_rows(start);
        match (&found, word) {
            (Some(found), Some(word)) => assert!(found.contains(word), "{found}"),
            (None, None) => {}
            _ => panic!("{found:?}"),
        }
    }

    #[test]
    fn what_is_not_rows_is_called_by_its_name() {
        check(
            b"version https://git-lfs.github.com/spec/v1\n",
            Some("git lfs pull"),
        );
        check(b"\n<!DOCTYPE html>", Some("HTML"));
        check(b"{\0\"\0", Some("UTF-16"));
        check(b"SQLite format 3\0", Some("SQLite"));
        check(b"\x80\x04\x95", Some("pickle"));
    }

    #[test]
    fn rows_and_broken_rows_are_left_to_the_reader() {
        check(b"{\"text\": 1}", None);
        check(b" [", None);
        check(b"\"text\": 1}", None);
        check(b"<s> a line of text", None);
        check(b"", None);
    }
}
