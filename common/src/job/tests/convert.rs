//! Jobs in Muster's own spelling.

use super::*;

fn converted(text: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.yaml");
    fs::write(&path, text).unwrap();
    convert(&path).unwrap_or_else(|errors| panic!("{errors}"))
}

const AXOLOTL: &str = "base_model: m\noptimizer: adamw_bnb_8bit\ntf32: true\ndatasets:\n  - path: a.jsonl\n    type: chat_template\n    \
    field_messages: conversations\n    message_property_mappings: {role: from, content: value}\n    roles: {user: [human], assistant: ['on']}\n  \
    - path: b c.jsonl\n    type: alpaca\nadapter: lora\nlora_r: 8\nlora_target_modules: [q_proj, v_proj]\n\
    num_epochs: 1\nlearning_rate: 2e-4\nmicro_batch_size: 2\nchat_template_kwargs: {enable_thinking: false}\ncluster: {min_workers: 2}\n";

#[test]
fn a_converted_job_is_the_same_job() {
    let llama_factory = "model_name_or_path: m\nstage: sft\ntemplate: qwen3\ndataset: a.jsonl, b.jsonl\nfinetuning_type: lora\nlora_rank: 4\n\
                         cutoff_len: 64\nnum_train_epochs: 2.0\n";
    let user_defined = "base_model: m\ndatasets:\n- path: a\n  type:\n    system_prompt: ''\n    format: |-\n      Q: {instruction}\n      {input}\n\n    no_input_format: '{instruction} '\n";
    for text in [AXOLOTL, llama_factory, user_defined] {
        let own = converted(text);
        let (before, after) = (load_text(text).unwrap(), load_text(&own).unwrap());
        let without_notices = |mut job: JobSpec| {
            job.reading.notices.clear();
            job
        };
        assert_eq!(without_notices(before), without_notices(after), "{own}");
    }
}

#[test]
fn what_is_not_done_stands_at_the_top_and_other_names_beside_ours() {
    let own = converted(AXOLOTL);
    let comments: Vec<&str> = own
        .lines()
        .take_while(|line| line.starts_with('#'))
        .collect();
    assert!(comments.iter().any(|line| line.contains("tf32")), "{own}");
    assert!(
        comments.iter().any(|line| line.contains("optimizer")),
        "{own}"
    );
    assert!(!own.contains("\ntf32"), "{own}");
    let own = converted("model_name_or_path: m\ntrain_file: a.jsonl\nmax_seq_length: 64\n");
    assert!(
        own.contains("base_model: m  # model_name_or_path\n"),
        "{own}"
    );
    assert!(
        own.contains("sequence_len: 64  # max_seq_length\n"),
        "{own}"
    );
}

#[test]
fn the_schema_has_every_name_of_the_table() {
    let schema = schema();
    for field in fields() {
        let place = match field.name.split_once('.') {
            Some(("cluster", name)) => format!("/properties/cluster/properties/{name}"),
            Some((_, name)) => {
                format!("/properties/datasets/anyOf/1/items/anyOf/1/properties/{name}")
            }
            None => format!("/properties/{}", field.name),
        };
        assert!(schema.pointer(&place).is_some(), "{place}");
    }
}

#[test]
fn a_token_is_printed_nowhere() {
    let own =
        converted("base_model: m\ndatasets: a\nhub_model_id: b/c\nhub_token: hf_verySecret\n");
    assert!(
        !own.contains("hf_verySecret") && own.contains("hub_token is left out"),
        "{own}"
    );
}
