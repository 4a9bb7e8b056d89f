//! Rows of data files, whatever their format.
//!
//! Enters: a path, and the format where the user names it. Leaves: numbered rows, not understood yet, with lines for people about what
//! of a file is not read. Never holds more than a batch of rows, and none that is longer than a bound; never writes anything.

mod archive;
#[cfg(feature = "arrow")]
mod arrow;
#[cfg(feature = "arrow")]
mod columns;
mod compression;
mod content;
mod csv;
mod encoding;
mod format;
mod json;
#[cfg(feature = "arrow")]
mod parquet;
mod refused;
mod row;
mod source;
mod tar;
#[cfg(feature = "arrow")]
mod temporal;
mod text;
mod wrapped;
mod zip;

use std::path::Path;

use content::{Content, PackedBytes, TextContent};
use row::Rows;
use source::Source;

pub use format::{Format, NOT_DATA};
pub use row::{RawRow, Unit, place_of};
pub use source::file_of_rows;

/// The rows of one dataset, in order.
pub struct RowReader {
    rows: Rows,
    unit: Unit,
    format: Format,
    notes: Vec<String>,
    packed: PackedBytes,
}

impl RowReader {
    /// Opens a dataset file. An error says what the file is instead, or why it cannot be read.
    pub fn open(path: &Path) -> Result<Self, String> {
        Self::open_as(path, None)
    }

    /// Opens a dataset file, whose format the user may have named. A format that the content contradicts is an error.
    pub fn open_as(path: &Path, asked: Option<Format>) -> Result<Self, String> {
        file_of_rows(path)?;
        let source = Source::file(path);
        match archive::members(&source)? {
            Some(members) => archive::open(members, source.packed(), asked),
            None => Self::of(&source, asked),
        }
    }

    /// Number of bytes of the file that were read, where it is packed. None: they are about those of the rows.
    pub fn packed_bytes(&self) -> Option<u64> {
        Some(self.packed.get()).filter(|bytes| *bytes > 0)
    }

    /// What the numbers of the rows count.
    pub fn unit(&self) -> Unit {
        self.unit
    }

    pub fn format(&self) -> Format {
        self.format
    }

    /// What of the file is not read, and what its rows were taken for where that is not plain: a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Opens a source that is no archive.
    fn of(source: &Source, asked: Option<Format>) -> Result<Self, String> {
        let content = source.content()?;
        if let Some(twice) = compression::Compression::of(&content.start) {
            return Err(format!(
                "is compressed twice, the second time with {}: unpack it once",
                twice.name()
            ));
        }
        match Format::of_magic(&content.start) {
            Some(found) => Self::columnar(source, content, found, asked),
            None => Self::text(source, content, asked),
        }
    }

    fn columnar(
        source: &Source,
        content: Content,
        found: Format,
        asked: Option<Format>,
    ) -> Result<Self, String> {
        if let Some(asked) = asked.filter(|asked| *asked != found) {
            return Err(format!(
                "holds {found} data, but `{asked}` is asked for: leave the format out, or name `{found}`"
            ));
        }
        Ok(Self {
            rows: columnar_rows(source, content, found)?,
            unit: Unit::Row,
            format: found,
            notes: Vec::new(),
            packed: source.packed().clone(),
        })
    }

    fn text(source: &Source, content: Content, asked: Option<Format>) -> Result<Self, String> {
        if let Some(what) = refused::other_than_rows(&content.start) {
            return Err(what);
        }
        let text = TextContent::of(content);
        let format = Format::of_text(source.name(), &text.start, asked)?;
        let mut notes = Vec::new();
        let (rows, unit): (Rows, Unit) = match format {
            Format::Csv => (
                Box::new(csv::CsvRows::open(text, source.name())?),
                Unit::Line,
            ),
            Format::Text => (Box::new(text::TextRows::new(text)), Unit::Line),
            _ => match wrapped::list_of_rows(source, &text)? {
                Some(list) => {
                    notes.push(list.note());
                    let text = TextContent::of(source.content()?);
                    let rows = json::JsonRows::from_list(text, &list);
                    (Box::new(rows?), Unit::Row)
                }
                None => {
                    let rows = json::JsonRows::new(text);
                    let unit = rows.unit();
                    (Box::new(rows), unit)
                }
            },
        };
        Ok(Self {
            rows,
            unit,
            format,
            notes,
            packed: source.packed().clone(),
        })
    }
}

impl Iterator for RowReader {
    type Item = RawRow;

    /// The next row; blank lines are none.
    fn next(&mut self) -> Option<RawRow> {
        self.rows.next()
    }
}

/// The rows of a Parquet or an Arrow file.
#[cfg(feature = "arrow")]
fn columnar_rows(source: &Source, content: Content, format: Format) -> Result<Rows, String> {
    columns::guarded(format.name(), || match format {
        Format::Parquet => parquet::rows(source, &content),
        _ => arrow::rows(source, content),
    })?
}

#[cfg(not(feature = "arrow"))]
fn columnar_rows(_: &Source, _: Content, format: Format) -> Result<Rows, String> {
    Err(format!(
        "holds {format} data, which this build does not read: build it with `--features arrow`, or write the rows as JSON Lines (`Dataset.to_json`)"
    ))
}
