//! The card of a result: what it is, what it was trained on and how, what came out, and how it is loaded.
//!
//! Enters: the record of the run, and what the folder says of losses. Leaves: a README.md. Paths of this machine stay out.

use std::fmt::Write;
use std::path::Path;

use common::job::shown_address;
use serde_json::Value;

use crate::store::output::RunRecord;

/// Longest file that is read for the card.
const MAX_BYTES: u64 = 64 << 20;

/// Fields of the job that a reader wants to know, and what they are called.
const SETTINGS: [(&str, &str); 15] = [
    ("learning_rate", "learning rate"),
    ("lr_groups", "learning rates of some weights"),
    ("lr_scheduler", "schedule"),
    // Where they are not the usual ones: AdamW, and cross-entropy.
    ("optimizer", "optimizer"),
    ("token_loss", "loss"),
    ("num_epochs", "epochs"),
    ("max_steps", "steps at most"),
    ("global_batch_size", "blocks in a step"),
    ("sequence_len", "tokens in a block"),
    ("adam_beta1", "beta 1"),
    ("adam_beta2", "beta 2"),
    ("adam_epsilon", "epsilon"),
    ("weight_decay", "weight decay"),
    ("max_grad_norm", "gradient norm at most"),
    ("seed", "seed"),
];

/// The card of the result in this folder.
pub(super) fn card(folder: &Path, record: Option<&RunRecord>) -> String {
    let job = record.map_or(&Value::Null, |record| &record.job);
    let is_adapter = folder.join("adapter_config.json").is_file();
    let base = base_model(folder, job);
    let mut text = front_matter(is_adapter, base.as_deref(), job);
    let kind = match is_adapter {
        true => "A LoRA adapter",
        false => "A model",
    };
    let of = base
        .as_deref()
        .map_or_else(String::new, |base| format!(" of `{base}`"));
    text += &format!("# {kind}{of}\n\nFine-tuned with Muster.\n\n## Use\n\n");
    text += &usage(is_adapter, base.as_deref());
    text += &data(job);
    text += &settings(job);
    text += &results(folder, record);
    text
}

fn front_matter(is_adapter: bool, base: Option<&str>, job: &Value) -> String {
    let mut text = String::from("---\n");
    let library = if is_adapter { "peft" } else { "transformers" };
    let _ = writeln!(
        text,
        "library_name: {library}\npipeline_tag: text-generation"
    );
    if let Some(base) = base.filter(|base| base.contains('/')) {
        let _ = writeln!(text, "base_model: {}", quoted(base));
    }
    let ids = dataset_ids(job);
    if !ids.is_empty() {
        text += "datasets:\n";
        ids.iter()
            .for_each(|id| text += &format!("- {}\n", quoted(id)));
    }
    text += "tags:\n- muster\n";
    text += if is_adapter {
        "- lora\n---\n\n"
    } else {
        "---\n\n"
    };
    text
}

/// A text as YAML, whatever it holds: JSON is YAML.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// Id of the base model; where it has none, the name of its folder.
fn base_model(folder: &Path, job: &Value) -> Option<String> {
    if let Some(id) = job["base_model_id"].as_str() {
        return Some(id.to_owned());
    }
    let config = read_json(&folder.join("adapter_config.json"));
    let path = job["base_model"]
        .as_str()
        .or_else(|| config["base_model_name_or_path"].as_str())?;
    let name = Path::new(path).file_name()?;
    Some(name.to_string_lossy().into_owned())
}

fn usage(is_adapter: bool, base: Option<&str>) -> String {
    let base = base.unwrap_or("BASE_MODEL");
    let load = match is_adapter {
        true => format!(
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             model = AutoModelForCausalLM.from_pretrained({base:?})\nmodel = PeftModel.from_pretrained(model, REPOSITORY)\n"
        ),
        false => "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                  model = AutoModelForCausalLM.from_pretrained(REPOSITORY)\n"
            .to_owned(),
    };
    format!(
        "```python\n{load}tokenizer = AutoTokenizer.from_pretrained(REPOSITORY)\n```\n\nREPOSITORY is this one's id.\n\n"
    )
}

/// Ids of the datasets that are on the hub, each once.
fn dataset_ids(job: &Value) -> Vec<String> {
    let of = |list: &str| job[list].as_array().into_iter().flatten();
    let datasets = of("datasets").chain(of("test_datasets"));
    let mut ids: Vec<String> = Vec::new();
    for id in datasets.filter_map(|dataset| dataset["hub"]["id"].as_str()) {
        if !ids.iter().any(|known| known == id) {
            ids.push(id.to_owned());
        }
    }
    ids
}

fn data(job: &Value) -> String {
    let Some(datasets) = job["datasets"].as_array() else {
        return String::new();
    };
    let mut text = format!("## Data\n\n{}", listed(datasets));
    if let Some(evaluated) = job["test_datasets"]
        .as_array()
        .filter(|list| !list.is_empty())
    {
        let _ = write!(text, "\nEvaluated on:\n\n{}", listed(evaluated));
    }
    text.push('\n');
    text
}

/// Datasets, a line each.
fn listed(datasets: &[Value]) -> String {
    let mut text = String::new();
    for dataset in datasets {
        let path = dataset["path"].as_str().unwrap_or_default();
        let hub = &dataset["hub"];
        let name = match hub["id"].as_str() {
            Some(id) => id.to_owned(),
            None if path == "-" => "standard input".to_owned(),
            None => Path::new(&shown_address(path))
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
        };
        let split = dataset["split"].as_str().unwrap_or("train");
        let _ = write!(text, "- `{name}`, split `{split}`");
        if let Some(config) = dataset["name"].as_str() {
            let _ = write!(text, ", configuration `{config}`");
        }
        if let Some(commit) = hub["commit"].as_str() {
            let _ = write!(text, ", commit `{commit}`");
        }
        text.push('\n');
    }
    text
}

fn settings(job: &Value) -> String {
    if job.is_null() {
        return String::new();
    }
    let mut text = String::from("## Training\n\n| | |\n|---|---|\n");
    let mut row = |name: &str, value: &Value| {
        let shown = match value {
            Value::Null => return,
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let _ = writeln!(text, "| {name} | {shown} |");
    };
    if job["base_model_id"].is_string() {
        row("commit of the base model", &job["model_revision"]);
    }
    let lora = &job["method"]["lora"];
    // What has numbers of its own is named alone.
    let init = lora["init"].as_object().and_then(|init| init.keys().next());
    let init = init.map_or_else(|| lora["init"].clone(), |name| name.as_str().into());
    row("start of the factors", &init);
    for (key, name) in [
        ("r", "LoRA rank"),
        ("alpha", "LoRA alpha"),
        ("dropout", "LoRA dropout"),
        ("use_dora", "magnitudes (DoRA)"),
        ("biases", "biases"),
        ("lora_bias", "biases of B"),
    ] {
        row(name, &lora[key]);
    }
    row("base weights", &job["base_dtype"]);
    row("trained in bfloat16", &job["pure_bf16"]);
    for (key, name) in SETTINGS {
        row(name, &job[key]);
    }
    text.push('\n');
    text
}

fn results(folder: &Path, record: Option<&RunRecord>) -> String {
    let state = read_json(&folder.join("trainer_state.json"));
    let history: Vec<&Value> = state["log_history"]
        .as_array()
        .into_iter()
        .flatten()
        .collect();
    let last = |key: &str| history.iter().rev().find_map(|line| line[key].as_f64());
    let mut text = String::from("## Result\n\n");
    if let Some(record) = record {
        let _ = writeln!(text, "- {} steps of {}", record.step, record.total_steps);
    }
    for (key, name) in [
        ("loss", "training loss"),
        ("eval_loss", "loss on the held-out data"),
    ] {
        if let Some(loss) = last(key) {
            let _ = writeln!(text, "- {name} at the end: {loss:.4}");
        }
    }
    if let Some(record) = record {
        for (name, digest) in [
            ("weights", &record.weights_digest),
            ("data", &record.data_digest),
            ("base model", &record.base_model_digest),
        ] {
            if let Some(digest) = digest {
                let _ = writeln!(text, "- digest of the {name} (BLAKE3): `{digest}`");
            }
        }
        let _ = writeln!(text, "- digest of the job: `{}`", record.job_digest);
    }
    text
}

fn read_json(path: &Path) -> Value {
    let is_short = std::fs::metadata(path).is_ok_and(|metadata| metadata.len() <= MAX_BYTES);
    let bytes = is_short.then(|| std::fs::read(path).ok()).flatten();
    let json = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    json.unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_card_tells_the_data_and_no_path_of_this_machine() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("adapter_config.json"), "{}").unwrap();
        let job = json!({
            "base_model": "/home/me/cache/snapshots/0a", "base_model_id": "org/base",
            "datasets": [
                {"path": "org/Chats", "hub": {"id": "org/chats", "commit": "0b"}, "split": "train[:5%]"},
                {"path": "/home/me/secret/own.jsonl", "revision": "v1"}
            ],
            "method": {"lora": {"r": 8}}, "learning_rate": 0.0002
        });
        let text = front_matter(true, Some("org/base"), &job)
            + &data(&job)
            + &settings(&job)
            + &usage(true, base_model(folder.path(), &job).as_deref());
        for wanted in [
            "base_model: \"org/base\"",
            "- \"org/chats\"",
            "commit `0b`",
            "`own.jsonl`",
            "| LoRA rank | 8 |",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        assert!(!text.contains("/home/me"), "{text}");
    }
}
