//! Ten steps of LoRA and of full training with moments of 8 bits, as bitsandbytes' AdamW makes them on a model of Transformers. The
//! golden files are made by `make_8bit.py`.

use common::files::Moment;
use common::files::adapter::AdapterConfig;
use common::files::snapshot::{Snapshot, read_weights};
use common::job::{JobSpec, Method, Optimizer};
use serde::Deserialize;

use crate::golden::{assert_steps, assert_weights, golden_dir};
use crate::support::{Case, Step, job};

/// Losses of bitsandbytes' own rounding on a processor.
#[derive(Deserialize)]
struct AsIs {
    lora_as_is: Vec<Step>,
    full_as_is: Vec<Step>,
}

/// Ten steps: losses, the state before and the state after.
fn train(case: &Case, is_lora: bool, optimizer: Optimizer) -> (Vec<Step>, Snapshot, Snapshot) {
    let adapter = case.dir.join("adapter");
    let (method, rate, start) = match is_lora {
        true => {
            let lora = AdapterConfig::read(&adapter).unwrap().to_lora();
            (
                Method::Lora(lora),
                case.golden.learning_rate_lora,
                Some(adapter),
            )
        }
        false => (Method::Full, case.golden.learning_rate_full, None),
    };
    let job = JobSpec {
        optimizer,
        ..job(method, rate, case.golden.sequence_len)
    };
    let mut trainer = case.load(job, "model", start);
    let before = trainer.snapshot().unwrap();
    let steps = case.train(&mut trainer, rate);
    (steps, before, trainer.snapshot().unwrap())
}

#[test]
fn ten_steps_of_lora_and_of_all_weights_are_bitsandbytes_s() {
    let case = Case::open(&golden_dir(), "qwen3-8bit");
    let text = std::fs::read(case.dir.join("golden.json")).unwrap();
    let as_is: AsIs = serde_json::from_slice(&text).unwrap();
    for (is_lora, expected, as_is, trained) in [
        (
            true,
            &case.golden.lora,
            &as_is.lora_as_is,
            "trained_adapter",
        ),
        (false, &case.golden.full, &as_is.full_as_is, "full"),
    ] {
        let (steps, start, end) = train(&case, is_lora, Optimizer::Adamw8bit);
        assert_steps(trained, &steps, expected);
        let weights = read_weights(&case.dir.join(trained), &end.layout).unwrap();
        assert_weights(trained, &start, &end, &weights);
        for (found, expected) in steps.iter().zip(as_is) {
            assert!((found.loss / expected.loss - 1.0).abs() < 0.01, "{trained}");
        }
        let (in_float32, ..) = train(&case, is_lora, Optimizer::Adamw);
        for (found, expected) in steps.iter().zip(&in_float32) {
            assert!((found.loss / expected.loss - 1.0).abs() < 0.01, "{trained}");
        }
        assert_ne!(steps[9].loss, in_float32[9].loss, "{trained}");
    }
}

#[test]
fn no_moment_of_a_large_tensor_is_in_float32() {
    let case = Case::open(&golden_dir(), "qwen3-8bit");
    let (_, _, full) = train(&case, false, Optimizer::Adamw8bit);
    let embedding = 96 * 64;
    // Norms of the layer, of its heads and of the output; keys and values are small.
    let small = 3 * 64 + 2 * 16 + 2 * 32 * 64;
    let large = full.layout.scalars - embedding - small;
    for moment in &full.moments {
        let Moment::EightBits(moment) = moment else {
            panic!("moments of 8 bits")
        };
        assert_eq!(moment.codes.len(), large);
        assert_eq!(moment.absmax.len(), large / 256);
        assert_eq!(moment.float32.len(), embedding + small);
    }
    let bytes = full.buffers().into_iter().map(|buffer| buffer.len());
    assert_eq!(bytes.sum::<usize>(), full.layout.state_bytes());
}
