//! Shapes of rows as a job names them, under the names of several programs.

use super::*;

fn dataset(entry: &str) -> DatasetSpec {
    let text = format!("base_model: m\ndatasets:\n- path: a\n{entry}");
    load_text(&text)
        .unwrap_or_else(|errors| panic!("{errors}"))
        .datasets
        .remove(0)
}

fn refusal(entry: &str) -> String {
    let found = problems(load_text(&format!(
        "base_model: m\ndatasets:\n- path: a\n{entry}"
    )));
    found.join("; ")
}

#[test]
fn sharegpt_is_messages_under_its_names() {
    let found = dataset("  type: sharegpt\n");
    assert_eq!(
        (found.kind, found.fields),
        (DatasetKind::Messages, FieldNames::sharegpt())
    );
    let own = dataset("  type: sharegpt\n  field_messages: dialogue\n");
    assert_eq!(own.fields.messages, "dialogue");
    assert_eq!(own.fields.role, "from");
}

#[test]
fn roles_are_renamed_as_the_job_says() {
    let found = dataset("  roles:\n    user: [human, customer]\n    assistant: gpt\n");
    let pair = |own: &str, role: &str| (own.to_owned(), role.to_owned());
    let wanted = [
        pair("human", "user"),
        pair("customer", "user"),
        pair("gpt", "assistant"),
    ];
    assert_eq!(found.roles, wanted);
    let twice = refusal("  roles: {user: [a], assistant: [a]}\n");
    assert!(twice.contains("has `a` twice"), "{twice}");
}

#[test]
fn a_key_of_thinking_is_renamed_to_one_that_templates_read() {
    let thinking = |entry: &str| dataset(entry).fields.thinking;
    let pair = |own: &str, read: &str| Some([own.to_owned(), read.to_owned()]);
    assert_eq!(
        thinking("  field_thinking: thoughts\n  template_thinking_key: thinking\n"),
        pair("thoughts", "thinking")
    );
    assert_eq!(
        thinking("  field_thinking: thoughts\n"),
        pair("thoughts", "reasoning_content")
    );
    assert_eq!(thinking("  field_thinking: reasoning_content\n"), None);
    let other = refusal("  template_thinking_key: inner\n");
    assert!(
        other.contains("must be one of reasoning_content"),
        "{other}"
    );
}

#[test]
fn columns_of_another_shape_are_refused() {
    for (entry, wanted) in [
        (
            "  type: text\n  field_instruction: a\n",
            "type: instructions` only",
        ),
        (
            "  type: alpaca\n  field_system: a\n",
            "those of a text with a system message only",
        ),
        (
            "  type: instructions\n  field_messages: a\n",
            "is not read with",
        ),
        ("  type: alpaca\n  field_tools: a\n", "has no tools"),
    ] {
        let found = refusal(entry);
        assert!(found.contains(wanted), "{entry}: {found}");
    }
}

#[test]
fn a_text_of_the_jobs_own_is_given_as_fields_or_as_a_mapping() {
    let fields = "  type: user_defined\n  format: \"[{instruction}|{input}] \"\n  system_prompt: ''\n  field_output: reply\n";
    let mapping = "  type:\n    format: '[{instruction}|{input}] '\n    system_prompt: ''\n    field_output: reply\n    field_system:\n";
    for entry in [fields, mapping] {
        let found = dataset(entry);
        assert_eq!(found.kind, DatasetKind::Alpaca);
        assert_eq!(found.fields.output, "reply");
        let prompt = found.prompt.unwrap();
        assert_eq!(prompt.with_input, "[{instruction}|{input}] ");
        assert_eq!(prompt.without_input, "{instruction} ");
    }
    for (entry, wanted) in [
        (
            "  type: {format: '{output}'}\n",
            "`format` has `{output}`, and only {instruction} and {input}",
        ),
        (
            "  type: {no_input_format: '{input}'}\n",
            "and only {instruction} stand",
        ),
        ("  type: {system_format: '{'}\n", "single `{`"),
        (
            "  type: {format: 'Answer: {{instruction}}'}\n",
            "`format` shows nothing of a row: write {instruction} or {input} where its text goes",
        ),
        (
            "  type: {no_input_format: Answer}\n",
            "`no_input_format` shows nothing of a row: write {instruction} where",
        ),
        (
            "  type: {system_format: Be kind.}\n",
            "`system_format` shows nothing of a row: write {system} where",
        ),
        ("  type: {field: text}\n", "unknown field of `type` `field`"),
        (
            "  type: alpaca\n  format: a\n",
            "`format` is read with `type: user_defined` only",
        ),
    ] {
        let found = refusal(entry);
        assert!(found.contains(wanted), "{entry}: {found}");
    }
}

#[test]
fn types_of_axolotl_that_are_not_read_say_why() {
    for (name, wanted) in [
        ("chat_template.argilla", "preferences"),
        ("llama3.ultra", "preferences"),
        ("bradley_terry.chat_template", "reward model"),
        ("ebft_pretrain.transform", "reinforcement learning"),
        ("llama2_chat", "old type of Axolotl"),
        ("alpaca:chatty", "must be one of"),
    ] {
        let found = refusal(&format!("  type: {name}\n"));
        assert!(found.contains(wanted), "{name}: {found}");
    }
}

#[test]
fn alpaca_by_its_other_names_is_the_same_dataset() {
    let alpaca = dataset("  type: alpaca\n");
    assert_eq!(alpaca.prompt, None);
    for name in ["alpaca:instruct", "alpaca_instruct"] {
        assert_eq!(dataset(&format!("  type: {name}\n")), alpaca);
    }
    // The text is part of the job, so that a change of it is one of the digest.
    let chat = dataset("  type: alpaca:chat\n");
    assert!(
        chat.prompt
            .is_some_and(|prompt| prompt.with_input.starts_with("SYSTEM: Below"))
    );
}

#[test]
fn what_of_conversations_is_learned_is_read_by_axolotls_names() {
    let usual = dataset("").mask;
    let same = "  roles_to_train: [assistant]\n  train_on_eos: turn\n  train_on_eot: turn\n";
    assert_eq!(dataset(same).mask, usual);
    assert_eq!(dataset("  roles_to_train: [gpt]\n").mask, usual);
    let mask = dataset(
        "  roles: {assistant: [bot]}\n  roles_to_train: [bot, human]\n  train_on_eos: last\n  message_field_training: keep\n  message_field_training_detail: spans\n",
    )
    .mask;
    let name = |text: &str| Some(text.to_owned());
    assert_eq!(
        mask.roles,
        Some(vec!["assistant".to_owned(), "user".to_owned()])
    );
    assert_eq!((mask.eos, mask.eot), (EndOfTurn::Last, EndOfTurn::Last));
    assert_eq!(
        (mask.training, mask.training_detail),
        (name("keep"), name("spans"))
    );
    assert_eq!(
        dataset("  roles_to_train: []\n").mask.roles,
        Some(Vec::new())
    );
    let of_job = |lines: &str| load_text(&format!("base_model: m\ndatasets: a\n{lines}"));
    assert!(
        of_job("mask_history: true\n").unwrap().datasets[0]
            .mask
            .last_only
    );
    for (entry, wanted) in [
        (
            "  train_on_eot: none\n",
            "without `eot_tokens` both are of the same token",
        ),
        ("  type: text\n  train_on_eos: all\n", "is of conversations"),
        (
            "  message_field_training: a\n  message_field_training_detail: a\n",
            "both name `a`",
        ),
        (
            "train_on_inputs: true\nmask_history: true\n",
            "and `train_on_inputs` that everything is",
        ),
        (
            "  train_on_eos: none\ntrain_on_inputs: true\n",
            "and `train_on_inputs` that everything is",
        ),
    ] {
        let found = refusal(entry);
        assert!(found.contains(wanted), "{entry}: {found}");
    }
    let two = "  train_on_eos: none\n  train_on_eot: turn\n  eot_tokens: [<end>]\n";
    let mask = dataset(two).mask;
    assert_eq!((mask.eos, mask.eot), (EndOfTurn::None, EndOfTurn::Turn));
}

#[test]
fn thinking_may_be_mapped_as_a_property_of_messages() {
    let mapped =
        dataset("  message_property_mappings: {role: from, content: value, thinking: thoughts}\n");
    let wanted = Some(["thoughts".to_owned(), "thinking".to_owned()]);
    assert_eq!(mapped.fields.thinking, wanted);
    assert_eq!(mapped.fields.role, "from");
}

#[test]
fn text_to_pretrain_on_is_a_dataset_of_text() {
    for entry in [
        "pretraining_dataset: a\n",
        "pretraining_dataset:\n- path: a\n  type: pretrain\n  text_column: body\n",
    ] {
        let found = load_text(&format!("base_model: m\n{entry}")).unwrap();
        assert_eq!(found.datasets[0].kind, DatasetKind::Text, "{entry}");
    }
}

/// A folder with a job file, LLaMA-Factory's dataset_info.json, and data.
fn llama_factory(info: &str, job: &str) -> Result<JobSpec, JobErrors> {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("data")).unwrap();
    fs::write(dir.path().join("data/dataset_info.json"), info).unwrap();
    fs::write(dir.path().join("plain.jsonl"), "{}").unwrap();
    let path = dir.path().join("job.yaml");
    let stage = match job.contains("stage:") {
        true => "",
        false => "stage: sft\n",
    };
    fs::write(&path, format!("model_name_or_path: m\n{stage}{job}")).unwrap();
    load(JobSources {
        file: Some(path),
        ..JobSources::default()
    })
}

const INFO: &str = r#"{
    "one": {"file_name": "one.json"},
    "two": {
        "file_name": "two.json", "formatting": "sharegpt", "num_samples": 7,
        "columns": {"messages": "dialogue", "tools": "functions", "system": "rules"},
        "tags": {"role_tag": "speaker", "content_tag": "text", "user_tag": "client", "assistant_tag": "agent"}
    },
    "pairs": {"file_name": "c.json", "ranking": true, "columns": {"prompt": "p", "chosen": "c", "rejected": "r"}}
}"#;

#[test]
fn the_stage_that_pretrains_learns_the_prompts_as_texts() {
    let info = r#"{
        "crawl": {"file_name": "c.jsonl", "columns": {"prompt": "body", "response": "summary"}},
        "both": {"file_name": "c.jsonl", "columns": {"prompt": "body", "query": "more"}},
        "plain": {"file_name": "c.jsonl"},
        "chats": {"file_name": "c.jsonl", "formatting": "sharegpt"}
    }"#;
    assert!(llama_factory(info, "stage: PT\ndataset: both\n").is_err());
    let of = |job: &str| llama_factory(info, &format!("stage: pt\n{job}"));
    let job = of("dataset: crawl, plain.jsonl\n").unwrap();
    let kinds: Vec<DatasetKind> = job.datasets.iter().map(|one| one.kind).collect();
    assert_eq!(kinds, [DatasetKind::Text, DatasetKind::Text]);
    assert_eq!(job.datasets[0].fields.text, "body");
    for (dataset, words) in [
        ("dataset: both\n", ["`query`", "stage: sft"]),
        ("dataset: plain\n", ["columns: {prompt: COLUMN}", "`plain`"]),
        ("dataset: chats\n", ["conversations", "`chats`"]),
        (
            "datasets:\n- path: plain.jsonl\n  split: train\n",
            ["type: text", "stage: sft"],
        ),
    ] {
        let message = of(dataset).unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
    of("datasets:\n- path: plain.jsonl\n  type: text\n").unwrap();
}

#[test]
fn names_of_llama_factory_are_looked_up() {
    let job = llama_factory(
        INFO,
        "dataset: one, two\ntemplate: qwen3\nmax_samples: 5\nlora_rank: 4\n",
    )
    .unwrap();
    let [one, two] = &job.datasets[..] else {
        panic!("{:?}", job.datasets)
    };
    assert!(one.path.ends_with("data/one.json"));
    assert_eq!(
        (one.kind, one.max_samples),
        (DatasetKind::Instructions, Some(5))
    );
    assert_eq!(
        (two.kind, two.max_samples),
        (DatasetKind::Messages, Some(7))
    );
    let names = [
        &two.fields.messages,
        &two.fields.role,
        &two.fields.content,
        &two.fields.tools,
    ];
    assert_eq!(names, ["dialogue", "speaker", "text", "functions"]);
    assert_eq!(two.roles.len(), 2);
    assert!(two.has_system_column && two.fields.system == "rules");
    assert_eq!(
        job.chat_template,
        TemplateChoice::Named("llamafactory/qwen3".to_owned())
    );
    let Method::Lora(lora) = &job.method else {
        panic!("LLaMA-Factory trains an adapter where nothing is said")
    };
    assert_eq!((lora.r, lora.alpha), (4, 8.0));
    assert!(
        job.reading
            .notices
            .iter()
            .any(|notice| notice.contains("LLaMA-Factory"))
    );
}

#[test]
fn what_llama_factory_names_and_muster_has_not_is_told() {
    for (job, wanted) in [
        ("dataset: on\n", "neither in"),
        ("dataset: pairs\n", "`field_chosen` is not supported"),
        ("dataset: one\ntemplate: qwen_3\n", "did you mean `qwen3`?"),
        (
            "dataset: one\ndataset_dir: elsewhere\n",
            "there is no such file",
        ),
    ] {
        let found = problems(llama_factory(INFO, job)).join("; ");
        assert!(found.contains(wanted), "{job}: {found}");
    }
}

#[test]
fn without_its_keys_a_comma_belongs_to_the_name() {
    let job = load_text("base_model: m\ndatasets: 'a,b'\n").unwrap();
    assert_eq!(job.datasets.len(), 1);
}

#[test]
fn layers_may_be_named_by_a_pattern() {
    let of = |targets: &str| {
        let job = job(&format!("adapter: lora\nlora_target_modules: {targets}\n"));
        match job.method {
            Method::Lora(lora) => lora.target_modules,
            Method::Full => panic!("a LoRA job"),
        }
    };
    let pattern = r"model.layers.[\d]+.(mlp|self_attn).(up|q)_proj";
    assert_eq!(
        of(&format!("'{pattern}'")),
        TargetModules::Matching(pattern.to_owned())
    );
    assert!(
        problems_of("adapter: lora\nlora_target_modules: '('\n")[0]
            .contains("no regular expression")
    );
    assert!(
        problems_of("adapter: lora\nlora_target_modules: ['a.*']\n")[0].contains("stands alone")
    );
}

#[test]
fn fields_of_an_adapter_that_is_none_are_told() {
    let job = job("adapter:\nlora_r: 8\nlora_alpha: 16\n");
    assert_eq!(job.method, Method::Full);
    let notice = "not used, because `adapter` is empty: lora_r, lora_alpha";
    assert!(
        job.reading.notices.iter().any(|told| told == notice),
        "{:?}",
        job.reading.notices
    );
    assert_eq!(
        problems_of("lora_r: 8\n"),
        ["3: `lora_r` has no effect without `adapter: lora`"]
    );
}
