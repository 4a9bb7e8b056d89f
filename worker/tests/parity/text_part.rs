//! A folder of a model of texts and images, whose language model is trained by itself: the same to the bit as that model alone.

use std::path::Path;

use common::files::model::{ModelFolder, WeightFiles};
use common::files::tensors::{Dtype, TensorFile, write};
use common::job::InitWeights;
use common::model::{ModelConfig, base_tensors};
use serde_json::{Value, json};

use crate::golden::golden_dir;
use crate::support::{Case, Training};

/// Tensors of other parts.
const OTHERS: [&str; 6] = [
    "model.visual.merger.norm.weight",
    "model.vision_tower.std_bias",
    "model.embed_vision.embedding_projection.weight",
    "model.audio_tower.output_proj.weight",
    "model.embed_audio.embedding_projection.weight",
    "mtp.norm.weight",
];

type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// As `save_pretrained` of Transformers 5.24 writes a `Qwen3_5ForConditionalGeneration`, and as folders of
/// `Qwen3_5MoeForConditionalGeneration` are: the configuration of the language model is one of several, its tensors have a prefix,
/// there are others beside them, and all experts of a layer are in two tensors.
fn write_whole(text: &Path, whole: &Path, class: &str, model_type: &str) {
    let config = std::fs::read_to_string(text.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config.as_object_mut().unwrap().remove("architectures");
    let config = json!({
        "architectures": [class], "model_type": model_type, "image_token_id": 90,
        "tie_word_embeddings": config["tie_word_embeddings"], "text_config": config,
        "vision_config": {"depth": 1}
    });
    std::fs::write(whole.join("config.json"), config.to_string()).unwrap();
    let file = TensorFile::open(&text.join("model.safetensors")).unwrap();
    let tensors = file.names().map(|name| {
        let view = file.get(name).unwrap();
        let name = name.replacen("model.", "model.language_model.", 1);
        (name, view.dtype, view.shape.to_vec(), view.bytes.to_vec())
    });
    let mut tensors = stacked(tensors.collect());
    for name in OTHERS {
        tensors.push((name.to_owned(), Dtype::F32, vec![2], vec![0; 8]));
    }
    let listed = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.clone(), *dtype, shape.clone(), &bytes[..]));
    write(whole, "model.safetensors", listed, &[]).unwrap();
}

/// The same tensors, but with those of all experts of a layer in two.
fn stacked(tensors: Vec<Tensor>) -> Vec<Tensor> {
    // Of a family that writes them so, they are in two tensors already.
    let is_of_expert =
        |(name, ..): &Tensor| name.contains(".experts.") && name.ends_with(".weight");
    let (of_experts, mut others): (Vec<_>, Vec<_>) = tensors.into_iter().partition(is_of_expert);
    let find = |name: &str| of_experts.iter().find(|tensor| tensor.0 == name);
    for (first, ..) in &of_experts {
        let Some(block) = first.strip_suffix(".0.gate_proj.weight") else {
            continue;
        };
        for (whole, parts) in [
            ("gate_up_proj", &["gate_proj", "up_proj"][..]),
            ("down_proj", &["down_proj"]),
        ] {
            let experts = (0..).map_while(|expert| {
                let matrices = parts.iter();
                let matrices =
                    matrices.map(|part| find(&format!("{block}.{expert}.{part}.weight")));
                matrices.collect::<Option<Vec<&Tensor>>>()
            });
            let experts: Vec<Vec<&Tensor>> = experts.collect();
            let [rows, columns] = experts[0][0].2[..] else {
                panic!("a matrix");
            };
            let bytes = experts.iter().flatten().flat_map(|tensor| &tensor.3);
            others.push((
                format!("{block}.{whole}"),
                experts[0][0].1,
                vec![experts.len(), parts.len() * rows, columns],
                bytes.copied().collect(),
            ));
        }
    }
    others
}

#[test]
fn the_language_model_of_a_model_of_texts_and_images_is_trained_by_itself() {
    check(
        "qwen3.5",
        ["Qwen3_5ForConditionalGeneration", "qwen3_5"],
        "Qwen3_5ForCausalLM",
    );
}

#[test]
fn a_mixture_whose_experts_are_stored_in_two_tensors_is_the_one_with_each_by_itself() {
    check(
        "qwen3.5-moe",
        ["Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"],
        "Qwen3_5MoeForCausalLM",
    );
}

/// Some folders have keys and values of layers that have those of others, too.
#[test]
fn the_language_model_of_a_gemma_4_of_texts_and_images_is_trained_by_itself() {
    for name in ["gemma4", "gemma4-shared", "gemma4-experts"] {
        check(
            name,
            ["Gemma4ForConditionalGeneration", "gemma4"],
            "Gemma4ForCausalLM",
        );
    }
}

fn check(name: &str, [class, model_type]: [&str; 2], own_class: &str) {
    let case = Case::open(&golden_dir(), name);
    let folder = tempfile::tempdir().unwrap();
    let whole = Case {
        dir: folder.path().to_owned(),
        ..Case::open(&golden_dir(), name)
    };
    let whole_dir = folder.path().join("model");
    std::fs::create_dir(&whole_dir).unwrap();
    write_whole(&case.dir.join("model"), &whole_dir, class, model_type);
    let (mut found, mut expected) = (
        whole.trainer(Training::Full, false),
        case.trainer(Training::Full, false),
    );
    let tokens = &case.golden.examples[0].tokens;
    assert_eq!(
        found.logits(tokens).unwrap(),
        expected.logits(tokens).unwrap()
    );
    assert_eq!(
        found.weights_digest().unwrap(),
        expected.weights_digest().unwrap()
    );

    let opened = ModelFolder::open(&whole_dir, InitWeights::Pretrained).unwrap();
    opened.check_model_type().unwrap();
    assert_eq!(opened.config_json()["architectures"], json!([own_class]));
    let told = opened.notices();
    let is_renamed = own_class == "Gemma4ForCausalLM";
    let mapped = told.iter().any(|line| line.contains("key_mapping="));
    assert_eq!(mapped, is_renamed, "{told:?}");
    assert!(
        told.iter().any(|line| line.contains("texts and images")),
        "{told:?}"
    );
    let tensors = base_tensors(&ModelConfig::of(&opened).unwrap());
    let files = WeightFiles::open(&opened, &tensors).unwrap();
    let told = files.notices().join("\n");
    let count = format!("and {} more", OTHERS.len() - 4);
    assert!(
        told.contains("model.vision_tower") && told.contains(&count),
        "{told}"
    );
}
