//! Adapters on a base of 4 bits.

use std::path::Path;

use common::files::model::{ModelFolder, ModelTensor, Scalars, WeightFiles};
use common::files::tensors::Dtype;
use common::job::{BaseDtype, InitWeights, JobSpec, Quantization, TargetModules};
use common::model::{
    CONVOLUTION, EMBEDDING, HEAD, INPUT_EMBEDDING, ModelConfig, base_tensors, is_norm_or_bias,
    is_of_expert, is_router,
};
use common::nf4::Nf4;

use super::{FAMILIES, blocks, model};
use crate::engine::testing::{job, load, lora, slot_sums, step};

/// A copy of a model folder whose linears (and embedding, with `embeddings`) hold what 4 bits leave of them.
pub(super) fn widened_copy(from: &Path, how: Quantization) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    let folder = ModelFolder::open(from, InitWeights::Pretrained).unwrap();
    let config = ModelConfig::of(&folder).unwrap();
    let expected = base_tensors(&config);
    let files = WeightFiles::open(&folder, &expected).unwrap();
    let mut tensors = Vec::new();
    for (name, shape) in &expected {
        let mut scalars = vec![0.0; shape.iter().product()];
        files.read_f32(name, shape, &mut scalars).unwrap();
        let is_of_tokens = [EMBEDDING, HEAD, INPUT_EMBEDDING].contains(&name.as_str());
        let stays = (is_of_tokens && !how.embeddings)
            || (is_of_expert(name) && !how.experts)
            || is_router(name)
            || name.ends_with(CONVOLUTION);
        if let [.., rows, columns] = shape[..]
            && !stays
            && !is_norm_or_bias(name, shape.len())
        {
            // Each expert of a fused tensor is a matrix of its own.
            for matrix in scalars.chunks_mut(rows * columns) {
                let quantised = Nf4::quantise(matrix, how.nested_scales).unwrap();
                quantised.dequantise(0, matrix);
            }
        }
        tensors.push((name.clone(), shape.clone(), scalars));
    }
    let listed: Vec<ModelTensor> = tensors
        .iter()
        .map(|(name, shape, scalars)| ModelTensor {
            name,
            shape,
            scalars: Scalars::Here(scalars),
        })
        .collect();
    let json = folder.config_json();
    common::files::model::write_model(to.path(), json, &listed, Dtype::F32, 1 << 30).unwrap();
    to
}

#[test]
fn an_adapter_on_4_bits_is_trained_to_the_bits_of_one_on_what_they_leave() {
    for architecture in FAMILIES {
        let dir = model(architecture);
        for how in [(true, false), (false, false), (true, true)] {
            let how = Quantization {
                nested_scales: how.0,
                embeddings: how.1,
                experts: how.1,
            };
            let widened = widened_copy(dir.path(), how);
            let run = |dir: &Path, quantization, threads| {
                let job = JobSpec {
                    quantization,
                    ..job(lora(TargetModules::AllLinear, 0.1))
                };
                let mut trainer = load(dir, job, threads);
                let losses: Vec<f64> = (0..3)
                    .map(|_| step(&mut trainer, &blocks(), 1e-2))
                    .collect();
                (losses, trainer.weights_digest().unwrap())
            };
            let expected = run(widened.path(), None, 1);
            for threads in [1, 3] {
                assert_eq!(
                    run(dir.path(), Some(how), threads),
                    expected,
                    "{architecture}, {how:?}"
                );
            }
            assert_ne!(run(dir.path(), None, 1), expected);
        }
    }
}

#[test]
fn a_bfloat16_base_of_4_bits_does_not_depend_on_threads_and_comes_near_float32() {
    let dir = model("Qwen3ForCausalLM");
    let run = |base_dtype, threads| {
        let job = JobSpec {
            base_dtype,
            quantization: Some(Quantization {
                nested_scales: true,
                embeddings: false,
                experts: false,
            }),
            ..job(lora(TargetModules::AllLinear, 0.0))
        };
        slot_sums(&mut load(dir.path(), job, threads), 0, &blocks())
    };
    let (narrow, wide) = (run(BaseDtype::Bfloat16, 1), run(BaseDtype::Float32, 1));
    assert_eq!(run(BaseDtype::Bfloat16, 3), narrow);
    assert!(
        (narrow.1 - wide.1).abs() < 0.01 * wide.1,
        "{} {}",
        narrow.1,
        wide.1
    );
}
