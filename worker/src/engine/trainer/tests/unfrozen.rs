//! Full training of some of a model's weights.

use common::files::layout::Layout;
use common::files::model::{ModelFolder, WeightFiles};
use common::files::tensors::Dtype;
use common::files::{Frozen, WeightsFormat};
use common::job::{InitWeights, Unfrozen};
use common::model::{base_tensors, frozen_tensors};

use super::*;

fn job_of(patterns: &[&str]) -> JobSpec {
    JobSpec {
        unfrozen: Unfrozen::new(patterns.iter().map(|text| (*text).to_owned()).collect()),
        ..job(Method::Full)
    }
}

/// The part of a flat buffer that these tensors have in another layout.
fn part<T: Copy>(flat: &[T], whole: &Layout, part: &Layout) -> Vec<T> {
    let tensors = part.tensors.iter();
    let tensors = tensors.map(|tensor| whole.find(&tensor.name).unwrap());
    let parts = tensors.map(|tensor| &flat[tensor.offset..][..tensor.scalars()]);
    parts.flatten().copied().collect()
}

/// What is frozen has no gradient, and the others have the one that they have where all are trained.
#[test]
fn frozen_weights_change_no_bit_of_the_others_gradients() {
    let patterns: [&[&str]; 5] = [
        &["layers.1.", "lm_head"],
        &["norm"],
        &["embed_tokens", "layers.0.self_attn", "mlp.gate", "router"],
        &["down_proj", "experts"],
        &["bias", "^model.layers.0.mlp", "sinks", "k_proj"],
    ];
    for architecture in FAMILIES {
        let dir = model(architecture);
        let mut all = load(dir.path(), job(Method::Full), 2);
        let (expected, loss) = slot_sums(&mut all, 0, &blocks());
        for patterns in patterns {
            for gradient_checkpointing in [Checkpointing::Always, Checkpointing::Never] {
                let job = JobSpec {
                    gradient_checkpointing,
                    ..job_of(patterns)
                };
                let mut some = load(dir.path(), job, 2);
                let found = slot_sums(&mut some, 0, &blocks());
                let layout = some.layout();
                assert!(layout.scalars < all.layout().scalars);
                let expected = part(&expected, &all.layout(), &layout);
                assert_eq!(found, (expected, loss), "{architecture} {patterns:?}");
            }
        }
    }
}

/// In float32 and in bfloat16, of which the files of the base model may be, too.
#[test]
fn the_model_that_is_written_has_what_was_frozen_as_it_was() {
    let dir = model("Qwen3ForCausalLM");
    let mut trainer = load(dir.path(), job_of(&["layers.1.mlp", "norm"]), 1);
    for _ in 0..2 {
        step(&mut trainer, &blocks(), 1e-2);
    }
    let folder = ModelFolder::open(dir.path(), InitWeights::Pretrained).unwrap();
    let config = ModelConfig::of(&folder).unwrap();
    let all = base_tensors(&config);
    let before = Arc::new(WeightFiles::open(&folder, &all).unwrap());
    let unfrozen = &trainer.job.unfrozen;
    for dtype in [Dtype::F32, Dtype::BF16] {
        let format = WeightsFormat::Model {
            config: folder.config_json().clone(),
            dtype,
            frozen: Some(Frozen {
                files: Some(before.clone()),
                tensors: frozen_tensors(&config, unfrozen).unwrap(),
            }),
        };
        let written = tempfile::tempdir().unwrap();
        let snapshot = trainer.snapshot().unwrap();
        snapshot.write_files(written.path(), &format).unwrap();
        let folder = ModelFolder::open(written.path(), InitWeights::Pretrained).unwrap();
        let after = WeightFiles::open(&folder, &all).unwrap();
        let mut changed = Vec::new();
        for (name, shape) in &all {
            let read = |files: &WeightFiles| {
                let mut values = vec![0.0; shape.iter().product()];
                files.read_f32(name, shape, &mut values).unwrap();
                values
            };
            let before = read(&before);
            let before = before.iter().map(|value| match dtype {
                Dtype::BF16 => half::bf16::from_f32(*value).to_f32(),
                _ => *value,
            });
            if before.collect::<Vec<f32>>() != read(&after) {
                changed.push(name.as_str());
            }
        }
        let layout = trainer.layout();
        let trained: Vec<&str> = layout.tensors.iter().map(|t| t.name.as_str()).collect();
        changed.sort_unstable();
        assert_eq!(changed, trained);
        let back = Snapshot::read_files(written.path(), &layout).unwrap();
        assert_eq!(back, snapshot);
    }
}

#[test]
fn patterns_that_fit_no_weight_are_refused() {
    let dir = model("Qwen3ForCausalLM");
    let refused = Trainer::load(TrainerOptions {
        job: Arc::new(job_of(&["layers.9."])),
        model_dir: dir.path().to_owned(),
        adapter_dir: None,
        threads: 1,
        device: ComputeDevice::Cpu,
    });
    let told = refused.err().unwrap().to_string();
    assert!(told.contains("unfrozen_parameters: no weight"), "{told}");
}
