//! Whole models, written: `config.json`, and weights in one file or in shards with their index.

use std::io::{self, Write};

use half::bf16;
use half::slice::HalfFloatSliceExt;
use serde_json::Value;

use crate::files::FileError;
use crate::files::json::json_text;
use crate::files::layout::as_bytes;
use crate::files::model::WeightFiles;
use crate::files::names::{CONFIG, INDEX, SINGLE};
use crate::files::sink::Sink;
use crate::files::tensors::{Dtype, TensorSpec, write_streaming};

/// Largest weights file we write, as Transformers does by default.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Scalars of another model's tensor that are in memory at once.
const PART_SCALARS: usize = 1 << 20;

/// A tensor of a model to be written.
pub struct ModelTensor<'a> {
    pub name: &'a str,
    pub shape: &'a [usize],
    pub scalars: Scalars<'a>,
}

/// Where the scalars of a tensor are that is written.
#[derive(Clone, Copy)]
pub enum Scalars<'a> {
    /// In memory, in float32.
    Here(&'a [f32]),
    /// In memory, in bfloat16.
    Narrow(&'a [bf16]),
    /// In the files of another model, under the same name.
    In(&'a WeightFiles),
}

impl ModelTensor<'_> {
    fn scalar_count(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64
    }
}

/// Writes `config.json` (with the right type named) and the weights as `dtype`: one file, or shards of at most
/// `max_shard_bytes` and their index.
pub fn write_model(
    mut sink: impl Sink,
    config: &Value,
    tensors: &[ModelTensor],
    dtype: Dtype,
    max_shard_bytes: u64,
) -> Result<(), FileError> {
    let scalar_bytes = (dtype.bitsize() / 8) as u64;
    let bytes = |tensor: &ModelTensor| tensor.scalar_count() * scalar_bytes;
    let mut shards: Vec<&[ModelTensor]> = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (end, tensor) in tensors.iter().enumerate() {
        if end > start && size + bytes(tensor) > max_shard_bytes {
            shards.push(&tensors[start..end]);
            (start, size) = (end, 0);
        }
        size += bytes(tensor);
    }
    shards.push(&tensors[start..]);
    if let [all] = shards[..] {
        write_shard(&mut sink, SINGLE, all, dtype)?;
    } else {
        let mut weight_map = serde_json::Map::new();
        for (number, shard) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
            write_shard(&mut sink, &name, shard, dtype)?;
            for tensor in *shard {
                weight_map.insert(tensor.name.to_owned(), name.clone().into());
            }
        }
        let total: u64 = tensors.iter().map(bytes).sum();
        let scalars: u64 = tensors.iter().map(ModelTensor::scalar_count).sum();
        let index = serde_json::json!({
            "metadata": {"total_parameters": scalars, "total_size": total},
            "weight_map": weight_map,
        });
        sink.small_file(INDEX, &json_text(INDEX, &index)?)?;
    }
    let mut config = config.clone();
    // Transformers reads `dtype` since version 4.56 and `torch_dtype` before; everybody reads one of them.
    for key in ["dtype", "torch_dtype"] {
        config[key] = dtype_name(dtype).into();
    }
    sink.small_file(CONFIG, &json_text(CONFIG, &config)?)
}

fn write_shard(
    sink: &mut dyn Sink,
    name: &str,
    tensors: &[ModelTensor],
    dtype: Dtype,
) -> Result<(), FileError> {
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|tensor| TensorSpec {
            name: tensor.name.to_owned(),
            dtype,
            shape: tensor.shape.to_vec(),
        })
        .collect();
    write_streaming(sink, name, &specs, &[], |index, out| {
        let tensor = &tensors[index];
        match tensor.scalars {
            Scalars::Here(scalars) => write_scalars(scalars, dtype, out),
            Scalars::Narrow(scalars) if dtype == Dtype::BF16 => {
                out.write_all(bytemuck::cast_slice(scalars))
            }
            Scalars::Narrow(scalars) => {
                let mut parts = scalars.chunks(PART_SCALARS);
                parts.try_for_each(|part| write_scalars(&part.to_f32_vec(), dtype, out))
            }
            Scalars::In(files) => copy_scalars(tensor, files, dtype, out),
        }
    })
}

/// Writes the scalars of a tensor that files hold, a part at a time.
fn copy_scalars(
    tensor: &ModelTensor,
    files: &WeightFiles,
    dtype: Dtype,
    out: &mut dyn Write,
) -> io::Result<()> {
    let scalars = tensor.shape.iter().product();
    let mut part = vec![0.0f32; PART_SCALARS.min(scalars)];
    for first in (0..scalars).step_by(PART_SCALARS) {
        let part = &mut part[..PART_SCALARS.min(scalars - first)];
        let read = files.read_part(tensor.name, tensor.shape, first, part);
        read.map_err(io::Error::other)?;
        write_scalars(part, dtype, out)?;
    }
    Ok(())
}

fn write_scalars(scalars: &[f32], dtype: Dtype, out: &mut dyn Write) -> io::Result<()> {
    match dtype {
        Dtype::F32 => out.write_all(as_bytes(scalars)),
        Dtype::BF16 => {
            let mut buffer = Vec::with_capacity(1 << 16);
            for chunk in scalars.chunks(1 << 15) {
                buffer.clear();
                buffer.extend(chunk.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()));
                out.write_all(&buffer)?;
            }
            Ok(())
        }
        other => Err(io::Error::other(format!(
            "models are not written as {other:?}"
        ))),
    }
}

/// Name of a type in `config.json`.
fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}
