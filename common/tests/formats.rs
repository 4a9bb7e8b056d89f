//! Data files of every format give the rows that `datasets` reads from them; broken ones one line.

#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::{Path, PathBuf};

use common::data::json;
use common::data::rows::{Format, RawRow, RowReader, Unit};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value as Json;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/formats")
        .join(name)
}

/// The rows of a file with their numbers; the first that cannot be read is an error.
fn read(path: &Path) -> Result<Vec<(u64, Json)>, String> {
    let rows = RowReader::open(path)?.map(|row| match row {
        RawRow::Value(number, bytes) => Ok((number, json::parse(&bytes)?)),
        RawRow::Parsed(number, row) => Ok((number, row)),
        RawRow::Unreadable(number, reason) => Err(format!("{number}: {reason}")),
    });
    rows.collect()
}

/// The rows of a file with this name and content, as text.
fn rows_of(name: &str, content: &[u8]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    match RowReader::open(&path) {
        Err(reason) => vec![format!("! {reason}")],
        Ok(rows) => rows
            .map(|row| match row {
                RawRow::Value(number, bytes) => {
                    let text = String::from_utf8(bytes).unwrap();
                    let text: Vec<&str> = text.split_whitespace().collect();
                    format!("{number} {}", text.join(" "))
                }
                RawRow::Parsed(number, row) => format!("{number} {row}"),
                RawRow::Unreadable(number, reason) => format!("{number} ! {reason}"),
            })
            .collect(),
    }
}

/// Checks the rows of a file that is bad: those that are read, then one line with these words.
fn check_bad(name: &str, content: &[u8], rows: &[&str], words: &str) {
    let mut found = rows_of(name, content);
    let last = found.pop().unwrap_or_default();
    assert_eq!(found, rows, "{name}");
    assert!(last.contains('!') && last.contains(words), "{name}: {last}");
    assert!(!last.contains('\n') && last.len() < 400, "{name}: {last}");
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn expected(name: &str) -> Vec<Json> {
    let text = std::fs::read(fixture("expected").join(format!("{name}.json"))).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn check_expected(names: &[&str]) {
    for name in names {
        let found = read(&fixture(name)).unwrap_or_else(|reason| panic!("{name}: {reason}"));
        let found: Vec<Json> = found.into_iter().map(|(_, row)| row).collect();
        let expected = expected(name);
        assert!(!expected.is_empty(), "{name}");
        assert_eq!(found, expected, "{name}");
        // Objects are equal in any order; columns are to keep theirs.
        let text = |rows: &[Json]| serde_json::to_string(rows).unwrap();
        assert_eq!(text(&found), text(&expected), "{name}");
    }
}

#[test]
#[cfg(feature = "arrow")]
fn parquet_of_every_compression_gives_the_rows_of_datasets() {
    check_expected(&[
        "rows-snappy.parquet",
        "rows-gzip.parquet",
        "rows-zstd.parquet",
        "rows-lz4.parquet",
        "rows-none.parquet",
        "rows-delta.parquet",
        "saved.parquet",
        "map.parquet",
    ]);
}

#[test]
#[cfg(feature = "arrow")]
fn arrow_streams_and_files_give_the_rows_of_datasets() {
    check_expected(&["stream.arrow", "saved.arrow", "file-uncompressed.arrow"]);
}

#[test]
#[cfg(feature = "arrow")]
fn compressed_arrow_files_are_refused_with_what_to_do() {
    for name in ["file-lz4.arrow", "file-zstd.arrow"] {
        let reason = read(&fixture(name)).unwrap_err();
        assert!(
            reason.contains("write it with `compression=\"uncompressed\"`"),
            "{reason}"
        );
    }
}

#[test]
#[cfg(feature = "arrow")]
fn numbers_and_bytes_that_json_does_not_hold_are_marks() {
    let rows = read(&fixture("odd.parquet")).unwrap();
    let [(_, plain), (_, nan), (_, infinite)] = rows.as_slice() else {
        panic!("{rows:?}");
    };
    assert_eq!(plain["number"], 1.5);
    let reason = |value: &Json| json::unreadable_number(value).unwrap();
    assert!(reason(&nan["number"]).starts_with("NaN"));
    assert!(reason(&infinite["number"]).starts_with("-Infinity"));
    assert!(reason(&plain["image"]).contains("bytes that are no text"));
}

#[test]
fn separated_values_give_the_rows_of_datasets() {
    check_expected(&["table.csv", "table.tsv", "index.csv"]);
}

#[test]
fn lines_of_text_give_the_rows_of_datasets_but_for_blank_ones() {
    let mut expected = expected("lines.txt");
    expected.retain(|row| !row["text"].as_str().unwrap().trim().is_empty());
    let found = read(&fixture("lines.txt")).unwrap();
    let numbers: Vec<u64> = found.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, [1, 3, 4, 6]);
    let found: Vec<Json> = found.into_iter().map(|(_, row)| row).collect();
    assert_eq!(found, expected);
}

#[test]
fn every_compression_is_read_to_the_end_of_its_last_part() {
    check_expected(&[
        "lines.jsonl.gz",
        "lines.jsonl.zst",
        "lines.jsonl.xz",
        "lines.jsonl.bz2",
    ]);
}

#[test]
fn utf_16_is_read_like_utf_8() {
    check_expected(&["utf16.jsonl"]);
}

#[test]
fn archives_are_read_in_the_order_of_names_without_litter() {
    check_expected(&["lines.zip", "lines.tar.gz"]);
    let zip = RowReader::open(&fixture("lines.zip")).unwrap();
    assert_eq!((zip.unit(), zip.notes().len()), (Unit::Line, 0));
    let tar = RowReader::open(&fixture("lines.tar.gz")).unwrap();
    assert_eq!(tar.unit(), Unit::Row);
    assert!(
        tar.notes()[0].ends_with("set/README.md"),
        "{:?}",
        tar.notes()
    );
    let numbers: Vec<u64> = read(&fixture("lines.tar.gz"))
        .unwrap()
        .into_iter()
        .map(|(number, _)| number)
        .collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
}

#[test]
fn every_file_cut_anywhere_ends_with_one_line() {
    let names = [
        "lines.jsonl.gz",
        "lines.jsonl.zst",
        "lines.jsonl.xz",
        "lines.jsonl.bz2",
        "lines.zip",
        "lines.tar.gz",
        #[cfg(feature = "arrow")]
        "saved.parquet",
        #[cfg(feature = "arrow")]
        "file-uncompressed.arrow",
    ];
    let folder = tempfile::tempdir().unwrap();
    for name in names {
        let whole = std::fs::read(fixture(name)).unwrap();
        let rows = read(&fixture(name)).unwrap().len();
        let path = folder.path().join(name);
        for length in (1..whole.len()).step_by(7) {
            std::fs::write(&path, &whole[..length]).unwrap();
            // Between two parts nothing is missing but the second; zeros behind the end are none.
            let is_less = match read(&path) {
                Err(reason) => !reason.contains('\n'),
                Ok(found) => found.len() * 2 == rows || name == "lines.jsonl.gz",
            };
            assert!(is_less, "{name} cut at {length}");
        }
    }
}

#[test]
fn every_file_with_a_wrong_byte_is_read_or_refused() {
    let entries = std::fs::read_dir(fixture("")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (mut tried, mut refused) = (0, 0);
    for entry in entries.map(|entry| entry.unwrap().path()) {
        let name = entry.file_name().unwrap().to_str().unwrap().to_owned();
        let is_columnar = name.ends_with(".parquet") || name.ends_with(".arrow");
        if entry.is_dir() || name.ends_with(".py") || (is_columnar && !cfg!(feature = "arrow")) {
            continue;
        }
        let whole = std::fs::read(&entry).unwrap();
        let path = folder.path().join(&name);
        for at in (0..whole.len()).step_by(37) {
            for flip in [0xff, 0x01, 0x80] {
                let mut broken = whole.clone();
                broken[at] ^= flip;
                std::fs::write(&path, &broken).unwrap();
                tried += 1;
                if let Err(reason) = read(&path) {
                    refused += 1;
                    assert!(!reason.contains('\n'), "{name} at {at}: {reason}");
                }
            }
        }
    }
    assert!(tried > 500 && refused > tried / 4, "{refused} of {tried}");
}

#[test]
fn rows_of_csv_are_texts_with_their_lines() {
    let table = "\u{feff}n,text\r\n1,\"a\r\nb\"\r\n\r\n,\"say \"\"x\"\"\"\r\n007,None\r\n";
    assert_eq!(
        rows_of("a.csv", table.as_bytes()),
        [
            r#"2 {"n":"1","text":"a\r\nb"}"#,
            r#"5 {"n":null,"text":"say \"x\""}"#,
            r#"6 {"n":"007","text":"None"}"#
        ]
    );
    assert_eq!(
        rows_of("a.tab", b"a\tb\nx,y\tz"),
        [r#"2 {"a":"x,y","b":"z"}"#]
    );
}

#[test]
fn broken_tables_are_told_with_their_line() {
    let rows = rows_of("a.csv", b"a,b\n1,2\n3\n4,5,6\n7,8\n");
    assert_eq!(rows[0], r#"2 {"a":"1","b":"2"}"#);
    assert!(rows[1].starts_with("3 ! has 1 values, but the header names 2 columns"));
    assert!(rows[2].starts_with("4 ! has 3 values"), "{rows:?}");
    assert_eq!(rows[3], r#"5 {"a":"7","b":"8"}"#);
    check_bad(
        "a.csv",
        b"a,b\n1,2\n3,\"open\n4,5\n",
        &[r#"2 {"a":"1","b":"2"}"#],
        "a quote is opened",
    );
    check_bad("a.csv", b"a,a\n1,2\n", &[], "names the column `a` twice");
    check_bad("a.csv", b"a;b\n1;2\n", &[], "values apart by semicolons");
    check_bad(
        "a.csv",
        b"a,b\n1,2\n3,caf\xe9\n",
        &[r#"2 {"a":"1","b":"2"}"#],
        "the row that begins at byte 9 is not UTF-8 at byte 4 of column `b`",
    );
}

#[test]
fn bytes_that_are_not_utf_8_are_told_with_their_place() {
    let lines = b"{\"text\": \"a\"}\n{\"text\": \"caf\xe9\"}\n{\"text\": \"b\"}\n";
    let rows = rows_of("a.jsonl", lines);
    assert!(
        rows[1].contains("not UTF-8 at byte 28 of the file (0xe9)"),
        "{rows:?}"
    );
    assert_eq!(rows[2], r#"3 {"text": "b"}"#);
    let packed = rows_of("a.jsonl.gz", &gzip(lines));
    assert!(
        packed[1].contains("byte 28 of the unpacked file"),
        "{packed:?}"
    );
    assert_eq!(packed[2], r#"3 {"text": "b"}"#);
}

#[test]
fn one_object_may_hold_the_rows() {
    let object = "{\"version\": {\"a\": [1]},\n \"data\": [\n{\"text\": \"}\"},\n{\"text\": \"b\"}],\n\"n\": 1}\n";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.json");
    std::fs::write(&path, object).unwrap();
    let rows = RowReader::open(&path).unwrap();
    assert_eq!(rows.unit(), Unit::Row);
    assert_eq!(
        rows.notes(),
        ["the rows are the items of `data`; beside it `version`, `n` is not read"]
    );
    let expected = [r#"1 {"text": "}"}"#, r#"2 {"text": "b"}"#];
    assert_eq!(rows_of("a.json", object.as_bytes()), expected);
    assert_eq!(rows_of("a.json.gz", &gzip(object.as_bytes())), expected);
    let two = "{\"train\": [{\"a\": 1}], \"test\": [{\"a\": 2}]}";
    check_bad("a.json", two.as_bytes(), &[], "(`train`, `test`)");
    check_bad(
        "a.json",
        b"{\"data\": [{\"a\": 1}, {\"a\"",
        &[r#"1 {"a": 1}"#, r#"2 {"a""#],
        "the array has no end",
    );
}

#[test]
fn an_object_that_is_a_row_stays_one() {
    let rows = [
        r#"{"messages": [{"role": "user", "content": "a"}]}"#,
        r#"{"dialog": [{"from": "human", "value": "a"}]}"#,
        r#"{"text": "a", "sources": [{"url": "b"}]}"#,
        r#"{"data": [1, 2]}"#,
    ];
    for row in rows {
        assert_eq!(rows_of("a.json", row.as_bytes()), [format!("1 {row}")]);
    }
    let wrapped = r#"{"data": [{"a": 1}]}"#;
    let lines = format!("{wrapped}\n{wrapped}\n");
    let two = [format!("1 {wrapped}"), format!("2 {wrapped}")];
    assert_eq!(rows_of("a.json", lines.as_bytes()), two);
    assert_eq!(
        rows_of("a.jsonl", wrapped.as_bytes()),
        [format!("1 {wrapped}")]
    );
}

#[test]
fn what_is_asked_for_must_be_what_is_there() {
    let asked = |name: &str, format: &str| {
        let format: Format = format.parse().unwrap();
        RowReader::open_as(&fixture(name), Some(format))
            .err()
            .unwrap()
    };
    assert!(asked("saved.parquet", "csv").contains("holds parquet data, but `csv` is asked for"));
    assert!(asked("table.csv", "parquet").contains("does not begin like parquet data"));
    let text = RowReader::open_as(&fixture("table.csv"), Some(Format::Text)).unwrap();
    assert_eq!(text.format(), Format::Text);
}

#[test]
fn files_that_are_something_else_are_called_by_their_name() {
    check_bad("a.parquet", b"", &[], "is empty");
    check_bad("a.parquet", b"<!DOCTYPE html>", &[], "HTML");
    check_bad("a.parquet", b"version https://git-lfs", &[], "git lfs pull");
    check_bad("a.jsonl", b"%PDF-1.7", &[], "PDF");
    check_bad("a.gz", &gzip(&gzip(b"{}")), &[], "compressed twice");
    check_bad("a.yaml", b"a: 1", &[], "YAML");
    assert_eq!(rows_of("a.jsonl", b""), Vec::<String>::new());
    let garbage = [gzip(b"{\"a\": 1}\n").as_slice(), b"garbage"].concat();
    check_bad(
        "a.gz",
        &garbage,
        &[r#"1 {"a": 1}"#],
        "something else behind its end",
    );
}

#[test]
fn a_row_beyond_the_bound_is_passed_in_every_format() {
    let long = "x".repeat(65 << 20);
    let words = "the row is longer than 67108864 bytes";
    let check = |name: &str, content: String, after: &str| {
        let rows = rows_of(name, &gzip(content.as_bytes()));
        assert!(rows[0].contains(words), "{name}: {:.200}", rows[0]);
        assert_eq!(rows[1..], [after], "{name}");
    };
    check(
        "a.jsonl.gz",
        format!("{{\"text\": \"{long}\"}}\n{{\"a\": 1}}\n"),
        r#"2 {"a": 1}"#,
    );
    check(
        "a.csv.gz",
        format!("a\n\"{long}\n\"\nb\n"),
        r#"4 {"a":"b"}"#,
    );
    check("a.txt.gz", format!("{long}\nb\n"), r#"2 {"text":"b"}"#);
}
