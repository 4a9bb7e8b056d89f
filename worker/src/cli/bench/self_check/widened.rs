//! A model whose weights are what 4 bits leave of random ones. In: a job that draws weights. Out: a folder of what the same job would
//! have in 4 bits, widened, for a job that knows nothing of these.

use std::path::Path;
use std::sync::Arc;

use common::files::model::{ModelFolder, ModelTensor, Scalars, WeightFiles, write_model};
use common::files::snapshot::WeightsFormat;
use common::files::tensors::Dtype;
use common::job::{BaseDtype, InitWeights, JobSpec};
use common::model::{ModelConfig, base_tensors, is_norm_or_bias, is_router};
use common::nf4::Nf4;
use half::bf16;
use worker::ComputeDevice;
use worker::engine::{EngineError, Trainer, TrainerOptions};

use crate::cli::bench::BenchError;

/// Bytes of a file of weights; these models have one.
const SHARD_BYTES: u64 = 1 << 30;

/// Writes a copy of a model, all of whose matrices but routers are quantised as they are in `dtype`, and widened again. `job` trains
/// all weights of the model in `folder`, and draws them.
pub fn widened(
    folder: &Path,
    job: JobSpec,
    dtype: BaseDtype,
) -> Result<tempfile::TempDir, BenchError> {
    let (drawn, copy) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let config = ModelFolder::open(folder, InitWeights::Random).map_err(EngineError::from)?;
    let config = config.config_json().clone();
    let trainer = Trainer::load(TrainerOptions {
        job: Arc::new(job),
        model_dir: folder.to_owned(),
        adapter_dir: None,
        threads: 1,
        device: ComputeDevice::Cpu,
    })?;
    let format = WeightsFormat::Model {
        config: config.clone(),
        dtype: Dtype::F32,
        frozen: None,
    };
    let snapshot = trainer.snapshot()?;
    snapshot
        .write_weights(drawn.path(), &format)
        .map_err(EngineError::from)?;
    let tensors = quantised(drawn.path(), dtype)?;
    let tensors: Vec<ModelTensor> = tensors
        .iter()
        .map(|(name, shape, scalars)| ModelTensor {
            name,
            shape,
            scalars: Scalars::Here(scalars),
        })
        .collect();
    write_model(copy.path(), &config, &tensors, Dtype::F32, SHARD_BYTES)
        .map_err(EngineError::from)?;
    Ok(copy)
}

/// A tensor's name, shape and scalars.
type Tensor = (String, Vec<usize>, Vec<f32>);

/// The tensors of a folder, with what 4 bits leave of them.
fn quantised(folder: &Path, dtype: BaseDtype) -> Result<Vec<Tensor>, EngineError> {
    let folder = ModelFolder::open(folder, InitWeights::Pretrained)?;
    let expected = base_tensors(&ModelConfig::of(&folder)?);
    let files = WeightFiles::open(&folder, &expected)?;
    let read = |(name, shape): (String, Vec<usize>)| {
        let mut scalars = vec![0.0; shape.iter().product()];
        files.read_f32(&name, &shape, &mut scalars)?;
        if !is_norm_or_bias(&name, shape.len()) && !is_router(&name) {
            if dtype == BaseDtype::Bfloat16 {
                let rounded = |scalar: f32| bf16::from_f32(scalar).to_f32();
                scalars
                    .iter_mut()
                    .for_each(|scalar| *scalar = rounded(*scalar));
            }
            let matrix = Nf4::quantise(&scalars, true).map_err(|reason| {
                let name = name.clone();
                EngineError::NotQuantised { name, reason }
            })?;
            matrix.dequantise(0, &mut scalars);
        }
        Ok((name, shape, scalars))
    };
    expected.into_iter().map(read).collect()
}
