//! Safetensors files, written as a stream. In: names, types and shapes, then the bytes of one tensor after the other.
//! Out: a file for a [`Sink`].

use std::io::{self, Write};
use std::path::Path;

use super::header::METADATA;
use super::{Dtype, byte_len};
use crate::files::FileError;
use crate::files::sink::Sink;

/// Name, type and shape of a tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

/// Writes a safetensors file of tensors that are in memory. `metadata` beside `{"format": "pt"}`, which every reader of
/// Hugging Face's wants.
pub fn write<'a>(
    sink: impl Sink,
    file: &str,
    tensors: impl IntoIterator<Item = (String, Dtype, Vec<usize>, &'a [u8])>,
    metadata: &[(&str, &str)],
) -> Result<(), FileError> {
    let (specs, bytes): (Vec<_>, Vec<_>) = tensors
        .into_iter()
        .map(|(name, dtype, shape, bytes)| (TensorSpec { name, dtype, shape }, bytes))
        .unzip();
    write_streaming(sink, file, &specs, metadata, |index, out| {
        out.write_all(bytes[index])
    })
}

/// Writes a safetensors file, asking `fill` for the bytes of one tensor after the other.
pub fn write_streaming(
    mut sink: impl Sink,
    file: &str,
    specs: &[TensorSpec],
    metadata: &[(&str, &str)],
    mut fill: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<(), FileError> {
    let (header, sizes) = encode_header(Path::new(file), specs, metadata)?;
    let size = 8 + header.len() as u64 + sizes.iter().sum::<u64>();
    sink.file(file, size, &mut |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (index, size) in sizes.iter().enumerate() {
            let mut tensor = Counting { out, written: 0 };
            fill(index, &mut tensor)?;
            if tensor.written != *size {
                let name = &specs[index].name;
                return Err(io::Error::other(format!(
                    "tensor {name} was given {} bytes where its shape needs {size}",
                    tensor.written
                )));
            }
        }
        Ok(())
    })
}

struct Counting<'a> {
    out: &'a mut dyn Write,
    written: u64,
}

impl Write for Counting<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The JSON header, padded so that tensor data is aligned to 8 bytes, and each tensor's bytes.
fn encode_header(
    path: &Path,
    specs: &[TensorSpec],
    metadata: &[(&str, &str)],
) -> Result<(Vec<u8>, Vec<u64>), FileError> {
    let mut table = serde_json::Map::new();
    let mut extra = serde_json::Map::from_iter([("format".to_owned(), "pt".into())]);
    for (key, value) in metadata {
        extra.insert((*key).to_owned(), (*value).into());
    }
    table.insert(METADATA.to_owned(), extra.into());
    let mut sizes = Vec::with_capacity(specs.len());
    let mut offset = 0u64;
    for spec in specs {
        let size = byte_len(spec.dtype, &spec.shape)
            .ok_or_else(|| FileError::malformed(path, format!("tensor {} is odd", spec.name)))?;
        let entry = serde_json::json!({
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": [offset, offset + size],
        });
        table.insert(spec.name.clone(), entry);
        sizes.push(size);
        offset += size;
    }
    let mut header = serde_json::Value::Object(table).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok((header, sizes))
}
