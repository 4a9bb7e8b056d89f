//! Recognises files that are no JSON rows by how they begin.
//!
//! Enters: the first bytes of a file. Leaves: what it is and what to do, where it is something that people give for rows.

use std::fs::Metadata;
use std::io::ErrorKind;
use std::path::Path;

/// First bytes of formats that hold rows, and what to do with them.
const MAGIC: [(&[u8], &str); 19] = [
    (
        b"\x1f\x8b",
        "compressed with gzip: unpack it first (`gunzip`)",
    ),
    (
        b"\x28\xb5\x2f\xfd",
        "compressed with Zstandard: unpack it first (`unzstd`)",
    ),
    (
        b"\xfd7zXZ\0",
        "compressed with xz: unpack it first (`unxz`)",
    ),
    (b"BZh", "compressed with bzip2: unpack it first (`bunzip2`)"),
    (
        b"\x04\x22\x4d\x18",
        "compressed with LZ4: unpack it first (`unlz4`)",
    ),
    (
        b"7z\xbc\xaf\x27\x1c",
        "a 7-Zip archive: unpack it and name a file of JSON rows in it",
    ),
    (
        b"Rar!",
        "a RAR archive: unpack it and name a file of JSON rows in it",
    ),
    (
        b"PK\x03\x04",
        "a ZIP archive (or a spreadsheet): unpack it, or export it as JSON Lines",
    ),
    (
        b"PAR1",
        "a Parquet file, which is not read: write it as JSON Lines (`Dataset.to_json`, or pandas' `to_json(..., orient=\"records\", lines=True)`)",
    ),
    (
        b"ARROW1",
        "an Arrow or Feather file, which is not read: write it as JSON Lines (`Dataset.to_json`)",
    ),
    (
        b"FEA1",
        "a Feather file, which is not read: write it as JSON Lines (pandas' `to_json(..., orient=\"records\", lines=True)`)",
    ),
    (
        b"\xff\xff\xff\xff",
        "an Arrow stream, which is not read: write it as JSON Lines (`Dataset.to_json`)",
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

/// What the file is instead of JSON rows, and what to do about it. None where it may be rows.
pub fn other_than_rows(path: &Path, start: &[u8]) -> Option<String> {
    let known = MAGIC.iter().find(|(magic, _)| start.starts_with(magic));
    if let Some((_, what)) = known {
        return Some(format!("is {what}"));
    }
    if start.get(257..262) == Some(b"ustar") {
        return Some("is a tar archive: unpack it and name a file of JSON rows in it".to_owned());
    }
    if is_utf16(start) {
        return Some(
            "is UTF-16 text: save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`, or PowerShell's `-Encoding utf8`)"
                .to_owned(),
        );
    }
    let text = start.trim_ascii_start();
    if let [b'\x80', 2..=5, ..] = text {
        return Some("is a Python pickle, which is not read: write it as JSON Lines".to_owned());
    }
    if text.first().is_none_or(|first| b"{[".contains(first)) {
        return None;
    }
    if text.starts_with(b"<") {
        let what = "is an HTML or XML page, not data: was an error or login page downloaded? Take the link of the raw file";
        return Some(what.to_owned());
    }
    let end = path.extension().and_then(|end| end.to_str()).unwrap_or("");
    let first_line = text.split(|byte| *byte == b'\n').next().unwrap_or(text);
    match end.to_lowercase().as_str() {
        "csv" | "tsv" => Some(
            "is a table of separated values, which is not read: write it as JSON Lines (pandas' `to_json(..., orient=\"records\", lines=True)`)"
                .to_owned(),
        ),
        "yaml" | "yml" => Some("is YAML, which is not read as rows: write them as JSON Lines".to_owned()),
        "txt" | "md" => Some(
            "is plain text: write it as JSON Lines, `{\"text\": ...}` on each line".to_owned(),
        ),
        _ if is_header(first_line) => Some(
            "looks like a table of separated values (CSV), which is not read: write it as JSON Lines"
                .to_owned(),
        ),
        _ => None,
    }
}

fn is_utf16(start: &[u8]) -> bool {
    let has_mark = start.starts_with(b"\xff\xfe") || start.starts_with(b"\xfe\xff");
    // Without a byte order mark: every other byte of ASCII text is zero.
    has_mark || matches!(start, [b'{' | b'[', 0, ..] | [0, b'{' | b'[', ..])
}

/// Whether a line is a header of names of columns, apart by commas, tabs or semicolons.
fn is_header(line: &[u8]) -> bool {
    let Ok(line) = std::str::from_utf8(line) else {
        return false;
    };
    let is_name = |name: &str| {
        let name = name.trim().trim_matches('"');
        let fits = |c: char| c.is_alphanumeric() || "_- .".contains(c);
        !name.is_empty() && name.len() <= 40 && name.chars().all(fits)
    };
    [',', '\t', ';'].iter().any(|separator| {
        let mut names = line.split(*separator);
        line.contains(*separator) && names.all(is_name)
    })
}

/// Checks that a path is a file that may hold rows, and returns its metadata; an error says why it cannot.
pub fn file_of_rows(path: &Path) -> Result<Metadata, String> {
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => no_such_file(path),
        _ => error.to_string(),
    })?;
    if metadata.is_dir() {
        return Err(is_a_folder(path));
    }
    if !metadata.is_file() {
        return Err("is not a file: name a JSON Lines file".to_owned());
    }
    Ok(metadata)
}

/// Why there is no file of rows here, and what to do, where the system says that there is none.
fn no_such_file(path: &Path) -> String {
    let text = path.to_string_lossy();
    let shown = text.rsplit_once("://").map_or(&*text, |(_, rest)| rest);
    if text.contains("://") {
        return "no such file: data is read from this machine only; download it first".to_owned();
    }
    match hub_id(path) {
        Some(id) => format!(
            "no such file; a dataset of the Hugging Face Hub is not fetched: download it (`hf download {id} --repo-type dataset --local-dir {}`) and name a file of JSON rows in it",
            id.rsplit('/').next().unwrap_or(shown)
        ),
        None => "no such file".to_owned(),
    }
}

/// The end of the path that has the form of a hub id, `owner/name`, where its folder is not there either.
fn hub_id(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let folder = path.parent()?;
    let owner = folder.file_name()?.to_str()?;
    let is_part = |part: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        !part.is_empty() && part.chars().all(fits)
    };
    let looks_like_a_file = [".jsonl", ".json", ".txt", ".csv", ".parquet", ".gz"]
        .iter()
        .any(|end| name.to_lowercase().ends_with(end));
    (is_part(owner) && is_part(name) && !looks_like_a_file && !folder.exists())
        .then(|| format!("{owner}/{name}"))
}

/// What to do with a folder where a file of rows is wanted.
fn is_a_folder(path: &Path) -> String {
    const SHOWN: usize = 4;
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| [".jsonl", ".json"].iter().any(|end| name.ends_with(end)))
        .take(1000)
        .collect();
    names.sort_unstable();
    let more = if names.len() > SHOWN { ", ..." } else { "" };
    names.truncate(SHOWN);
    match names.is_empty() {
        true => "is a folder: name a JSON Lines file".to_owned(),
        false => format!(
            "is a folder: name a file in it ({}{more})",
            names.join(", ")
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn check(name: &str, start: &[u8], word: Option<&str>) {
        let found = other_than_rows(Path::new(name), start);
        match (&found, word) {
            (Some(found), Some(word)) => assert!(found.contains(word), "{name}: {found}"),
            (None, None) => {}
            _ => panic!("{name}: {found:?}"),
        }
    }

    #[test]
    fn what_is_not_rows_is_called_by_its_name() {
        check("a.jsonl.gz", b"\x1f\x8b\x08\x00", Some("gunzip"));
        check("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", Some("unzstd"));
        check("a.parquet", b"PAR1\x15", Some("Parquet"));
        check("a.arrow", b"ARROW1\0\0", Some("Arrow"));
        check(
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\n",
            Some("git lfs pull"),
        );
        check("a.jsonl", b"\n<!DOCTYPE html>", Some("HTML"));
        check("a.jsonl", b"\xff\xfe{\0", Some("UTF-16"));
        check("a.jsonl", b"{\0\"\0", Some("UTF-16"));
        check("a.csv", b"anything", Some("separated values"));
        check("a.data", b"prompt,completion\nhi,ho\n", Some("CSV"));
        check("a.txt", b"Once upon a time", Some("plain text"));
    }

    #[test]
    fn rows_and_broken_rows_are_left_to_the_reader() {
        check("a.csv", b"{\"text\": 1}", None);
        check("a.jsonl", b" [", None);
        check("a.jsonl", b"\"text\": 1}", None);
        check("a.jsonl", b"", None);
    }

    #[test]
    fn only_what_looks_like_a_hub_id_is_called_one() {
        let of = |path: &str| hub_id(Path::new(path));
        assert_eq!(
            of("/nowhere/at/all/HuggingFaceH4/no_robots").as_deref(),
            Some("HuggingFaceH4/no_robots")
        );
        assert_eq!(of("/nowhere/data/train.jsonl"), None);
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(hub_id(&folder.path().join("train")), None);
    }
}
