//! The state of a trainer between two steps: trainable weights and optimizer moments, in memory and on disk.
//!
//! On disk the weights are what other programs load (a PEFT adapter, or a Hugging Face model) and `optimizer.safetensors`
//! holds the rest (as many moments as the optimizer keeps; those of 8 bits with the largest magnitude of each block beside
//! them), so that reading gives back every bit.

use std::path::Path;
use std::sync::Arc;

use half::bf16;
use half::slice::HalfFloatSliceExt;
use serde_json::Value;

use super::FileError;
use super::adapter::{ADAPTER_WEIGHTS, AdapterConfig};
use super::flat::Flat;
use super::flat_weights::FlatWeights;
use super::layout::{Layout, TensorLayout, as_bytes, weights_digest};
use super::model::{MAX_SHARD_BYTES, ModelFolder, ModelTensor, Scalars, WeightFiles, write_model};
use super::moments::{BlocksMut, Moment, MomentPart, MomentPartMut};
use super::sink::Sink;
use super::tensors::{self, Dtype, TensorFile};
use crate::job::{BaseDtype, InitWeights, MomentDtype};

pub const OPTIMIZER: &str = "optimizer.safetensors";

/// Names of the moments on disk, in order: those of AdamW's. Where an optimizer keeps one, it is the first.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// Names of the blocks' largest magnitudes on disk, for each of the [`MOMENTS`].
const ABSMAX: [&str; 2] = ["exp_avg_absmax", "exp_avg_sq_absmax"];

/// Key of the metadata that says what moments are kept in, where it is not float32; and what it says.
const DTYPE_KEY: &str = "moments";
const EIGHT_BITS: &str = "8bit";

/// Most bytes of a state per trainable scalar: a float32 weight and two float32 moments.
pub const MAX_STATE_BYTES_PER_SCALAR: usize = (1 + MOMENTS.len()) * size_of::<f32>();

/// Everything that a trainer needs to go on, but job, data and base model.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Number of optimizer updates that it has seen.
    pub step: u64,
    pub layout: Arc<Layout>,
    /// Trainable weights, flat in the order of the layout.
    pub weights: FlatWeights,
    /// As the layout says.
    pub moments: Vec<Moment>,
}

/// Format of the weights on disk.
#[derive(Clone, Debug)]
pub enum WeightsFormat {
    /// A PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`.
    Adapter(AdapterConfig),
    /// A whole model: `config.json` and `model.safetensors`, or shards. In bfloat16 weights that are trained in float32 are kept
    /// beside the moments.
    Model {
        /// The base model's `config.json`.
        config: Value,
        dtype: Dtype,
        /// What training leaves as it is, and goes into the model, too. None: nothing is.
        frozen: Option<Frozen>,
    },
}

/// Tensors of the base model that training leaves as they are.
#[derive(Clone, Debug)]
pub struct Frozen {
    /// What they are read from. Without files, where all weights are drawn, each of them is one: what is never trained begins so.
    pub files: Option<Arc<WeightFiles>>,
    /// Their names and shapes.
    pub tensors: Vec<(String, Vec<usize>)>,
}

impl Snapshot {
    pub fn weights_digest(&self) -> String {
        self.weights.digest(&self.layout)
    }

    /// BLAKE3 over the number of updates and the digests of the moments, hex.
    pub fn optimizer_digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.step.to_le_bytes());
        for moment in &self.moments {
            match moment {
                Moment::Float32(flat) => {
                    let digest = weights_digest(&self.layout, self.layout.split(flat));
                    hasher.update(digest.as_bytes());
                }
                Moment::EightBits(_) => {
                    for buffer in moment.buffers() {
                        hasher.update_rayon(buffer);
                    }
                }
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The bytes of all buffers: the weights, then those of each moment.
    pub fn buffers(&self) -> Vec<&[u8]> {
        let mut buffers = vec![self.weights.as_bytes()];
        buffers.extend(self.moments.iter().flat_map(Moment::buffers));
        buffers
    }

    /// The [`buffers`](Self::buffers), open for changes.
    pub fn buffers_mut(&mut self) -> Vec<&mut [u8]> {
        let mut buffers: Vec<&mut [u8]> = vec![self.weights.as_bytes_mut()];
        buffers.extend(self.moments.iter_mut().flat_map(Moment::buffers_mut));
        buffers
    }

    /// Writes weights and optimizer state.
    pub fn write_files(
        &self,
        mut sink: impl Sink,
        format: &WeightsFormat,
    ) -> Result<(), FileError> {
        self.write_weights(&mut sink, format)?;
        let rounds = matches!(format, WeightsFormat::Model { dtype, .. } if *dtype != Dtype::F32);
        let keep_weights = rounds && self.weights.dtype() == BaseDtype::Float32;
        let moments = self.moments.iter().zip(MOMENTS.into_iter().zip(ABSMAX));
        let mut listed: Vec<Listed> = moments
            .flat_map(|(moment, names)| list(&self.layout, moment, names))
            .collect();
        if keep_weights {
            listed.extend(self.list_weights("weights."));
        }
        let (step, layout) = (self.step.to_string(), self.layout.digest());
        let mut metadata = vec![("step", step.as_str()), ("layout_digest", layout.as_str())];
        if self.layout.moments.dtype == MomentDtype::EightBits {
            metadata.push((DTYPE_KEY, EIGHT_BITS));
        }
        tensors::write(&mut sink, OPTIMIZER, listed, &metadata)
    }

    /// Writes only the weights, as other programs load them.
    pub fn write_weights(
        &self,
        mut sink: impl Sink,
        format: &WeightsFormat,
    ) -> Result<(), FileError> {
        match format {
            WeightsFormat::Adapter(config) => {
                tensors::write(&mut sink, ADAPTER_WEIGHTS, self.list_weights(""), &[])?;
                config.write(sink)
            }
            WeightsFormat::Model {
                config,
                dtype,
                frozen,
            } => {
                let scalars: Vec<Scalars> = match &self.weights {
                    FlatWeights::Float32(flat) => {
                        self.layout.split(flat).map(Scalars::Here).collect()
                    }
                    FlatWeights::Bfloat16(flat) => {
                        self.layout.split(flat).map(Scalars::Narrow).collect()
                    }
                };
                let trained = self.layout.tensors.iter().zip(scalars);
                let trained = trained.map(|(tensor, scalars)| ModelTensor {
                    name: &tensor.name,
                    shape: &tensor.shape,
                    scalars,
                });
                let scalars = |(_, shape): &(String, Vec<usize>)| shape.iter().product::<usize>();
                let tensors = frozen.iter().flat_map(|frozen| &frozen.tensors);
                let ones = vec![1.0; tensors.map(scalars).max().unwrap_or(0)];
                let frozen = frozen.iter().flat_map(|frozen| {
                    let tensors = frozen.tensors.iter();
                    tensors.map(|tensor| ModelTensor {
                        name: &tensor.0,
                        shape: &tensor.1,
                        scalars: match &frozen.files {
                            Some(files) => Scalars::In(files),
                            None => Scalars::Here(&ones[..scalars(tensor)]),
                        },
                    })
                });
                let mut listed: Vec<ModelTensor> = trained.chain(frozen).collect();
                listed.sort_by_key(|tensor| tensor.name);
                write_model(sink, config, &listed, *dtype, MAX_SHARD_BYTES)
            }
        }
    }

    /// Reads a snapshot that [`write_files`](Self::write_files) wrote, for this layout.
    pub fn read_files(dir: &Path, layout: &Arc<Layout>) -> Result<Self, FileError> {
        let path = dir.join(OPTIMIZER);
        let optimizer = TensorFile::open(&path)?;
        if optimizer.metadata("layout_digest") != Some(layout.digest().as_str()) {
            let is_8bit = optimizer.metadata(DTYPE_KEY) == Some(EIGHT_BITS);
            let (found, wanted) = match (is_8bit, layout.moments.dtype) {
                (true, MomentDtype::Float32) => ("moments of 8 bits", "float32"),
                (false, MomentDtype::EightBits) => ("float32 moments", "8 bits"),
                _ => {
                    let reason = "was saved for other trainable tensors, or another optimizer, than the job's";
                    return Err(FileError::malformed(&path, reason));
                }
            };
            let reason = format!(
                "has {found}, and the job's optimizer keeps {wanted}: name the one that it was saved by ({})",
                saved_by(&optimizer, is_8bit)
            );
            return Err(FileError::malformed(&path, reason));
        }
        let step = optimizer
            .metadata("step")
            .and_then(|step| step.parse().ok())
            .ok_or_else(|| FileError::malformed(&path, "does not say which step it is of"))?;
        let files = [optimizer];
        let kept = layout
            .tensors
            .first()
            .is_some_and(|tensor| files[0].get(&format!("weights.{}", tensor.name)).is_some());
        let weights = match (kept, layout.weights) {
            (true, _) => read_flat(&files, "weights.", layout)?.into(),
            (false, BaseDtype::Float32) => read_weights(dir, layout)?.into(),
            (false, BaseDtype::Bfloat16) => {
                FlatWeights::Bfloat16(read_bf16(&open_weights(dir)?, layout)?.into())
            }
        };
        let names = MOMENTS.into_iter().zip(ABSMAX).take(layout.moments.count);
        let moments = names
            .map(|names| match layout.moments.dtype {
                MomentDtype::Float32 => {
                    Ok(Flat::from(read_flat(&files, &format!("{}.", names.0), layout)?).into())
                }
                MomentDtype::EightBits => read_8bit(&files[0], names, layout),
            })
            .collect::<Result<_, FileError>>()?;
        Ok(Self {
            step,
            weights,
            moments,
            layout: layout.clone(),
        })
    }

    /// What stands on disk of the weights, under their names behind this one.
    fn list_weights<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = Listed<'a>> {
        let (dtype, bytes) = match self.weights.dtype() {
            BaseDtype::Float32 => (Dtype::F32, size_of::<f32>()),
            BaseDtype::Bfloat16 => (Dtype::BF16, size_of::<bf16>()),
        };
        let all = self.weights.as_bytes();
        self.layout.tensors.iter().map(move |tensor| {
            let scalars = &all[tensor.offset * bytes..][..tensor.scalars() * bytes];
            let name = format!("{prefix}{}", tensor.name);
            (name, dtype, tensor.shape.clone(), scalars)
        })
    }
}

/// The optimizers that keep as many moments, of as many bits, as the file has.
fn saved_by(file: &TensorFile, is_8bit: bool) -> &'static str {
    let has = |moment: &str| {
        let mut names = file.names();
        names.any(|name| {
            name.strip_prefix(moment)
                .is_some_and(|rest| rest.starts_with('.'))
        })
    };
    match (MOMENTS.map(has), is_8bit) {
        ([_, true], true) => "adamw_8bit",
        ([_, true], false) => "adamw or muon",
        ([true, false], true) => "lion_8bit",
        ([true, false], false) => "lion, or sgd with a momentum",
        ([false, false], _) => "sgd",
    }
}

/// Name, type, shape and bytes of a tensor on disk.
type Listed<'a> = (String, Dtype, Vec<usize>, &'a [u8]);

/// What stands on disk of a moment. `name` is that of the moment, `absmax` that of its blocks' largest magnitudes.
fn list<'a>(
    layout: &'a Layout,
    moment: &'a Moment,
    (name, absmax_name): (&str, &str),
) -> Vec<Listed<'a>> {
    let mut listed = Vec::new();
    for (tensor, part) in layout.tensors.iter().zip(moment.parts(layout)) {
        let shape = tensor.shape.clone();
        let name = format!("{name}.{}", tensor.name);
        match part {
            MomentPart::Float32(scalars) => {
                listed.push((name, Dtype::F32, shape, as_bytes(scalars)));
            }
            MomentPart::EightBits { codes, absmax } => {
                let absmax_name = format!("{absmax_name}.{}", tensor.name);
                listed.push((name, Dtype::U8, shape, codes));
                listed.push((
                    absmax_name,
                    Dtype::F32,
                    vec![absmax.len()],
                    as_bytes(absmax),
                ));
            }
        }
    }
    listed
}

/// Reads a moment in 8 bits.
fn read_8bit(
    file: &TensorFile,
    (name, absmax_name): (&str, &str),
    layout: &Layout,
) -> Result<Moment, FileError> {
    let malformed = |name: &str, reason: &str| {
        FileError::malformed(file.path(), format!("tensor {name} {reason}"))
    };
    // Before memory is taken for what the file may not have.
    for tensor in &layout.tensors {
        file.expect(&format!("{name}.{}", tensor.name), &tensor.shape)?;
    }
    let mut moment = Moment::zeros(layout);
    for (tensor, part) in layout.tensors.iter().zip(moment.parts_mut(layout)) {
        let name = format!("{name}.{}", tensor.name);
        match part {
            MomentPartMut::Float32(scalars) => file.read_f32(&name, &tensor.shape, scalars)?,
            MomentPartMut::EightBits(BlocksMut { codes, absmax }) => {
                let view = file.expect(&name, &tensor.shape)?;
                if view.dtype != Dtype::U8 {
                    return Err(malformed(&name, "is not of 8 bits"));
                }
                codes.copy_from_slice(view.bytes);
                let name = format!("{absmax_name}.{}", tensor.name);
                file.read_f32(&name, &[absmax.len()], absmax)?;
                if !absmax.iter().all(|most| *most >= 0.0) {
                    return Err(malformed(&name, "has a magnitude that is no number from 0"));
                }
            }
        }
    }
    Ok(moment)
}

/// The trainable weights of an adapter or model folder, flat: float32, whatever their type on disk.
pub fn read_weights(dir: &Path, layout: &Layout) -> Result<Vec<f32>, FileError> {
    read_flat(&open_weights(dir)?, "", layout)
}

/// The weight files of an adapter or model folder.
fn open_weights(dir: &Path) -> Result<Vec<TensorFile>, FileError> {
    let adapter = dir.join(ADAPTER_WEIGHTS);
    if adapter.is_file() {
        return Ok(vec![TensorFile::open(&adapter)?]);
    }
    let folder = ModelFolder::open(dir, InitWeights::Pretrained)?;
    let files = folder.weight_files();
    files.iter().map(|path| TensorFile::open(path)).collect()
}

fn read_flat(files: &[TensorFile], prefix: &str, layout: &Layout) -> Result<Vec<f32>, FileError> {
    let found = find_all(files, prefix, layout)?;
    let mut flat = vec![0.0; layout.scalars];
    let mut rest = flat.as_mut_slice();
    for (tensor, (file, name)) in layout.tensors.iter().zip(found) {
        let (out, behind) = rest.split_at_mut(tensor.scalars());
        rest = behind;
        file.read_f32(&name, &tensor.shape, out)?;
    }
    Ok(flat)
}

/// Reads weights that are trained in bfloat16: those of files that hold them so lose nothing.
fn read_bf16(files: &[TensorFile], layout: &Layout) -> Result<Vec<bf16>, FileError> {
    let found = find_all(files, "", layout)?;
    let mut flat = vec![bf16::ZERO; layout.scalars];
    for (tensor, (file, name)) in layout.tensors.iter().zip(found) {
        let mut wide = vec![0.0; tensor.scalars()];
        file.read_f32(&name, &tensor.shape, &mut wide)?;
        flat[tensor.offset..][..wide.len()].convert_from_f32_slice(&wide);
    }
    Ok(flat)
}

/// The file that holds each tensor of the layout, and its name there, before memory is taken for what a file may not have.
fn find_all<'a>(
    files: &'a [TensorFile],
    prefix: &str,
    layout: &Layout,
) -> Result<Vec<(&'a TensorFile, String)>, FileError> {
    let found = layout.tensors.iter().map(|tensor: &TensorLayout| {
        let name = format!("{prefix}{}", tensor.name);
        // The first file reports a tensor that none has.
        let holding = files.iter().find(|file| file.get(&name).is_some());
        let file = holding.unwrap_or(&files[0]);
        file.expect(&name, &tensor.shape)?;
        Ok((file, name))
    });
    found.collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests;
