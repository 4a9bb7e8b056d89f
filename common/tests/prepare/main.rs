//! Rows of a dataset become blocks, or every row that cannot be used is named.
#![allow(clippy::unwrap_used)]

mod asked;
mod blocks;
mod evaluation;
mod lengths;
mod rows;
#[path = "../support/mod.rs"]
mod support;
mod templates;

use std::path::Path;

use common::data::block::Block;
use common::data::template::ChatTemplate;
use common::data::tokenize::Tokenizer;
use common::data::{DataErrors, PreparedData, origins, prepare_blocks, prune_blocks, samples};
use common::job::{
    DatasetKind, DatasetSpec, ExcessLength, FieldNames, JobSources, JobSpec, ValSetSize,
};
use common::progress::Progress;
use support::{template_text, write_model};

struct Setup {
    folder: tempfile::TempDir,
    job: JobSpec,
}

impl Setup {
    /// A job on these rows, in blocks of 32 tokens.
    fn new(rows: &str) -> Self {
        Self::with_template(rows, Some("chatml_generation"))
    }

    fn with_template(rows: &str, template: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = template.map(template_text);
        write_model(folder.path(), text.as_deref(), "<|im_end|>");
        let data = folder.path().join("data.jsonl");
        std::fs::write(&data, rows).unwrap();
        let flag = |name: &str, value: &Path| (name.to_owned(), value.display().to_string());
        let mut job = common::job::load(JobSources {
            flags: vec![
                flag("base_model", folder.path()),
                flag("dataset", &data),
                flag("output_dir", &folder.path().join("out")),
                ("sequence_len".to_owned(), "32".to_owned()),
            ],
            ..JobSources::default()
        })
        .unwrap();
        job.datasets = vec![DatasetSpec::new(
            data,
            DatasetKind::Auto,
            FieldNames::default(),
        )];
        Self { folder, job }
    }

    fn parts(&self) -> (Tokenizer, Option<ChatTemplate>) {
        (
            Tokenizer::load(self.folder.path()).unwrap(),
            ChatTemplate::load_optional(self.folder.path()).unwrap(),
        )
    }

    fn prepare(&self) -> Result<PreparedData, DataErrors> {
        let (tokenizer, template) = self.parts();
        let out = self.folder.path().join("out/.muster");
        prepare_blocks(
            &self.job,
            &tokenizer,
            template.as_ref(),
            &out,
            &Progress::default(),
        )
    }

    fn problems(&self) -> Vec<String> {
        let errors = self.prepare().unwrap_err();
        let dir = format!("{}/", self.folder.path().display());
        errors
            .problems
            .iter()
            .map(|problem| problem.to_string().replace(&dir, ""))
            .collect()
    }
}

fn blocks(data: &PreparedData) -> Vec<Block> {
    (0..data.file.total_blocks())
        .map(|block| {
            let bytes = data.file.block_bytes(block).unwrap();
            Block::decode(bytes, data.file.sequence_len()).unwrap()
        })
        .collect()
}

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}"#;

fn row(messages: &str, more: &str) -> String {
    format!("{{\"messages\": {messages}{more}}}")
}

const TURNS: &str =
    r#"[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]"#;

/// Why a row cannot be used.
fn reason(row: &str) -> String {
    let problems = Setup::new(&format!("{CHAT}\n{row}\n")).problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    problems[0]
        .strip_prefix("data.jsonl:2: ")
        .unwrap()
        .to_owned()
}
