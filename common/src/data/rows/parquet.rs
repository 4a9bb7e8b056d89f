//! Rows of a Parquet file.
//!
//! Enters: a file. Leaves: its rows, a batch of them in memory at a time, whatever the size of its row groups.

use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder};

use super::columns::{ColumnRows, damaged};
use super::content::Content;
use super::row::Rows;
use super::source::Source;

/// Bytes that a batch has on average.
const BATCH_BYTES: u64 = 4 << 20;

/// Most rows of a batch.
const MAX_BATCH_ROWS: u64 = 256;

/// The rows of a file, which must be seekable: its index is at its end.
pub fn rows(source: &Source, content: &Content) -> Result<Rows, String> {
    if let Some(compression) = content.compression {
        return Err(format!(
            "is a Parquet file that is compressed with {} once more: unpack it",
            compression.name()
        ));
    }
    let Some(file) = source.whole()? else {
        return Err("is a Parquet file in an archive, where it is not read: unpack it".to_owned());
    };
    let damaged = |error: parquet::errors::ParquetError| damaged("Parquet", &error);
    let options = ArrowReaderOptions::new();
    let builder =
        ParquetRecordBatchReaderBuilder::try_new_with_options(file, options).map_err(damaged)?;
    let groups = builder.metadata().row_groups();
    // Pages are read one by one, so that only the rows of a batch count; those of the largest group decide.
    let row_bytes = groups.iter().map(|group| {
        let bytes = u64::try_from(group.total_byte_size()).unwrap_or_default();
        bytes / u64::try_from(group.num_rows()).unwrap_or_default().max(1)
    });
    let row_bytes = row_bytes.max().unwrap_or_default().max(1);
    let batch = (BATCH_BYTES / row_bytes).clamp(1, MAX_BATCH_ROWS);
    let schema = builder.schema().clone();
    let reader = builder
        .with_batch_size(batch as usize)
        .build()
        .map_err(damaged)?;
    Ok(Box::new(ColumnRows::new(reader, &schema, "Parquet")?))
}
