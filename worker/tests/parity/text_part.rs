//! A folder of a model of texts and images, whose language model is trained by itself: the same to the bit as that model alone.

use std::path::Path;

use common::files::model::{ModelFolder, WeightFiles};
use common::files::tensors::{Dtype, TensorFile, write};
use common::job::InitWeights;
use common::model::{ModelConfig, base_tensors};
use serde_json::{Value, json};

use crate::golden::golden_dir;
use crate::support::{Case, Training};

/// As `Qwen3_5ForConditionalGeneration.save_pretrained` of Transformers 5.24 writes it: the configuration of the language model is one
/// of several, its tensors have a prefix, and there are others beside them.
fn write_whole(text: &Path, whole: &Path) {
    let config = std::fs::read_to_string(text.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config.as_object_mut().unwrap().remove("architectures");
    let config = json!({
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5",
        "text_config": config, "vision_config": {"depth": 1}, "image_token_id": 90,
        "tie_word_embeddings": true
    });
    std::fs::write(whole.join("config.json"), config.to_string()).unwrap();
    let file = TensorFile::open(&text.join("model.safetensors")).unwrap();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = file
        .names()
        .map(|name| {
            let view = file.get(name).unwrap();
            let name = name.replacen("model.", "model.language_model.", 1);
            (name, view.dtype, view.shape.to_vec(), view.bytes.to_vec())
        })
        .collect();
    for name in ["model.visual.merger.norm.weight", "mtp.norm.weight"] {
        tensors.push((name.to_owned(), Dtype::F32, vec![2], vec![0; 8]));
    }
    let listed = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.clone(), *dtype, shape.clone(), &bytes[..]));
    write(whole, "model.safetensors", listed, &[]).unwrap();
}

#[test]
fn the_language_model_of_a_model_of_texts_and_images_is_trained_by_itself() {
    let case = Case::open(&golden_dir(), "qwen3.5");
    let folder = tempfile::tempdir().unwrap();
    let whole = Case {
        dir: folder.path().to_owned(),
        ..Case::open(&golden_dir(), "qwen3.5")
    };
    std::fs::create_dir(folder.path().join("model")).unwrap();
    write_whole(&case.dir.join("model"), &folder.path().join("model"));
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

    let opened = ModelFolder::open(&folder.path().join("model"), InitWeights::Pretrained).unwrap();
    opened.check_model_type().unwrap();
    assert_eq!(
        opened.config_json()["architectures"],
        json!(["Qwen3_5ForCausalLM"])
    );
    let told = opened.notices();
    assert!(
        told.iter().any(|line| line.contains("texts and images")),
        "{told:?}"
    );
    let tensors = base_tensors(&ModelConfig::of(&opened).unwrap());
    let files = WeightFiles::open(&opened, &tensors).unwrap();
    let told = files.notices().join("\n");
    assert!(
        told.contains("mtp.norm.weight") && told.contains("model.visual"),
        "{told}"
    );
}
