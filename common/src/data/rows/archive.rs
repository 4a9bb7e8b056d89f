//! Archives whose files hold rows: the only data file of one, or all of one format in the order of their names.
//!
//! Enters: a tar or ZIP archive. Leaves: the rows of its data files, one file after the other. Nothing is unpacked to disk.

use super::compression::Compression;
use super::content::PackedBytes;
use super::format::{Format, NOT_DATA};
use super::row::{RawRow, Rows, Unit};
use super::source::Source;
use super::{RowReader, tar, zip};

/// Most data files of a compressed tar archive: it is unpacked anew from its start for each of them.
const MAX_PACKED_FILES: usize = 64;

/// Most names in a message; the others are counted.
const MAX_NAMES: usize = 8;

/// The files of an archive.
pub struct Members {
    sources: Vec<Source>,
    /// Whether reading a file takes reading all before it.
    is_packed: bool,
}

/// The files in a source that is an archive; None where it is none.
pub fn members(source: &Source) -> Result<Option<Members>, String> {
    let content = source.content()?;
    if zip::is_zip(&content.start) {
        if content.compression.is_some() {
            return Err("is a compressed ZIP archive: unpack it once".to_owned());
        }
        let members = zip::members(source.open()?)?;
        if members
            .iter()
            .any(|part| part.name == "[Content_Types].xml")
        {
            return Err(
                "is a spreadsheet or document, which is not read: export it as CSV".to_owned(),
            );
        }
        let sources = members.into_iter().map(|part| source.zip_member(part));
        return Ok(Some(Members {
            sources: sources.collect(),
            is_packed: false,
        }));
    }
    if tar::is_tar(&content.start) {
        let is_packed = content.compression.is_some();
        let sources = tar::members(content)?.into_iter();
        return Ok(Some(Members {
            sources: sources.map(|part| source.tar_member(part)).collect(),
            is_packed,
        }));
    }
    Ok(None)
}

/// The rows of the data files of an archive, of which `packed` says how far it is read.
pub fn open(
    members: Members,
    packed: &PackedBytes,
    asked: Option<Format>,
) -> Result<RowReader, String> {
    let (mut files, passed_over) = data_files(members.sources, asked)?;
    let mut notes = Vec::new();
    if !passed_over.is_empty() {
        notes.push(format!(
            "of the archive these files are not read: {}",
            shown(&passed_over)
        ));
    }
    if members.is_packed && files.len() > MAX_PACKED_FILES {
        return Err(format!(
            "holds {} data files in one compressed tar archive, of which at most {MAX_PACKED_FILES} are read: unpack it",
            files.len()
        ));
    }
    if let [only] = files.as_slice() {
        let mut rows = open_part(only, asked)?;
        notes.append(&mut rows.notes);
        return Ok(RowReader { notes, ..rows });
    }
    files.reverse();
    let first = match files.pop() {
        Some(first) => open_part(&first, asked).map(|rows| (first, rows))?,
        None => return Err("is an archive without data files".to_owned()),
    };
    let format = first.1.format;
    let parts = Parts {
        left: files,
        asked,
        current: Some(first),
        number: 0,
    };
    Ok(RowReader {
        rows: Box::new(parts) as Rows,
        unit: Unit::Row,
        format,
        notes,
        packed: packed.clone(),
    })
}

/// The data files in the order of their names, which must be of one format, and the names of the others.
fn data_files(
    sources: Vec<Source>,
    asked: Option<Format>,
) -> Result<(Vec<Source>, Vec<String>), String> {
    let kept: Vec<Source> = sources
        .into_iter()
        .filter(|source| !is_litter(source.name()))
        .collect();
    let format = |source: &Source| {
        let name = source.name().rsplit('/').next().unwrap_or_default();
        let format = Format::of_name(name).filter(|_| !NOT_DATA.contains(&name));
        format.filter(|format| asked.is_none_or(|asked| asked == *format))
    };
    let mut formats: Vec<Format> = kept.iter().filter_map(format).collect();
    formats.sort_unstable();
    formats.dedup();
    // Beside data, text is about it.
    if formats.len() > 1 {
        formats.retain(|format| *format != Format::Text);
    }
    let names = |sources: &[Source]| -> Vec<String> {
        let names = sources.iter().map(|source| source.name().to_owned());
        names.collect()
    };
    let wanted = match formats.as_slice() {
        [format] => *format,
        // A file that only its content can tell the format of.
        [] if kept.len() == 1 => return Ok((kept, Vec::new())),
        [] => {
            return Err(match kept.is_empty() {
                true => "is an archive without files".to_owned(),
                false => format!(
                    "is an archive without data files (it holds {}): let the names of those end in .jsonl, .csv, .parquet or .txt",
                    shown(&names(&kept))
                ),
            });
        }
        several => {
            let several: Vec<&str> = several.iter().map(|format| format.name()).collect();
            return Err(format!(
                "is an archive with data files of several formats ({}): say with `ds_type` which is meant",
                several.join(", ")
            ));
        }
    };
    let (mut files, others): (Vec<Source>, Vec<Source>) = kept
        .into_iter()
        .partition(|source| format(source) == Some(wanted));
    files.sort_by(|one, other| one.name().cmp(other.name()));
    Ok((files, names(&others)))
}

/// Whether a file is what systems leave in archives: hidden ones, and macOS's copies of attributes.
fn is_litter(name: &str) -> bool {
    name.split('/').any(|part| {
        part == "__MACOSX" || (part.starts_with('.') && !part.trim_matches('.').is_empty())
    })
}

fn shown(names: &[String]) -> String {
    let more = names.len().saturating_sub(MAX_NAMES);
    let mut text = names[..names.len() - more].join(", ");
    if more > 0 {
        text += &format!(", and {more} more");
    }
    text
}

/// Opens a file of an archive, whose name is told with an error.
fn open_part(source: &Source, asked: Option<Format>) -> Result<RowReader, String> {
    let of_part = |reason: String| format!("`{}` in the archive: {reason}", source.name());
    let content = source.content().map_err(of_part)?;
    if zip::is_zip(&content.start) || tar::is_tar(&content.start) {
        return Err(of_part("is an archive itself: unpack it".to_owned()));
    }
    if Compression::of(&content.start).is_some() {
        return Err(of_part("is compressed twice: unpack it once".to_owned()));
    }
    RowReader::of(source, asked).map_err(of_part)
}

/// The rows of several files, numbered through.
struct Parts {
    /// The files that are still to be read, the next one last.
    left: Vec<Source>,
    asked: Option<Format>,
    current: Option<(Source, RowReader)>,
    number: u64,
}

impl Iterator for Parts {
    type Item = RawRow;

    fn next(&mut self) -> Option<RawRow> {
        loop {
            let (source, rows) = self.current.as_mut()?;
            if let Some(row) = rows.next() {
                self.number += 1;
                let number = self.number;
                return Some(match row {
                    RawRow::Value(_, bytes) => RawRow::Value(number, bytes),
                    RawRow::Parsed(_, row) => RawRow::Parsed(number, row),
                    RawRow::Unreadable(at, reason) => RawRow::Unreadable(
                        number,
                        format!("{} {at} of `{}`: {reason}", rows.unit(), source.name()),
                    ),
                });
            }
            self.current = None;
            let next = self.left.pop()?;
            match open_part(&next, self.asked) {
                Ok(rows) => self.current = Some((next, rows)),
                Err(reason) => {
                    self.left.clear();
                    self.number += 1;
                    return Some(RawRow::Unreadable(self.number, reason));
                }
            }
        }
    }
}
