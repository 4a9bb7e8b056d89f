//! Adapters on a base of 4 bits.

use std::path::Path;

use common::job::{BaseDtype, JobSpec, Quantization, TargetModules};

use super::{FAMILIES, blocks, model};
use crate::engine::testing::widened::widened_copy;
use crate::engine::testing::{job, load, lora, slot_sums, step};

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
            let widened = widened_copy(dir.path(), how, BaseDtype::Float32);
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
