//! A base of 4 bits on the GPU: the bits of one that was widened before, the processor's numbers, folders that bitsandbytes quantised.

use common::dynamic_map;
use common::files::model::{ModelFolder, WeightFiles};
use common::files::snapshot::Snapshot;
use common::files::tensors::{Dtype, write};
use common::job::InitWeights;
use common::model::{EMBEDDING, HEAD, ModelConfig, base_tensors, is_norm_or_bias};
use common::nf4::{NF4_LEVELS, Nested, Nf4};
use serde_json::json;

use super::*;
use crate::engine::testing::widened::{changed_copy, widened_copy};

/// The values of FP4 (bitsandbytes, `functional.py`, `get_4bit_type`).
const FP4_LEVELS: [f32; 16] = [
    0.0,
    0.005_208_333,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    -0.0,
    -0.005_208_333,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

const ALL: Quantization = Quantization {
    nested_scales: true,
    embeddings: true,
    experts: true,
};
const LINEARS: Quantization = Quantization {
    nested_scales: false,
    embeddings: false,
    experts: false,
};

fn with(architecture: &str, settings: serde_json::Value) -> tempfile::TempDir {
    let mut json = config(architecture);
    for (key, value) in settings.as_object().unwrap() {
        json[key] = value.clone();
    }
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &json, 7);
    dir
}

/// Biases and an output layer of its own; rows that no block ends with, and one matrix for both; experts beside a shared one, in
/// matrices of their own and in fused ones.
fn models() -> Vec<tempfile::TempDir> {
    vec![
        with(
            "LlamaForCausalLM",
            json!({"attention_bias": true, "mlp_bias": true}),
        ),
        with(
            "Qwen3ForCausalLM",
            json!({"hidden_size": 36, "intermediate_size": 50}),
        ),
        with("Qwen2MoeForCausalLM", json!({})),
        with("OlmoeForCausalLM", json!({"moe_intermediate_size": 20})),
        with("GptOssForCausalLM", json!({})),
    ]
}

/// The state after a step on the processor.
fn begun(dir: &Path, job: JobSpec) -> Snapshot {
    let mut start = load(dir, job, 2);
    step(&mut start, &blocks(), 1e-2);
    start.snapshot().unwrap()
}

/// Sums and loss of a slot, and the weights after an update, from this state on.
fn bits(
    (device, start): (&ComputeDevice, &Snapshot),
    dir: &Path,
    job: JobSpec,
) -> ((Vec<i64>, f64), String) {
    let mut trainer = load_on(device.clone(), dir, job, 2);
    trainer.restore(start).unwrap();
    let sums = slot_sums(&mut trainer, 5, &blocks()[..1]);
    trainer.apply_held(1e-2).unwrap();
    (sums, trainer.weights_digest().unwrap())
}

fn job_on(quantization: Option<Quantization>, base_dtype: BaseDtype, dropout: f64) -> JobSpec {
    JobSpec {
        quantization,
        base_dtype,
        ..job(lora(TargetModules::AllLinear, dropout))
    }
}

#[test]
fn bits_are_those_of_a_base_that_was_widened_before() {
    let Some(gpu) = gpu() else { return };
    for dir in models() {
        let json = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
        for (how, base_dtype, dropout) in [
            (ALL, BaseDtype::Float32, 0.1),
            (ALL, BaseDtype::Bfloat16, 0.0),
            (LINEARS, BaseDtype::Float32, 0.0),
            (LINEARS, BaseDtype::Bfloat16, 0.1),
        ] {
            let widened = widened_copy(dir.path(), how, base_dtype);
            let wide = job_on(None, base_dtype, dropout);
            // In bfloat16 the processor reads an embedding of 4 bits in float32, so that a step there is another one.
            let start = begun(widened.path(), wide.clone());
            let gpu = (&gpu, &start);
            let expected = bits(gpu, widened.path(), wide.clone());
            let narrow = job_on(Some(how), base_dtype, dropout);
            let what = format!("{how:?} {base_dtype:?} {json}");
            assert!(bits(gpu, dir.path(), narrow.clone()) == expected, "{what}");
            let checkpointed = JobSpec {
                gradient_checkpointing: Checkpointing::Always,
                ..narrow
            };
            assert!(bits(gpu, dir.path(), checkpointed) == expected, "{what}");
            // What 4 bits leave is not what there was.
            assert!(bits(gpu, dir.path(), wide) != expected, "{what}");
        }
    }
}

#[test]
fn gradients_and_logits_are_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    for dir in models() {
        for how in [ALL, LINEARS] {
            let run = |device| {
                let job = job_on(Some(how), BaseDtype::Float32, 0.1);
                let mut trainer = trained(device, dir.path(), job);
                let sums = slot_sums(&mut trainer, 1, &blocks());
                let tokens: Vec<u32> = (0..24).map(|token| token * 7 % 61).collect();
                let evaluated = trainer.eval_slot(&blocks()).unwrap();
                (sums, trainer.logits(&tokens).unwrap(), evaluated)
            };
            let (found, expected) = (run(gpu.clone()), run(ComputeDevice::Cpu));
            let apart = distance(&found.0.0, &expected.0.0);
            assert!(apart < 1e-5, "{how:?}: gradients are {apart} apart");
            assert!((found.0.1 / expected.0.1 - 1.0).abs() < 1e-5, "{how:?}");
            let apart = found.2.loss_sum / expected.2.loss_sum - 1.0;
            assert!(apart.abs() < 1e-5, "{how:?}: {apart}");
            let what = format!("{how:?}");
            crate::engine::cuda::testing::assert_near(&what, &found.1, &expected.1, 1e-5);
        }
    }
}

#[test]
fn losses_of_ten_steps_follow_the_processor_s() {
    let Some(gpu) = gpu() else { return };
    let dir = model("Qwen3ForCausalLM");
    for (base_dtype, allowed) in [(BaseDtype::Float32, 1e-3), (BaseDtype::Bfloat16, 2e-2)] {
        let run = |device| {
            let job = job_on(Some(ALL), base_dtype, 0.0);
            let mut trainer = load_on(device, dir.path(), job, 2);
            (0..10)
                .map(|_| step(&mut trainer, &blocks(), 3e-3))
                .collect::<Vec<f64>>()
        };
        let (found, expected) = (run(gpu.clone()), run(ComputeDevice::Cpu));
        assert!(expected[9] < 0.98 * expected[0]);
        for (found, expected) in found.iter().zip(&expected) {
            let apart = (found / expected - 1.0).abs();
            assert!(apart < allowed, "{found} instead of {expected}");
        }
    }
}

/// A tensor of a file: name, type, shape and bytes.
type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The tensors that bitsandbytes leaves of a matrix.
fn quantised(
    name: &str,
    shape: &[usize],
    values: &[f32],
    (levels, block, is_nested): ([f32; 16], usize, bool),
) -> Vec<Stored> {
    let codes = Nf4::quantise(values, false).unwrap().codes().to_vec();
    let largest = |block: &[f32]| block.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    let absmax: Vec<f32> = values.chunks(block).map(largest).collect();
    let kind = match levels == NF4_LEVELS {
        true => "nf4",
        false => "fp4",
    };
    let mut state =
        json!({"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": shape});
    let named = |end: &str| format!("{name}{end}");
    let mut stored = vec![
        (named(""), Dtype::U8, vec![codes.len(), 1], codes),
        (named(".quant_map"), Dtype::F32, vec![16], floats(&levels)),
    ];
    if is_nested {
        let nested = Nested::quantise(&absmax);
        let (codes, largest, offset) = nested.parts();
        let map = floats(dynamic_map::signed());
        state["nested_blocksize"] = 256.into();
        state["nested_dtype"] = "float32".into();
        state["nested_offset"] = f64::from(offset).into();
        stored.extend([
            (
                named(".absmax"),
                Dtype::U8,
                vec![codes.len()],
                codes.to_vec(),
            ),
            (
                named(".nested_absmax"),
                Dtype::F32,
                vec![largest.len()],
                floats(largest),
            ),
            (named(".nested_quant_map"), Dtype::F32, vec![256], map),
        ]);
    } else {
        let shape = vec![absmax.len()];
        stored.push((named(".absmax"), Dtype::F32, shape, floats(&absmax)));
    }
    let state = state.to_string().into_bytes();
    let end = format!(".quant_state.bitsandbytes__{kind}");
    stored.push((named(&end), Dtype::U8, vec![state.len()], state));
    stored
}

/// A copy of a model folder as bitsandbytes leaves it: linears in 4 bits, but for those whose names have one of these parts.
fn quantised_folder(
    from: &Path,
    how: ([f32; 16], usize, bool),
    left_out: &[&str],
) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    let folder = ModelFolder::open(from, InitWeights::Pretrained).unwrap();
    let expected = base_tensors(&ModelConfig::of(&folder).unwrap());
    let files = WeightFiles::open(&folder, &expected).unwrap();
    let mut tensors = Vec::new();
    for (name, shape) in &expected {
        let mut values = vec![0.0; shape.iter().product()];
        files.read_f32(name, shape, &mut values).unwrap();
        let stays = [EMBEDDING, HEAD].contains(&&name[..])
            || is_norm_or_bias(name, shape.len())
            || left_out.iter().any(|part| name.contains(part));
        match stays {
            true => tensors.push((name.clone(), Dtype::F32, shape.clone(), floats(&values))),
            false => tensors.extend(quantised(name, shape, &values, how)),
        }
    }
    let tensors = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.clone(), *dtype, shape.clone(), &bytes[..]));
    write(to.path(), "model.safetensors", tensors, &[]).unwrap();
    let mut json = folder.config_json().clone();
    json["quantization_config"] = json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "_load_in_4bit": true,
        "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": how.2,
        "llm_int8_skip_modules": left_out
    });
    std::fs::write(to.path().join("config.json"), json.to_string()).unwrap();
    to
}

#[test]
fn folders_that_bitsandbytes_quantised_are_taken_as_they_are() {
    let Some(gpu) = gpu() else { return };
    let dir = with(
        "LlamaForCausalLM",
        json!({"hidden_size": 40, "intermediate_size": 52}),
    );
    // Of linears of one input some may be left out.
    let some = ["layers.0.self_attn.v_proj", "layers.1.mlp.up_proj"];
    let kinds: [([f32; 16], usize, bool, &[&str]); 4] = [
        (NF4_LEVELS, 64, true, &[]),
        (NF4_LEVELS, 128, false, &some),
        (FP4_LEVELS, 64, true, &some),
        (FP4_LEVELS, 32, false, &[]),
    ];
    for (levels, block, is_nested, left_out) in kinds {
        let folder = quantised_folder(dir.path(), (levels, block, is_nested), left_out);
        let widened = changed_copy(folder.path(), |_, _, _| ());
        for base_dtype in [BaseDtype::Float32, BaseDtype::Bfloat16] {
            let job = job_on(None, base_dtype, 0.1);
            let start = begun(widened.path(), job.clone());
            let found = bits((&gpu, &start), folder.path(), job.clone());
            let what = format!("blocks of {block}, nested {is_nested}, {base_dtype:?}");
            let wide = bits((&gpu, &start), widened.path(), job.clone());
            assert!(found == wide, "{what}");
            if base_dtype == BaseDtype::Float32 {
                let expected = bits((&ComputeDevice::Cpu, &start), folder.path(), job);
                assert!(distance(&found.0.0, &expected.0.0) < 1e-5, "{what}");
                assert!((found.0.1 / expected.0.1 - 1.0).abs() < 1e-5, "{what}");
            }
        }
    }
}
