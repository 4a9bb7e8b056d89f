//! Models and datasets by their ids, and results that are pushed: the whole program against a hub of our own.
#![cfg(all(unix, feature = "single-node"))]
#![allow(clippy::unwrap_used)]

#[path = "../../../common/tests/hub/stand_in/mod.rs"]
#[allow(dead_code)]
mod stand_in;
#[path = "../support/mod.rs"]
mod support;

mod pushes;

use std::path::{Path, PathBuf};
use std::process::Command;

use stand_in::{Fault, StandIn};
use support::{Finished, Run, Site};

const MODEL: &str = "org/tiny";
const TOKEN: &str = "hf_secretOfThisTest";

/// A hub with the tiny model, and a folder to run in.
struct Fixture {
    hub: StandIn,
    site: Site,
}

impl Fixture {
    fn new() -> Self {
        let site = Site::new();
        let hub = StandIn::start();
        commit(&hub, &format!("models/{MODEL}"), &site.path("model"));
        // Nothing but ids lead to the model.
        std::fs::rename(site.path("model"), site.path("put-away")).unwrap();
        Self { hub, site }
    }

    /// A command of the coordinator that knows this hub alone.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coordinator"));
        for variable in [
            "HF_HUB_OFFLINE",
            "HF_TOKEN",
            "HF_TOKEN_PATH",
            "HF_HUB_CACHE",
        ] {
            command.env_remove(variable);
        }
        command
            .current_dir(self.site.folder.path())
            .env("HF_ENDPOINT", self.hub.endpoint())
            .env("HF_HOME", self.site.path("huggingface"))
            .args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Finished {
        Run::of(&mut self.command(arguments)).end()
    }

    /// A short run of this dataset; `more` are lines of its entry in the job file.
    fn train(&self, output: &str, dataset: &str, more: &str) -> Finished {
        let job = format!(
            "base_model: {MODEL}\nadapter: lora\nlora_r: 4\nsequence_len: 64\nmax_steps: 2\nwarmup_steps: 0\n\
             global_batch_size: 2\noutput_dir: {output}\ndatasets:\n- path: {dataset}\n{more}"
        );
        let path = self.site.path(&format!("{output}.yaml"));
        std::fs::write(&path, job).unwrap();
        self.run(&["start", path.to_str().unwrap(), "--single-node"])
    }
}

/// Puts the files of a folder into a repository.
fn commit(hub: &StandIn, repo: &str, folder: &Path) -> String {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(inside) = folders.pop() {
        for entry in std::fs::read_dir(inside).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let name = path
                        .strip_prefix(folder)
                        .unwrap()
                        .to_str()
                        .unwrap()
                        .to_owned();
                    files.push((name, std::fs::read(&path).unwrap()));
                }
            }
        }
    }
    let files: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
        .collect();
    hub.commit(repo, &files)
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy(&path, &target),
            false => drop(std::fs::copy(&path, target).unwrap()),
        }
    }
}

fn shipped(id: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/hub/data")
        .join(id)
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_datasets_that_job_files_name_most_are_trained_on_by_their_ids() {
    let fixture = Fixture::new();
    let chat = "  type: chat_template\n";
    let sharegpt = "  type: chat_template\n  field_messages: conversations\n  message_property_mappings:\n    role: from\n    content: value\n";
    for (id, more, rows) in [
        ("mhenrichsen/alpaca_2k_test", "  type: alpaca\n", 40),
        ("fozziethebeat/alpaca_messages_2k_test", chat, 40),
        (
            "mlabonne/FineTome-100k",
            &format!("{sharegpt}  split: train[:20%]\n"),
            8,
        ),
        (
            "tatsu-lab/alpaca",
            "  type: alpaca\n  split: train[10:30]\n",
            20,
        ),
        ("cgato/SlimOrcaDedupCleaned", sharegpt, 40),
        ("teknium/GPT4-LLM-Cleaned", "  type: alpaca\n", 40),
        (
            "yahma/alpaca-cleaned",
            "  type: alpaca\n  split: train[-5:]\n",
            5,
        ),
        ("HuggingFaceH4/Multilingual-Thinking", chat, 40),
        (
            "AI-MO/NuminaMath-CoT",
            &format!("{chat}  split: train[:25%]+test\n"),
            11,
        ),
    ] {
        let commit = commit(&fixture.hub, &format!("datasets/{id}"), &shipped(id));
        let output = id.replace('/', "-");
        let run = fixture.train(&output, id, more);
        assert!(run.status.success(), "{id}: {run:?}");
        let record = json(&fixture.site.path(&output).join("run.json"));
        let source = &record["job"]["datasets"][0]["hub"];
        assert_eq!(
            (&source["id"], &source["commit"]),
            (&id.into(), &commit.into()),
            "{id}"
        );
        let told = format!("dataset        {rows} examples");
        assert!(run.stdout.contains(&told), "{id}: {told}: {run:?}");
        assert!(
            run.stdout.contains("model          org/tiny at "),
            "{run:?}"
        );
    }
    let id = "fozziethebeat/alpaca_messages_2k_dpo_test";
    commit(&fixture.hub, &format!("datasets/{id}"), &shipped(id));
    let run = fixture.train("preferences", id, "");
    assert!(
        !run.status.success() && run.stderr.contains("preferences"),
        "{run:?}"
    );
}

#[test]
fn a_result_names_the_model_by_its_id_and_its_commit() {
    let fixture = Fixture::new();
    let data = fixture.site.path("data.jsonl");
    // A folder of the owner's name is no reason to look for the model in it.
    std::fs::create_dir(fixture.site.path("org")).unwrap();
    let run = fixture.train("out", data.to_str().unwrap(), "");
    assert!(run.status.success(), "{run:?}");
    let config = json(&fixture.site.path("out/adapter_config.json"));
    assert_eq!(config["base_model_name_or_path"], MODEL);
    let commit = config["revision"].as_str().unwrap().to_owned();
    assert_eq!(commit.len(), 40);
    // The branch moves on; the run that is done, and one that is offline, keep to their commit.
    fixture
        .hub
        .commit(&format!("models/{MODEL}"), &[("config.json", b"{}")]);
    let again = fixture.run(&["start", "out.yaml", "--single-node"]);
    assert!(
        again.stdout.contains("this job is done already"),
        "{again:?}"
    );
    let mut offline = fixture.command(&["start", "out.yaml", "--single-node"]);
    let offline = Run::of(offline.env("HF_HUB_OFFLINE", "1")).end();
    assert!(
        offline.stdout.contains("this job is done already"),
        "{offline:?}"
    );
    let other = fixture.run(&["check", "out.yaml", "--output-dir", "elsewhere"]);
    assert!(
        !other.status.success(),
        "the new commit is no model: {other:?}"
    );
}

#[test]
fn what_the_hub_has_not_is_one_line() {
    let fixture = Fixture::new();
    let id = "AI-MO/NuminaMath-CoT";
    commit(&fixture.hub, &format!("datasets/{id}"), &shipped(id));
    for (dataset, more, words) in [
        (
            id,
            "  split: validation\n",
            "split validation is not there; it has",
        ),
        (
            id,
            "  name: easy\n",
            "no configurations, and no folder `easy`",
        ),
        (
            "org/nothing",
            "",
            "is not on the hub: it is private or misspelled",
        ),
        (id, "  revision: v9\n", "has no revision `v9`"),
        (id, "  data_files: none.json\n", "none.json"),
    ] {
        let run = fixture.train("bad", dataset, more);
        let errors: Vec<&str> = run
            .stderr
            .lines()
            .filter(|line| line.contains("error"))
            .collect();
        assert!(!run.status.success(), "{dataset} {more}");
        assert_eq!(errors.len(), 1, "{run:?}");
        let said = run.stderr.replace("\n", " ");
        let said: Vec<&str> = said.split_whitespace().collect();
        assert!(said.join(" ").contains(words), "{words}: {run:?}");
        assert!(!fixture.site.path("bad/run.json").exists());
    }
    let model = fixture.run(&[
        "check",
        "--base-model",
        "org/absent",
        "--dataset",
        "data.jsonl",
    ]);
    assert!(
        model
            .stderr
            .contains("base_model org/absent: there is no such folder"),
        "{model:?}"
    );
}

#[test]
fn a_result_is_pushed_and_a_push_that_failed_is_made_up_for() {
    let fixture = Fixture::new();
    fixture.hub.require_token(TOKEN);
    let job = "base_model: put-away\nadapter: lora\nlora_r: 4\nsequence_len: 64\nmax_steps: 2\nwarmup_steps: 0\n\
               global_batch_size: 2\ndatasets: data.jsonl\noutput_dir: out\nhub_model_id: me/result\n";
    std::fs::write(fixture.site.path("job.yaml"), job).unwrap();
    let start = ["start", "job.yaml", "--single-node"];
    // Without a token it is refused before anything is trained.
    let refused = fixture.run(&start);
    assert!(
        !refused.status.success() && refused.stderr.contains("HF_TOKEN"),
        "{refused:?}"
    );
    assert!(!fixture.site.path("out/run.json").exists());
    let with_token = |arguments: &[&str]| {
        let mut command = fixture.command(arguments);
        Run::of(command.env("HF_TOKEN", TOKEN)).end()
    };
    fixture.hub.play("/commit/", Fault::Status(403, Vec::new()));
    let failed = with_token(&start);
    assert!(!failed.status.success(), "{failed:?}");
    assert!(
        failed.stdout.contains("coordinator push out me/result"),
        "{failed:?}"
    );
    assert!(fixture.site.path("out/adapter_model.safetensors").is_file());
    let pushed = with_token(&["push", "out", "me/result"]);
    assert!(pushed.status.success(), "{pushed:?}");
    let files = fixture.hub.files("models/me/result", "main").unwrap();
    let weights = std::fs::read(fixture.site.path("out/adapter_model.safetensors")).unwrap();
    assert_eq!(files["adapter_model.safetensors"], weights);
    for name in ["adapter_config.json", "tokenizer.json", "README.md"] {
        assert!(files.contains_key(name), "{name}: {:?}", files.keys());
    }
    for name in ["run.json", "metrics.jsonl"] {
        assert!(!files.contains_key(name), "{name}");
    }
    let card = String::from_utf8(files["README.md"].clone()).unwrap();
    assert!(
        card.contains("library_name: peft") && card.contains("LoRA rank | 4"),
        "{card}"
    );
    for run in [&failed, &pushed] {
        let said = format!("{}{}", run.stdout, run.stderr);
        assert!(!said.contains(TOKEN), "{run:?}");
    }
    let again = with_token(&["push", "out", "me/result"]);
    assert!(
        again.stdout.contains("has these files already"),
        "{again:?}"
    );
    let nothing = with_token(&["push", "put-away", "me/other"]);
    assert!(
        nothing.status.success(),
        "a model's folder can be pushed, too: {nothing:?}"
    );
    std::fs::create_dir(fixture.site.path("empty")).unwrap();
    let empty = with_token(&["push", "empty", "me/other"]);
    assert!(
        empty
            .stderr
            .contains("neither an adapter_config.json nor a config.json"),
        "{empty:?}"
    );
}

#[test]
fn folders_and_patterns_of_files_are_datasets() {
    let fixture = Fixture::new();
    let id = "AI-MO/NuminaMath-CoT";
    let folder = fixture.site.path("math");
    copy(&shipped(id), &folder);
    let folder = folder.to_str().unwrap().to_owned();
    for (path, more, rows) in [
        (folder.clone(), "", 40),
        (folder.clone(), "  split: test\n", 1),
        (format!("{folder}/data/train-*.parquet"), "", 40),
        (
            folder.clone(),
            "  data_files: data/test-00000-of-00001.parquet\n",
            1,
        ),
        (folder.clone(), "  data_dir: data\n  max_samples: 3\n", 3),
        (
            "parquet".to_owned(),
            &format!("  data_files: {folder}/data/*.parquet\n"),
            41,
        ),
    ] {
        let job = format!("base_model: put-away\ndatasets:\n- path: '{path}'\n{more}");
        std::fs::write(fixture.site.path("job.yaml"), job).unwrap();
        let run = fixture.run(&["check", "job.yaml", "--json"]);
        assert!(run.status.success(), "{path} {more}: {run:?}");
        let document: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
        assert_eq!(document["dataset"]["rows"], rows, "{path} {more}");
    }
}

#[test]
fn the_shipped_jobs_that_need_the_hub_are_right() {
    let fixture = Fixture::new();
    let data = "tatsu-lab/alpaca";
    commit(
        &fixture.hub,
        "models/Qwen/Qwen3-0.6B",
        &fixture.site.path("put-away"),
    );
    commit(&fixture.hub, &format!("datasets/{data}"), &shipped(data));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for job in ["lora", "lora-4bit", "with-hub"] {
        let job = format!("examples/{job}.yaml");
        let output = fixture.site.path("checked");
        let split = ["--set", "datasets.0.split=train"];
        let mut command =
            fixture.command(&["check", &job, "--output-dir", output.to_str().unwrap()]);
        let run = Run::of(command.args(split).current_dir(&root)).end();
        assert!(run.status.success(), "{job}: {run:?}");
        assert!(run.stdout.contains("Qwen/Qwen3-0.6B at "), "{job}: {run:?}");
    }
}

#[test]
fn a_copy_of_a_dataset_has_the_configurations_of_its_card() {
    let fixture = Fixture::new();
    let folder = fixture.site.path("copy");
    for (name, rows) in [("easy", 3), ("hard", 5)] {
        std::fs::create_dir_all(folder.join(name)).unwrap();
        let rows = "{\"text\": \"some words\"}\n".repeat(rows);
        std::fs::write(folder.join(name).join("train.jsonl"), rows).unwrap();
    }
    let card = "---\nconfigs:\n- config_name: easy\n  data_files: easy/*.jsonl\n- config_name: hard\n  data_files: hard/*.jsonl\n---\n# Card\n";
    std::fs::write(folder.join("README.md"), card).unwrap();
    commit(&fixture.hub, "datasets/org/copy", &folder);
    for path in [folder.to_str().unwrap(), "org/copy"] {
        for (more, rows, words) in [
            ("  name: hard\n", 5, ""),
            ("  name: easy\n", 3, ""),
            ("", 0, "has several configurations, and none is the default"),
            (
                "  name: none\n",
                0,
                "has no configuration `none`, but easy, hard",
            ),
        ] {
            let job = format!("base_model: put-away\ndatasets:\n- path: '{path}'\n{more}");
            std::fs::write(fixture.site.path("job.yaml"), job).unwrap();
            let run = fixture.run(&["check", "job.yaml", "--json"]);
            assert_eq!(
                run.status.success(),
                words.is_empty(),
                "{path} {more}: {run:?}"
            );
            match words {
                "" => {
                    let document: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
                    assert_eq!(document["dataset"]["rows"], rows, "{path} {more}");
                }
                words => assert!(run.stderr.contains(words), "{path} {more}: {run:?}"),
            }
        }
    }
    let job = format!(
        "base_model: put-away\ndatasets:\n- path: '{}'\n  name: easy\n  revision: v1\n",
        folder.display()
    );
    std::fs::write(fixture.site.path("job.yaml"), job).unwrap();
    let run = fixture.run(&["check", "job.yaml"]);
    assert!(
        run.status.success() && run.stdout.contains("asks for nothing: revision v1"),
        "{run:?}"
    );
}

#[test]
fn a_run_keeps_to_the_commits_that_it_began_with_however_they_were_asked_for() {
    let fixture = Fixture::new();
    // Rows that only a program of the dataset's own makes; the hub has made them, of two configurations.
    fixture
        .hub
        .commit("datasets/org/script", &[("script.py", b"")]);
    let rows = std::fs::read(
        shipped("tatsu-lab/alpaca").join("data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"),
    )
    .unwrap();
    let converted = [
        ("default/train/0000.parquet", rows.as_slice()),
        ("other/train/0000.parquet", rows.as_slice()),
    ];
    fixture
        .hub
        .commit_to("datasets/org/script", "refs/convert/parquet", &converted);
    let id = "AI-MO/NuminaMath-CoT";
    commit(&fixture.hub, &format!("datasets/{id}"), &shipped(id));
    for (output, dataset, more) in [
        ("script", "org/script", "  type: alpaca\n"),
        ("named", id, "  revision: main\n"),
    ] {
        let first = fixture.train(output, dataset, more);
        assert!(first.status.success(), "{first:?}");
        fixture.hub.commit(
            &format!("datasets/{dataset}"),
            &[("train.jsonl", b"{\"text\": \"other rows\"}\n")],
        );
        let again = fixture.run(&["start", &format!("{output}.yaml"), "--single-node"]);
        assert!(
            again.stdout.contains("this job is done already"),
            "{output}: {again:?}"
        );
    }
}

#[test]
fn a_run_starts_from_an_adapter_by_its_id_and_keeps_to_its_commit() {
    let fixture = Fixture::new();
    let data = fixture.site.path("data.jsonl");
    let first = fixture.train("first", data.to_str().unwrap(), "");
    assert!(first.status.success(), "{first:?}");
    let commit = commit(
        &fixture.hub,
        "models/me/adapter",
        &fixture.site.path("first"),
    );
    let job = |output: &str, adapter: &str| {
        let job = format!(
            "base_model: {MODEL}\nadapter: lora\nlora_model_dir: {adapter}\nsequence_len: 64\nmax_steps: 2\nwarmup_steps: 0\n\
             global_batch_size: 2\noutput_dir: {output}\ndatasets: data.jsonl\n"
        );
        std::fs::write(fixture.site.path("job.yaml"), job).unwrap();
        fixture.run(&["start", "job.yaml", "--single-node"])
    };
    let second = job("second", "me/adapter");
    assert!(second.status.success(), "{second:?}");
    let shown = format!("from me/adapter at {}", &commit[..8]);
    let said: Vec<&str> = second.stdout.split_whitespace().collect();
    assert!(said.join(" ").contains(&shown), "{second:?}");
    let record = json(&fixture.site.path("second/run.json"));
    let lora = &record["job"]["method"]["lora"];
    assert_eq!(
        (&lora["model_source"]["commit"], &lora["r"]),
        (&commit.clone().into(), &4.into())
    );
    // From the folder itself it comes to the same.
    let local = job("local", "first");
    assert!(local.status.success(), "{local:?}");
    assert_eq!(fixture.site.digest("second"), fixture.site.digest("local"));
    // The branch moves on; the run that is done keeps to its commit, and a new one does not.
    fixture.hub.commit(
        "models/me/adapter",
        &[("config.json", b"{}"), ("README.md", b"")],
    );
    let again = job("second", "me/adapter");
    assert!(
        again.stdout.contains("this job is done already"),
        "{again:?}"
    );
    fixture
        .hub
        .commit("models/me/old", &[("adapter_config.json", b"{}")]);
    for (adapter, words) in [
        (
            "me/adapter",
            "it is a whole model, not an adapter; name it as base_model",
        ),
        ("me/old", "has no adapter_model.safetensors"),
        ("me/none", "is private or misspelled"),
    ] {
        let refused = job("third", adapter);
        let said: Vec<&str> = refused.stderr.split_whitespace().collect();
        assert!(
            !refused.status.success() && said.join(" ").contains(words),
            "{words}: {refused:?}"
        );
        assert!(!fixture.site.path("third").exists());
    }
}
