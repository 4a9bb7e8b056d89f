//! The state of a trainer between two steps: trainable weights and optimizer moments, in memory and on disk.
//!
//! On disk the weights are what other programs load (a PEFT adapter, or a Hugging Face model) and `optimizer.safetensors`
//! holds the rest (as many moments as the optimizer keeps), so that reading gives back every bit.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::FileError;
use super::adapter::{ADAPTER_WEIGHTS, AdapterConfig};
use super::flat::Flat;
use super::layout::{Layout, TensorLayout, as_bytes, weights_digest};
use super::model::{MAX_SHARD_BYTES, ModelFolder, ModelTensor, write_model};
use super::sink::Sink;
use super::tensors::{self, Dtype, TensorFile};
use crate::job::InitWeights;

pub const OPTIMIZER: &str = "optimizer.safetensors";

/// Names of the moments on disk, in order: those of AdamW's. Where an optimizer keeps one, it is the first.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// Most bytes of a state per trainable scalar: a float32 weight and two float32 moments.
pub const MAX_STATE_BYTES_PER_SCALAR: usize = (1 + MOMENTS.len()) * size_of::<f32>();

/// Everything that a trainer needs to go on, but job, data and base model.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Number of optimizer updates that it has seen.
    pub step: u64,
    pub layout: Arc<Layout>,
    /// Trainable weights, flat in the order of the layout, as are the moments.
    pub weights: Flat,
    /// As many as the layout says.
    pub moments: Vec<Flat>,
}

/// Format of the weights on disk.
#[derive(Clone, Debug)]
pub enum WeightsFormat {
    /// A PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`.
    Adapter(AdapterConfig),
    /// A whole model: `config.json` and `model.safetensors`, or shards. In bfloat16 the float32 weights are kept beside the
    /// moments.
    Model {
        /// The base model's `config.json`.
        config: Value,
        dtype: Dtype,
    },
}

impl Snapshot {
    pub fn weights_digest(&self) -> String {
        weights_digest(&self.layout, self.layout.split(&self.weights))
    }

    /// BLAKE3 over the number of updates and the digests of the moments, hex.
    pub fn optimizer_digest(&self) -> String {
        let digest = |flat| weights_digest(&self.layout, self.layout.split(flat));
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.step.to_le_bytes());
        for moment in &self.moments {
            hasher.update(digest(moment).as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Writes weights and optimizer state.
    pub fn write_files(
        &self,
        mut sink: impl Sink,
        format: &WeightsFormat,
    ) -> Result<(), FileError> {
        self.write_weights(&mut sink, format)?;
        let keep_weights =
            matches!(format, WeightsFormat::Model { dtype, .. } if *dtype != Dtype::F32);
        let mut buffers: Vec<_> = MOMENTS.into_iter().zip(&self.moments).collect();
        if keep_weights {
            buffers.push(("weights", &self.weights));
        }
        let listed = buffers.into_iter().flat_map(|(kind, flat)| {
            self.named(flat).map(move |(name, shape, scalars)| {
                let name = format!("{kind}.{name}");
                (name, Dtype::F32, shape.to_vec(), as_bytes(scalars))
            })
        });
        let (step, layout) = (self.step.to_string(), self.layout.digest());
        let metadata = [("step", step.as_str()), ("layout_digest", layout.as_str())];
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
                let listed = self.named(&self.weights).map(|(name, shape, scalars)| {
                    let name = name.to_owned();
                    (name, Dtype::F32, shape.to_vec(), as_bytes(scalars))
                });
                tensors::write(&mut sink, ADAPTER_WEIGHTS, listed, &[])?;
                config.write(sink)
            }
            WeightsFormat::Model { config, dtype } => {
                let listed: Vec<ModelTensor> = self
                    .named(&self.weights)
                    .map(|(name, shape, scalars)| ModelTensor {
                        name,
                        shape,
                        scalars,
                    })
                    .collect();
                write_model(sink, config, &listed, *dtype, MAX_SHARD_BYTES)
            }
        }
    }

    /// Reads a snapshot that [`write_files`](Self::write_files) wrote, for this layout.
    pub fn read_files(dir: &Path, layout: &Arc<Layout>) -> Result<Self, FileError> {
        let path = dir.join(OPTIMIZER);
        let optimizer = TensorFile::open(&path)?;
        if optimizer.metadata("layout_digest") != Some(layout.digest().as_str()) {
            let reason =
                "was saved for other trainable tensors, or another optimizer, than the job's";
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
        let weights = if kept {
            read_flat(&files, "weights.", layout)?
        } else {
            read_weights(dir, layout)?
        };
        let names = MOMENTS.into_iter().take(layout.moments);
        let moments = names
            .map(|name| Ok(read_flat(&files, &format!("{name}."), layout)?.into()))
            .collect::<Result<_, FileError>>()?;
        Ok(Self {
            step,
            weights: weights.into(),
            moments,
            layout: layout.clone(),
        })
    }

    fn named<'a>(
        &'a self,
        flat: &'a [f32],
    ) -> impl Iterator<Item = (&'a str, &'a [usize], &'a [f32])> {
        self.layout
            .tensors
            .iter()
            .zip(self.layout.split(flat))
            .map(|(tensor, scalars)| (tensor.name.as_str(), tensor.shape.as_slice(), scalars))
    }
}

/// The trainable weights of an adapter or model folder, flat: float32, whatever their type on disk.
pub fn read_weights(dir: &Path, layout: &Layout) -> Result<Vec<f32>, FileError> {
    let adapter = dir.join(ADAPTER_WEIGHTS);
    let files = if adapter.is_file() {
        vec![TensorFile::open(&adapter)?]
    } else {
        ModelFolder::open(dir, InitWeights::Pretrained)?
            .weight_files()
            .iter()
            .map(|path| TensorFile::open(path))
            .collect::<Result<_, _>>()?
    };
    read_flat(&files, "", layout)
}

fn read_flat(files: &[TensorFile], prefix: &str, layout: &Layout) -> Result<Vec<f32>, FileError> {
    // The first file reports a tensor that none has.
    let file = |name: &str| {
        let file = files.iter().find(|file| file.get(name).is_some());
        file.unwrap_or(&files[0])
    };
    let name = |tensor: &TensorLayout| format!("{prefix}{}", tensor.name);
    for tensor in &layout.tensors {
        // Before memory is taken for what a file may not have.
        let name = name(tensor);
        file(&name).expect(&name, &tensor.shape)?;
    }
    let mut flat = vec![0.0; layout.scalars];
    let mut rest = flat.as_mut_slice();
    for tensor in &layout.tensors {
        let (out, behind) = rest.split_at_mut(tensor.scalars());
        rest = behind;
        let name = name(tensor);
        file(&name).read_f32(&name, &tensor.shape, out)?;
    }
    Ok(flat)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;

    pub fn snapshot() -> Snapshot {
        let layout = Arc::new(Layout::new([
            ("model.b.weight".into(), vec![2, 3]),
            ("model.a.weight".into(), vec![4]),
        ]));
        let flat = |seed: f32| (0..10).map(|i| seed + i as f32 / 7.0).collect();
        Snapshot {
            step: 12,
            layout,
            weights: flat(1.0),
            moments: vec![flat(-2.0), flat(0.5)],
        }
    }

    pub fn adapter() -> WeightsFormat {
        WeightsFormat::Adapter(AdapterConfig {
            base_model_name_or_path: None,
            revision: None,
            r: 2,
            lora_alpha: 4.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: vec!["q_proj".into()],
            shape: Default::default(),
            tokens: Default::default(),
        })
    }

    fn model(dtype: Dtype) -> WeightsFormat {
        let config = serde_json::json!({"architectures": ["LlamaForCausalLM"]});
        WeightsFormat::Model { config, dtype }
    }

    #[test]
    fn every_bit_comes_back_from_disk() {
        for format in [adapter(), model(Dtype::F32), model(Dtype::BF16)] {
            let folder = tempfile::tempdir().unwrap();
            let written = snapshot();
            written.write_files(folder.path(), &format).unwrap();
            let read = Snapshot::read_files(folder.path(), &written.layout).unwrap();
            assert_eq!(read, written);
            assert_eq!(read.weights_digest(), written.weights_digest());
        }
    }

    #[test]
    fn as_many_moments_as_the_layout_says_are_written_and_read() {
        for (moments, format) in [(0, adapter()), (1, adapter()), (1, model(Dtype::BF16))] {
            let folder = tempfile::tempdir().unwrap();
            let mut written = snapshot();
            written.moments.truncate(moments);
            written.layout = Arc::new((*written.layout).clone().with_moments(moments));
            written.write_files(folder.path(), &format).unwrap();
            let read = Snapshot::read_files(folder.path(), &written.layout).unwrap();
            assert_eq!(read, written);
            Snapshot::read_files(folder.path(), &snapshot().layout).unwrap_err();
        }
    }

    #[test]
    fn another_layout_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        snapshot().write_files(folder.path(), &adapter()).unwrap();
        let other = Arc::new(Layout::new([("model.a.weight".into(), vec![4])]));
        let message = Snapshot::read_files(folder.path(), &other)
            .unwrap_err()
            .to_string();
        assert!(message.contains("other trainable tensors"), "{message}");
    }

    #[test]
    fn a_weight_that_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        snapshot().write_weights(folder.path(), &adapter()).unwrap();
        let other = Layout::new([("model.c.weight".into(), vec![4])]);
        let message = read_weights(folder.path(), &other).unwrap_err().to_string();
        assert!(message.contains("model.c.weight"), "{message}");
    }
}
