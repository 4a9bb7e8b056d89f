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
    let bytes = file.metadata().map_or(0, |metadata| metadata.len());
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
    let rows = groups.iter().map(|group| group.num_rows());
    let total = u64::try_from(rows.sum::<i64>()).unwrap_or_default();
    let batch = (BATCH_BYTES / row_bytes).clamp(1, MAX_BATCH_ROWS);
    let schema = builder.schema().clone();
    let reader = builder
        .with_batch_size(batch as usize)
        .build()
        .map_err(damaged)?;
    // Its pages are packed, and read from all over the file: the share of the rows says how far it is read.
    let (packed, mut seen) = (source.packed().clone(), 0);
    let counted = reader.inspect(move |batch| {
        seen += batch.as_ref().map_or(0, |batch| batch.num_rows() as u64);
        let read = u128::from(bytes) * u128::from(seen) / u128::from(total.max(1));
        packed.set(u64::try_from(read).unwrap_or(bytes));
    });
    Ok(Box::new(ColumnRows::new(counted, &schema, "Parquet")?))
}
