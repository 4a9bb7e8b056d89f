//! Where a job is read from: a file, flags, the environment, and what its paths are relative to.

use super::*;

#[test]
fn variables_of_a_kubernetes_service_are_passed_over_with_a_notice() {
    let of_service = [
        ("MUSTER_SERVICE_HOST", "10.0.0.1"),
        ("MUSTER_SERVICE_PORT", "7077"),
        ("MUSTER_SERVICE_PORT_GRPC", "7077"),
        ("MUSTER_PORT", "tcp://10.0.0.1:7077"),
        ("MUSTER_PORT_7077_TCP", "tcp://10.0.0.1:7077"),
        ("MUSTER_PORT_7077_TCP_PROTO", "tcp"),
        ("MUSTER_PORT_7077_TCP_PORT", "7077"),
        ("MUSTER_PORT_7077_TCP_ADDR", "10.0.0.1"),
        ("MUSTER_COORDINATOR_PORT", "tcp://[fd00::1]:7077"),
        ("MUSTER_LISTEN_PORT", "tcp://10.0.0.1:7077"),
        ("MUSTER_LISTEN_PORT_7077_TCP_ADDR", "10.0.0.1"),
        ("MUSTER_LISTEN_SERVICE_HOST", "10.0.0.1"),
    ];
    let job = load_with(SMALL, &of_service, &[]).unwrap();
    let [notice] = job.reading.notices.as_slice() else {
        panic!("{:?}", job.reading.notices)
    };
    assert!(notice.contains("MUSTER_SERVICE_HOST") && notice.contains("enableServiceLinks: false"));
    for (name, value) in [
        ("MUSTER_PORT", "7077"),
        ("MUSTER_SERVICE_HOST", "many"),
        ("MUSTER_SEED_PORT", "1"),
        ("MUSTER_SERVICE_PORT", "tcp"),
    ] {
        let found = problems(load_with(SMALL, &[(name, value)], &[]));
        assert!(found[0].contains("unknown field"), "{name}: {found:?}");
    }
}

#[test]
fn flags_beat_the_environment_and_that_beats_the_file() {
    let text = format!("{SMALL}learning_rate: 1e-3\nsequence_len: 64\nseed: 1\n");
    let environment = [
        ("MUSTER_LEARNING_RATE", "2e-3"),
        ("MUSTER_MAX_LENGTH", "128"),
        ("MUSTER_CLUSTER_MIN_WORKERS", "3"),
        ("HOME", "/"),
        ("MUSTER_TOKEN", "secret"),
        ("MUSTER_COORDINATOR_SERVICE_HOST", "10.0.0.1"),
        ("MUSTER_COORDINATOR_PORT_7077_TCP", "tcp://10.0.0.1:7077"),
        ("MUSTER_SEED", ""),
    ];
    let flags = [
        ("lr", "3e-3"),
        ("--num-epochs", "2"),
        ("cluster.max_workers", "5"),
        ("--learning_rate", "0.003"),
    ];
    let job = load_with(&text, &environment, &flags).unwrap();
    assert_eq!(job.learning_rate, 3e-3);
    assert_eq!(job.sequence_len, 128);
    assert_eq!(job.seed, 1);
    assert_eq!(job.num_epochs, 2.0);
    assert_eq!(
        job.cluster,
        ClusterSpec {
            min_workers: 3,
            max_workers: Some(5)
        }
    );
}

#[test]
fn a_later_source_replaces_what_it_excludes() {
    let text = format!(
        "{SMALL}warmup_ratio: 0.1\nadapter: lora\nlora_r: 8\nglobal_batch_size: 16\nmax_steps: 100\n"
    );
    let flags = [
        ("warmup_steps", "5"),
        ("adapter", "full"),
        ("gradient_accumulation_steps", "4"),
        ("micro_batch_size", "2"),
        ("max_steps", "30"),
    ];
    let job = load_with(&text, &[], &flags).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(job.warmup, Warmup::Steps(5));
    assert_eq!(job.method, Method::Full);
    assert_eq!(job.global_batch_size, 8);
}

#[test]
fn a_flag_reaches_into_a_dataset() {
    let text = "base_model: m\ndatasets:\n- path: a.jsonl\n- path: b.jsonl\n  type: text\n";
    let flags = [
        ("datasets.1.path", "c.jsonl"),
        ("datasets.2.path", "d.jsonl"),
        ("datasets.2.type", "messages"),
    ];
    let job = load_with(text, &[("MUSTER_DATASETS_0_FIELD_TEXT", "body")], &flags).unwrap();
    let paths: Vec<_> = job
        .datasets
        .iter()
        .map(|d| d.path.to_str().unwrap())
        .collect();
    assert_eq!(paths, ["a.jsonl", "c.jsonl", "d.jsonl"]);
    assert_eq!(job.datasets[0].fields.text, "body");
    assert_eq!(job.datasets[1].kind, DatasetKind::Text);
    assert_eq!(job.datasets[2].kind, DatasetKind::Messages);
    let replaced = load_with(text, &[], &[("--dataset", "x.jsonl")]).unwrap();
    assert_eq!(replaced.datasets.len(), 1);
    let listed = load_with(
        text,
        &[],
        &[("datasets", "[x.jsonl, {path: y.jsonl, type: text}]")],
    )
    .unwrap();
    assert_eq!(listed.datasets[1].kind, DatasetKind::Text);
}

#[test]
fn a_job_is_possible_from_flags_alone() {
    let flags = [
        ("--base-model", "m"),
        ("--dataset", "d.jsonl"),
        ("--adapter", "lora"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let job = load(JobSources {
        flags: flags.to_vec(),
        ..JobSources::default()
    })
    .unwrap();
    assert!(matches!(job.method, Method::Lora(_)));
    let nothing = load(JobSources::default());
    assert_eq!(
        problems(nothing),
        [
            "job: `base_model` is missing: the model to fine-tune, a folder or an id on the hub",
            "job: `datasets` is missing: the data to train on",
        ]
    );
}

#[test]
fn flag_text_is_taken_as_it_is() {
    let prompt = "[What is 2: 3?]";
    let job = load_with(
        SMALL,
        &[],
        &[("test_prompt", "What: [is] it?"), ("output_dir", "[out]")],
    )
    .unwrap();
    assert_eq!(job.test_prompts, ["What: [is] it?"]);
    assert_eq!(job.output_dir, PathBuf::from("[out]"));
    let quoted = load_with(SMALL, &[], &[("test_prompts", &format!("['{prompt}', b]"))]).unwrap();
    assert_eq!(quoted.test_prompts, [prompt, "b"]);
}

#[test]
fn relative_inputs_lie_in_the_current_folder_or_beside_the_job_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.yaml");
    fs::write(dir.path().join("data.jsonl"), "").unwrap();
    fs::write(
        &path,
        "base_model: src\ndatasets: [data.jsonl, missing.jsonl]\noutput_dir: out\n",
    )
    .unwrap();
    let job = load(JobSources {
        file: Some(path),
        ..JobSources::default()
    })
    .unwrap();
    assert_eq!(
        job.base_model,
        PathBuf::from("src"),
        "the crate's own src, from the current folder"
    );
    assert_eq!(job.datasets[0].path, dir.path().join("data.jsonl"));
    assert_eq!(job.datasets[1].path, PathBuf::from("missing.jsonl"));
    assert_eq!(job.output_dir, PathBuf::from("out"));
}

#[test]
fn an_adapter_that_is_no_folder_is_found_by_whoever_loads_the_job() {
    let (dir, jobs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config =
        r#"{"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["v_proj","q_proj"]}"#;
    fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    let file = jobs.path().join("job.yaml");
    let load = |lines: &str| {
        fs::write(&file, format!("{SMALL}{lines}")).unwrap();
        let sources = JobSources {
            file: Some(file.clone()),
            ..JobSources::default()
        };
        load_with_adapter(sources, &|request| match request.written.to_str() {
            Some("owner/adapter") => {
                assert_eq!(request.output_dir, "out");
                Ok(Some(FoundAdapter {
                    folder: dir.path().to_owned(),
                    id: "Owner/adapter".into(),
                    commit: "0a1b2c3d4e".into(),
                    notice: request.begins_anew.then(|| "anew".to_owned()),
                }))
            }
            _ => Err("it is gated".to_owned()),
        })
    };
    let named = "adapter: lora\noutput_dir: out\nadapter_name_or_path: owner/adapter\n";
    let job = load(&format!("{named}resume: never\n")).unwrap();
    assert_eq!(job.reading.notices, ["anew"]);
    let Method::Lora(lora) = &job.method else {
        panic!("not lora")
    };
    assert_eq!(lora.r, 4);
    assert_eq!(lora.model_dir.as_deref(), Some(dir.path()));
    let source = lora.model_source.as_ref().unwrap();
    assert_eq!(source.shown(), "Owner/adapter at 0a1b2c3d");
    // It is the same job from a folder of that content.
    let local = load(&format!(
        "adapter: lora\noutput_dir: out\nlora_model_dir: {}\n",
        dir.path().display()
    ));
    assert_eq!(local.unwrap().digest(), job.digest());
    assert_eq!(
        problems(load("adapter: lora\nlora_model_dir: other/adapter\n")),
        ["4: `lora_model_dir` cannot be started from: other/adapter: it is gated"]
    );
}

#[test]
fn a_file_from_windows_is_read() {
    let text =
        "\u{feff}base_model: m\r\ndatasets:\r\n- path: d.jsonl\r\n  type: text\r\nseed: 7\r\n";
    let job = load_text(text).unwrap();
    assert_eq!((job.seed, job.base_model), (7, PathBuf::from("m")));
    let wrong = problems(load_text(&text.replace("seed: 7", "sed: 7")));
    assert_eq!(wrong, ["5: unknown field `sed`; did you mean `seed`?"]);
}

#[test]
fn anchors_and_long_texts_are_yaml_too() {
    let job = job(
        "test_prompts:\n- &first |\n  line one\n  line two\n- *first\n- >-\n  folded\n  text\n- 42\n",
    );
    assert_eq!(
        job.test_prompts,
        [
            "line one\nline two\n",
            "line one\nline two\n",
            "folded text",
            "42"
        ]
    );
}

#[test]
fn variables_that_trl_would_set_are_named_and_not_set() {
    let read = job("env:\n  CUDA_VISIBLE_DEVICES: 0\n  HF_TOKEN: hf_verySecret\n");
    assert_eq!(
        read.reading.notices,
        [
            "env: not set, because a job changes no variables: CUDA_VISIBLE_DEVICES, HF_TOKEN (set them where the command is given)"
        ]
    );
    assert_eq!(job("env:\n").reading.notices, ["unknown, but empty: env"]);
    check_problems(
        "env: HF_TOKEN\n",
        &["3: `env` is a mapping of variables, found `HF_TOKEN`"],
    );
}
