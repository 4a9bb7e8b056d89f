//! What a well-written job means.

use super::*;

#[test]
fn a_job_of_two_lines_has_every_default() {
    let job = job("");
    assert_eq!(job.base_model, PathBuf::from("models/tiny"));
    assert_eq!(job.datasets.len(), 1);
    assert_eq!(job.datasets[0].path, PathBuf::from("data.jsonl"));
    assert_eq!(job.datasets[0].kind, DatasetKind::Auto);
    assert_eq!(job.method, Method::Full);
    assert_eq!(job.learning_rate, 2e-5);
    assert_eq!(job.sequence_len, 2048);
    assert_eq!((job.global_batch_size, job.micro_batch_size), (8, 1));
    assert_eq!(job.warmup, Warmup::Ratio(0.03));
    assert_eq!(job.lr_scheduler, LrScheduler::Cosine);
    assert_eq!(job.max_grad_norm, Some(1.0));
    assert_eq!(job.resume, Resume::Auto);
    assert_eq!(
        job.cluster,
        ClusterSpec {
            min_workers: 1,
            max_workers: None
        }
    );
    assert_eq!(job.seed, 42);
    assert!(job.sample_packing && job.shuffle && !job.train_on_inputs);
}

#[test]
fn lora_has_its_own_learning_rate_and_defaults() {
    let job = job("adapter: lora\n");
    assert_eq!(job.learning_rate, 2e-4);
    let Method::Lora(lora) = job.method else {
        panic!("not lora")
    };
    assert_eq!((lora.r, lora.alpha, lora.dropout), (16, 32.0, 0.0));
    assert_eq!(lora.target_modules, TargetModules::AllLinear);
}

#[test]
fn the_names_of_trl_and_transformers_mean_the_same() {
    let axolotl = job(
        "sequence_len: 64\nadapter: lora\nlora_r: 4\nlora_target_modules: [q_proj]\nmicro_batch_size: 2\nglobal_batch_size: 8\n\
         num_epochs: 3\nlearning_rate: 1e-3\nlr_scheduler: linear\nadam_epsilon: 1e-6\nmax_grad_norm: 0.5\nresume: never\n\
         sample_packing: false\nbase_dtype: bfloat16\noutput_dir: out\ntrain_on_inputs: true\n",
    );
    let trl = load_text(
        "model_name_or_path: models/tiny\ntrain_file: data.jsonl\nmax_length: 64\nuse_peft: true\nr: 4\ntarget_modules: [q_proj]\n\
         per_device_train_batch_size: 2\ngradient_accumulation_steps: 4\nnum_train_epochs: 3\nlr: 1e-3\nlr_scheduler_type: linear\n\
         adam_eps: 1e-6\ngradient_clipping: 0.5\nresume_from_checkpoint: false\npacking: false\ntorch_dtype: bfloat16\noutput_dir: out\n\
         assistant_only_loss: false\n",
    )
    .unwrap();
    assert_eq!(axolotl, trl);
}

#[test]
fn an_empty_key_leaves_its_other_names_free() {
    for text in [
        "resume_from_checkpoint:\nauto_resume_from_checkpoints: false\n",
        "auto_resume_from_checkpoints: false\nresume_from_checkpoint:\n",
    ] {
        assert_eq!(job(text).resume, Resume::Never, "{text}");
    }
}

#[test]
fn an_axolotl_file_is_read_as_it_is() {
    let job = load_text(
        "base_model: models/tiny\nmodel_type: AutoModelForCausalLM\nload_in_8bit: false\nload_in_4bit: false\nstrict: false\n\
         datasets:\n  - path: a.jsonl\n    type: chat_template\n    field_messages: conversations\n    message_property_mappings:\n      role: from\n      content: value\n  - path: b.jsonl\n    type: completion\n    field: body\n\
         val_set_size: 0.05\nsequence_len: 1024\nsample_packing: true\npad_to_sequence_len: true\nadapter: lora\nlora_model_dir:\n\
         lora_r: 32\nlora_alpha: 16\nlora_dropout: 0.05\nlora_target_linear: true\nwandb_project:\ngradient_accumulation_steps: 4\n\
         micro_batch_size: 2\noptimizer: adamw_torch\nlr_scheduler: cosine\nbf16: auto\ntf32: false\nflash_attention: true\n\
         warmup_steps: 10\nweight_decay: 0.0\nspecial_tokens:\n",
    )
    .unwrap();
    assert_eq!(job.global_batch_size, 8);
    assert_eq!(job.val_set_size, ValSetSize::Fraction(0.05));
    assert_eq!(job.datasets[0].kind, DatasetKind::Messages);
    assert_eq!(job.datasets[0].fields.messages, "conversations");
    assert_eq!(job.datasets[0].fields.role, "from");
    assert_eq!(job.datasets[1].kind, DatasetKind::Text);
    assert_eq!(job.datasets[1].fields.text, "body");
}

#[test]
fn numbers_are_read_as_people_write_them() {
    assert_eq!(job("learning_rate: 1e-4\n").learning_rate, 1e-4);
    assert_eq!(job("learning_rate: '1e-4'\n").learning_rate, 1e-4);
    assert_eq!(job("max_steps: 1_000\n").max_steps, Some(1000));
    assert_eq!(job("max_steps: -1\n").max_steps, None);
    assert_eq!(job("seed: 18446744073709551615\n").seed, u64::MAX);
    assert_eq!(job("warmup_steps: 0.1\n").warmup, Warmup::Ratio(0.1));
    assert_eq!(job("warmup_steps: 7\n").warmup, Warmup::Steps(7));
    assert_eq!(
        job("val_set_size: 12\n").val_set_size,
        ValSetSize::Examples(12)
    );
    assert_eq!(job("max_grad_norm: 0\n").max_grad_norm, None);
    assert_eq!(job("save_steps: 0\n").save_steps, SaveSteps::Never);
    assert_eq!(job("save_steps: 7\n").save_steps, SaveSteps::Every(7));
    assert_eq!(job("save_steps: auto\n").save_steps, SaveSteps::Auto);
    assert_eq!(job("").save_steps, SaveSteps::Auto);
    assert_eq!(job("micro_batch_size: 3\n").global_batch_size, 9);
    assert!(!job("shuffle: No\n").shuffle);
}

#[test]
fn null_means_not_given() {
    assert_eq!(
        job(
            "learning_rate:\nseed: null\nsave_total_limit: ~\ndatasets_x: \n"
                .replace("datasets_x: \n", "")
                .as_str()
        ),
        job("")
    );
    let unset = load_with(
        &format!("{SMALL}max_steps: 5\n"),
        &[],
        &[("max_steps", "null")],
    )
    .unwrap();
    assert_eq!(unset.max_steps, None);
}

#[test]
fn target_modules_are_a_list_a_text_or_all_linear() {
    let modules = |lines: &str| match job(&format!("adapter: lora\n{lines}")).method {
        Method::Lora(lora) => lora.target_modules,
        Method::Full => panic!("not lora"),
    };
    let named = TargetModules::Named(vec!["q_proj".into(), "v_proj".into()]);
    assert_eq!(modules("lora_target_modules: [v_proj, q_proj]\n"), named);
    assert_eq!(modules("lora_target_modules: q_proj, v_proj\n"), named);
    assert_eq!(modules("lora_target_modules:\n- q_proj\n- v_proj\n"), named);
    assert_eq!(
        modules("lora_target_modules: all-linear\n"),
        TargetModules::AllLinear
    );
    assert_eq!(
        modules("lora_target_modules: [q_proj]\nlora_target_linear: true\n"),
        TargetModules::AllLinear
    );
    assert_eq!(modules("lora_target_modules:\n"), TargetModules::AllLinear);
}

#[test]
fn what_is_passed_over_is_named_once_in_one_line() {
    let notices = |lines: &str| job(lines).reading.notices;
    assert_eq!(
        notices(
            "tf32: true\nmodel_type: LlamaForCausalLM\nflash_attention: false\ndataloader_num_workers: 4\noptim: adamw_torch\n\
             load_in_4bit: false\ndeepspeed:\nsave_safetensors: true\n"
        ),
        ["not needed here: tf32, model_type, flash_attention, dataloader_num_workers"]
    );
    assert_eq!(
        notices("torchdistx_path:\nlerning_rate:\n"),
        ["unknown, but empty: torchdistx_path, lerning_rate"]
    );
    assert!(notices("learning_rate:\n").is_empty());
}

#[test]
fn transformers_strategies_say_when_to_save_and_evaluate() {
    assert_eq!(job("save_strategy: no\n").save_steps, SaveSteps::Never);
    assert_eq!(
        job("save_strategy: no\nsave_steps: 0\n").save_steps,
        SaveSteps::Never
    );
    assert_eq!(job("save_strategy: steps\n").save_steps, SaveSteps::Auto);
    assert_eq!(
        job("save_strategy: steps\nsave_steps: 7\n").save_steps,
        SaveSteps::Every(7)
    );
    let later = load_with(
        &format!("{SMALL}save_strategy: no\n"),
        &[],
        &[("save_steps", "5")],
    );
    assert_eq!(later.unwrap().save_steps, SaveSteps::Every(5));
    let evaluated = job("evaluation_strategy: steps\neval_steps: 3\nval_set_size: 2\n");
    assert_eq!(evaluated.eval_steps, Some(3));
    assert_eq!(job("eval_strategy: no\n").eval_steps, None);
}

#[test]
fn a_split_is_all_of_a_file_or_some_of_its_rows() {
    let rows = |split: &str| -> Vec<RowRange> {
        let text = format!("base_model: m\ndatasets:\n- path: d\n  split: '{split}'\n");
        let split = load_text(&text).unwrap().datasets[0].rows().unwrap();
        split.slices().iter().map(|slice| slice.range(50)).collect()
    };
    assert_eq!(rows("train"), [(0, usize::MAX)]);
    assert_eq!(rows("train[100:200]"), [(100, 200)]);
    assert_eq!(rows("train[:10%]+train[-2:]"), [(0, 5), (48, usize::MAX)]);
}

#[test]
fn a_starting_adapter_gives_the_shape() {
    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"peft_type":"LORA","r":4,"lora_alpha":8,"lora_dropout":0.1,"use_rslora":true,"use_dora":true,"target_modules":["v_proj","q_proj"]}"#;
    fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    let start = format!("adapter: lora\nlora_model_dir: {}\n", dir.path().display());
    let Method::Lora(lora) = job(&start).method else {
        panic!("not lora")
    };
    assert_eq!(
        (lora.r, lora.alpha, lora.dropout, lora.use_rslora),
        (4, 8.0, 0.1, true)
    );
    assert!(lora.use_dora);
    check_problems(
        &format!("{start}use_dora: false\n"),
        &["5: `use_dora` differs from the adapter of lora_model_dir; remove it"],
    );
    assert_eq!(
        lora.target_modules,
        TargetModules::Named(vec!["q_proj".into(), "v_proj".into()])
    );
    check_problems(
        &format!("{start}lora_r: 16\n"),
        &["5: `lora_r` is 16, but the adapter of lora_model_dir has rank 4; remove it"],
    );
    let missing = problems_of("adapter: lora\nlora_model_dir: /nowhere/adapter\n");
    assert!(
        missing[0].starts_with(
            "4: `lora_model_dir` cannot be started from: /nowhere/adapter: there is no such folder"
        ),
        "{missing:?}"
    );
    for (found, changed, word) in [
        ("0.1", "\"0.1\"", "lora_dropout"),
        ("0.1", "1.5", "lora_dropout"),
        ("true", "\"yes\"", "use_rslora"),
        ("\"r\":4", "\"r\":\"4\"", "r and lora_alpha"),
    ] {
        let path = dir.path().join("adapter_config.json");
        fs::write(path, config.replace(found, changed)).unwrap();
        let problems = problems_of(&start);
        assert!(problems[0].contains(word), "{problems:?}");
    }
    let model = tempfile::tempdir().unwrap();
    fs::write(model.path().join("config.json"), "{}").unwrap();
    let whole = format!(
        "adapter: lora\nlora_model_dir: {}\n",
        model.path().display()
    );
    let problems = problems_of(&whole);
    assert!(
        problems[0].contains("name it as base_model"),
        "{problems:?}"
    );
}

/// Workers compare the digest of the job that they were sent with that of the one that was read.
#[test]
fn every_number_comes_back_from_json_as_it_went() {
    let mut rng = crate::rng::CounterRng::new(1, &[]);
    let drawn = (0..2000).map(|_| 10f64.powf(-1.0 - 8.0 * rng.uniform()));
    for rate in drawn.chain([2.529_838_120_180_259_4e-5]) {
        let mut sent = job("");
        sent.reading = Reading::default();
        sent.learning_rate = rate;
        let bytes = serde_json::to_vec(&sent).unwrap();
        let read: JobSpec = serde_json::from_slice(&bytes).unwrap();
        assert_eq!((&read, read.digest()), (&sent, sent.digest()), "{rate}");
    }
}

#[test]
fn fields_of_a_dataset_are_of_the_datasets_that_count() {
    let split = ("datasets.0.split", "train[:5]");
    let of_flag = |file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]| {
        let job = load_with(file, environment, flags).unwrap_or_else(|errors| panic!("{errors}"));
        let [dataset] = job.datasets.as_slice() else {
            panic!("{:?}", job.datasets)
        };
        (
            dataset.path.display().to_string(),
            dataset.split.clone().unwrap_or_default(),
        )
    };
    let expected = ("x.jsonl".to_owned(), "train[:5]".to_owned());
    let file = "--dataset";
    // Whatever order they stand in, with a file's own datasets and without.
    for base in ["base_model: m\n", SMALL] {
        assert_eq!(of_flag(base, &[], &[split, (file, "x.jsonl")]), expected);
        assert_eq!(of_flag(base, &[], &[(file, "x.jsonl"), split]), expected);
        let variable = [("MUSTER_DATASETS_0_SPLIT", "train[:5]")];
        assert_eq!(of_flag(base, &variable, &[(file, "x.jsonl")]), expected);
        let both = [("MUSTER_DATASETS_0_SPLIT", "train[5:]")];
        assert_eq!(of_flag(base, &both, &[split, (file, "x.jsonl")]), expected);
    }
    let appended = [("datasets.1.type", "text"), ("datasets.1.path", "b.jsonl")];
    let job = load_with(SMALL, &[], &appended).unwrap();
    assert_eq!(job.datasets[1].kind, DatasetKind::Text);
    let earlier = [("MUSTER_DATASETS_0_PATH", "y.jsonl")];
    assert_eq!(
        of_flag(SMALL, &earlier, &[(file, "x.jsonl"), split]),
        expected
    );
}

#[test]
fn how_often_is_by_steps_by_epochs_or_by_shares_of_the_run() {
    let left = |text: &str| {
        let job = job(&format!("{text}val_set_size: 2\n"));
        (
            (job.save_steps, job.reading.left_to_data.save),
            (job.eval_steps, job.reading.left_to_data.eval),
        )
    };
    let auto = (SaveSteps::Auto, None);
    let per_epoch = |times| Some(Cadence::PerEpoch(times));
    assert_eq!(left(""), (auto, (None, None)));
    assert_eq!(
        left("saves_per_epoch: 4\nevals_per_epoch: 2\n"),
        ((SaveSteps::Auto, per_epoch(4)), (None, per_epoch(2)))
    );
    assert_eq!(
        left("save_strategy: epoch\neval_strategy: epoch\n"),
        ((SaveSteps::Auto, per_epoch(1)), (None, per_epoch(1)))
    );
    let share = |share| Some(Cadence::ShareOfRun(share));
    assert_eq!(
        left("save_steps: 0.25\nsave_strategy: steps\neval_steps: 0.1\n"),
        ((SaveSteps::Auto, share(0.25)), (None, share(0.1)))
    );
    assert_eq!(
        left("saves_per_epoch: 0\nevals_per_epoch: 0\n"),
        (auto, (None, None))
    );
    assert_eq!(
        left("save_strategy: no\nsaves_per_epoch: 0\n").0,
        (SaveSteps::Never, None)
    );
    // A later source decides, in whatever spelling.
    let flag = load_with(
        &format!("{SMALL}save_steps: 5\n"),
        &[],
        &[("saves_per_epoch", "2")],
    );
    let flag = flag.unwrap();
    assert_eq!(
        (flag.save_steps, flag.reading.left_to_data.save),
        (SaveSteps::Auto, per_epoch(2))
    );
    // Whoever names the epochs wants all of their checkpoints.
    assert_eq!(job("saves_per_epoch: 1\n").save_total_limit, None);
    assert_eq!(job("").save_total_limit, Some(3));
    let nothing = job("evals_per_epoch: 4\n");
    assert_eq!(nothing.reading.left_to_data.eval, None);
    assert!(nothing.reading.notices[0].contains("holds no examples out"));
}

#[test]
fn what_is_done_otherwise_is_told_once_for_each_way() {
    let job = job(
        "fsdp: [full_shard]\nfsdp_config:\n  offload: true\ndeepspeed: zero3.json\nwandb_project: mine\n\
         report_to: wandb\nload_in_8bit: true\nloss_watchdog_threshold: 5.0\ntensor_parallel_size: 1\nuse_wandb: false\n",
    );
    let told = [
        "fsdp, fsdp_config: nothing is sharded or offloaded: each worker holds the whole model",
        "deepspeed: nothing is sharded or offloaded, each worker holds the whole model; what else a file named there says (optimizer, clipping, batch) is not read",
        "wandb_project, report_to: the measurements are in metrics.jsonl in output_dir",
        "load_in_8bit: the base weights are not quantised, which is more exact; base_dtype: bfloat16 takes 2 bytes for each",
        "loss_watchdog_threshold: a run is not stopped for its loss; steps with a gradient that is not finite are skipped (max_skipped_steps)",
    ];
    assert_eq!(job.reading.notices, told);
    for optimizer in ["adamw_torch_fused", "paged_adamw_32bit", "ADAMW_BNB_8BIT"] {
        let job = self::job(&format!("optimizer: {optimizer}\n"));
        assert_eq!(job.reading.notices, [""; 0], "{optimizer}");
    }
}

#[test]
fn special_tokens_are_those_of_the_tokenizer_and_padding_is_no_matter() {
    let read = job(
        "special_tokens:\n  pad_token: <|end_of_text|>\n  eos_token: </s>\n  bos_token:\n  additional_special_tokens: []\n",
    );
    assert_eq!(read.eos_token.as_deref(), Some("</s>"));
    assert!(read.reading.special_tokens.is_empty());
    assert!(read.reading.notices[0].contains("nothing is learned of padding"));
    for (text, expected) in [
        (
            "special_tokens:\n  additional_special_tokens: <a>\n",
            "3: `special_tokens` has `additional_special_tokens`, which must be a list of texts",
        ),
        (
            "special_tokens:\n  cls_token: <a>\n",
            "3: `special_tokens` has `cls_token`, which cannot be given: no token is renamed; use the tokenizer as it is",
        ),
        (
            "special_tokens: [<s>]\n",
            "3: `special_tokens` must be a mapping (special_tokens: {eos_token: </s>}), found a list",
        ),
        (
            "special_tokens: {eos_token: [a]}\n",
            "3: `special_tokens` has `eos_token`, which must be a text",
        ),
        (
            "eos_token: </s>\nspecial_tokens: {eos_token: <end>}\n",
            "4: `special_tokens` has `eos_token`, which is <end>, and the field eos_token says otherwise; remove one",
        ),
    ] {
        assert_eq!(problems_of(text), [expected]);
    }
}

#[test]
fn what_decides_the_result_inside_of_sharding_is_not_passed_over() {
    for text in [
        "deepspeed: {zero_optimization: {stage: 3}, bf16: {enabled: auto}, fp16: {enabled: false}, gradient_clipping: auto}\n",
        "deepspeed: {optimizer: {}, scheduler:, train_batch_size: auto}\n",
        "fsdp_config: {offload_params: true, mixed_precision_policy: bf16}\n",
    ] {
        assert_eq!(job(text).reading.notices.len(), 1, "{text}");
    }
    for text in [
        "deepspeed: {gradient_clipping: 0.1}\n",
        "deepspeed: {optimizer: {type: SGD}}\n",
        "deepspeed: {zero_optimization: {stage: 2}, fp16: {enabled: true}}\n",
        "fsdp_config: {mixed_precision_policy: fp16}\n",
    ] {
        let found = problems_of(text);
        assert!(found[0].contains("are fields of the job"), "{found:?}");
    }
}

#[test]
fn columns_of_another_shape_are_no_columns_of_instructions() {
    let of = |lines: &str| {
        problems(load_text(&format!(
            "base_model: m\ndatasets:\n- path: d\n  type: alpaca\n{lines}"
        )))
    };
    assert_eq!(
        of("  field_completion: a\n"),
        [
            "5: `field_completion` is not read with `type: alpaca` and `type: instructions`, which have field_instruction, field_input and field_output"
        ]
    );
    let text = "base_model: m\ndatasets:\n- path: d\n  type: alpaca\n  field_output: chosen\ntest_prompts: [hello]\n";
    let job = load_text(text).unwrap();
    assert_eq!(job.datasets[0].fields.output, "chosen");
    assert!(job.reading.notices[0].contains("ask in the model's chat template"));
}
