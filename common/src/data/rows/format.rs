//! Which format a data file has: its first bytes say so, else its name, else its text.
//!
//! Enters: a name, the first bytes, and what the user asks for. Leaves: the format, or an error where they contradict each other.

use std::fmt;
use std::str::FromStr;

/// Files beside data that are none, whatever their ending says.
pub const NOT_DATA: [&str; 7] = [
    "README.md",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "dummy_data.zip",
];

/// A format of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    /// JSON Lines, a JSON array, or JSON objects.
    Json,
    /// Values apart by commas, or by tabs where the file's name ends in .tsv or .tab.
    Csv,
    Parquet,
    /// Arrow IPC: a stream, as `datasets` saves it, or a file.
    Arrow,
    /// A row on each line.
    Text,
}

impl Format {
    const ALL: [Self; 5] = [
        Self::Json,
        Self::Csv,
        Self::Parquet,
        Self::Arrow,
        Self::Text,
    ];

    /// The name as Axolotl's `ds_type` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Csv => "csv",
            Self::Parquet => "parquet",
            Self::Arrow => "arrow",
            Self::Text => "text",
        }
    }

    /// The format that a file's name names, which has no ending for its compression any more.
    pub fn of_name(name: &str) -> Option<Self> {
        let (_, ending) = name.rsplit_once('.')?;
        Self::of_ending(ending)
    }

    /// The format that an ending stands for, without its point.
    pub fn of_ending(ending: &str) -> Option<Self> {
        match ending.to_lowercase().as_str() {
            "json" | "jsonl" | "ndjson" => Some(Self::Json),
            "csv" | "tsv" | "tab" => Some(Self::Csv),
            "parquet" => Some(Self::Parquet),
            "arrow" | "feather" | "ipc" => Some(Self::Arrow),
            "txt" | "text" | "md" => Some(Self::Text),
            _ => None,
        }
    }

    /// The format of which the first bytes tell that the file has it.
    pub fn of_magic(start: &[u8]) -> Option<Self> {
        match start {
            [b'P', b'A', b'R', b'1', ..] => Some(Self::Parquet),
            [b'A', b'R', b'R', b'O', b'W', b'1', ..] | [0xff, 0xff, 0xff, 0xff, ..] => {
                Some(Self::Arrow)
            }
            _ => None,
        }
    }

    /// The format of a file that no magic bytes tell.
    pub fn of_text(name: &str, start: &[u8], asked: Option<Self>) -> Result<Self, String> {
        if let Some(wanted @ (Self::Parquet | Self::Arrow)) = asked {
            return Err(match start.is_empty() {
                true => "is empty".to_owned(),
                false => format!(
                    "does not begin like {wanted} data, which is asked for: was something else downloaded?"
                ),
            });
        }
        if let Some(asked) = asked {
            return Ok(asked);
        }
        let named = Self::of_name(name);
        let text = start.trim_ascii_start();
        match named {
            // The content wins: such a line is no header and no prose.
            Some(Self::Csv | Self::Text) if is_object(first_line(text)) => Ok(Self::Json),
            Some(named @ (Self::Csv | Self::Text)) => Ok(named),
            Some(named @ (Self::Parquet | Self::Arrow)) => Err(match start.is_empty() {
                true => "is empty".to_owned(),
                false => format!(
                    "is named like {named} data, but does not begin so: was something else downloaded, or is `ds_type` missing?"
                ),
            }),
            _ if text.first().is_none_or(|first| b"{[".contains(first)) => Ok(Self::Json),
            _ if name.to_lowercase().ends_with(".yaml") || name.to_lowercase().ends_with(".yml") => {
                Err("is YAML, which is not read as rows: write them as JSON Lines".to_owned())
            }
            _ if is_header(first_line(text)) => Err(
                "looks like a table of separated values: let its name end in .csv or .tsv, or say `ds_type: csv`"
                    .to_owned(),
            ),
            _ => Ok(Self::Json),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    /// Parses what a user writes for `ds_type`.
    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("no format of data is called `{name}`: it is one of {names}")
        })
    }
}

fn first_line(text: &[u8]) -> &[u8] {
    text.split(|byte| *byte == b'\n').next().unwrap_or(text)
}

/// Whether a line is a whole JSON object.
fn is_object(line: &[u8]) -> bool {
    line.starts_with(b"{") && serde_json::from_slice::<serde::de::IgnoredAny>(line).is_ok()
}

/// Whether a line is a header of names of columns, apart by commas, tabs or semicolons.
pub fn is_header(line: &[u8]) -> bool {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn of(name: &str, start: &str) -> Result<Format, String> {
        Format::of_text(name, start.as_bytes(), None)
    }

    #[test]
    fn the_name_tells_the_format_of_text() {
        assert_eq!(of("a.jsonl", "{}"), Ok(Format::Json));
        assert_eq!(of("a.csv", "text\nhi"), Ok(Format::Csv));
        assert_eq!(of("a.TSV", "text\nhi"), Ok(Format::Csv));
        assert_eq!(of("a.txt", "[1] a footnote"), Ok(Format::Text));
        assert_eq!(of("a", " [{}]"), Ok(Format::Json));
    }

    #[test]
    fn the_content_wins_over_the_name() {
        assert_eq!(of("a.csv", "{\"text\": \"a\"}\n"), Ok(Format::Json));
        assert_eq!(of("a.txt", "{\"text\": \"a\"}\r\n"), Ok(Format::Json));
        assert_eq!(of("a.txt", "{ a brace\n"), Ok(Format::Text));
        assert_eq!(Format::of_magic(b"PAR1\x15"), Some(Format::Parquet));
    }

    #[test]
    fn what_is_asked_for_wins_over_both() {
        let asked = |start: &[u8], asked| Format::of_text("a.jsonl", start, Some(asked));
        assert_eq!(asked(b"{}", Format::Text), Ok(Format::Text));
        assert!(
            asked(b"{}", Format::Parquet)
                .unwrap_err()
                .contains("does not begin like parquet data")
        );
    }

    #[test]
    fn names_that_the_content_contradicts_are_told() {
        let wrong = of("a.parquet", "{}").unwrap_err();
        assert!(wrong.contains("named like parquet data"), "{wrong}");
        assert_eq!(of("a.arrow", ""), Err("is empty".to_owned()));
        let table = of("a.data", "prompt,completion\nhi,ho\n").unwrap_err();
        assert!(table.contains("ds_type: csv"), "{table}");
    }

    #[test]
    fn formats_have_the_names_of_ds_type() {
        for format in Format::ALL {
            assert_eq!(format.name().parse(), Ok(format));
        }
        assert!("jsonl".parse::<Format>().unwrap_err().contains("json, csv"));
    }
}
