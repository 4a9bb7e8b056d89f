//! Rows of an Arrow file: the stream that `datasets` saves, or the file that Feather is.
//!
//! Enters: bytes. Leaves: their rows, a record batch in memory at a time; how many rows that has, its writer decided (`datasets`: 1000).

use std::io::BufReader;

use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::ArrowError;

use super::columns::{ColumnRows, damaged};
use super::content::Content;
use super::row::Rows;
use super::source::Source;

/// The rows of a stream or a file.
pub fn rows(source: &Source, content: Content) -> Result<Rows, String> {
    let damaged = |error: ArrowError| damaged("Arrow", &error);
    if !content.start.starts_with(b"ARROW1") {
        let reader = StreamReader::try_new(content.reader, None).map_err(damaged)?;
        let schema = reader.schema();
        return Ok(Box::new(ColumnRows::new(reader, &schema, "Arrow")?));
    }
    let file = match (content.compression, source.whole()?) {
        (None, Some(file)) => file,
        _ => {
            return Err(
                "is an Arrow file within something else, where it is not read: unpack it"
                    .to_owned(),
            );
        }
    };
    let reader = FileReader::try_new(BufReader::new(file), None).map_err(damaged)?;
    let schema = reader.schema();
    Ok(Box::new(ColumnRows::new(reader, &schema, "Arrow")?))
}
