#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use super::*;

const SMALL: &str = "base_model: models/tiny\ndatasets: data.jsonl\n";

/// Loads a job file with this text in a folder of its own.
fn load_with(
    text: &str,
    environment: &[(&str, &str)],
    flags: &[(&str, &str)],
) -> Result<JobSpec, JobErrors> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.yaml");
    fs::write(&path, text).unwrap();
    let own = |pairs: &[(&str, &str)]| {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    };
    load(JobSources {
        file: Some(path),
        environment: own(environment),
        flags: own(flags),
    })
}

fn load_text(text: &str) -> Result<JobSpec, JobErrors> {
    load_with(text, &[], &[])
}

fn job(lines: &str) -> JobSpec {
    load_text(&format!("{SMALL}{lines}")).unwrap_or_else(|errors| panic!("{errors}"))
}

/// The problems as `line 3: message`, where the file's path was.
fn problems(result: Result<JobSpec, JobErrors>) -> Vec<String> {
    result
        .expect_err("the job has problems")
        .problems
        .iter()
        .map(|problem| match &problem.origin {
            Origin::Line(_, line) => format!("{line}: {}", problem.message),
            Origin::File(_) => format!("file: {}", problem.message),
            other => format!("{other}: {}", problem.message),
        })
        .collect()
}

/// The problems of a job whose first two lines are right.
fn problems_of(lines: &str) -> Vec<String> {
    problems(load_text(&format!("{SMALL}{lines}")))
}

fn check(lines: &str, expected: &[&str]) {
    assert_eq!(problems_of(lines), expected, "{lines}");
}

// ---- what a job means ----

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
    assert_eq!(job("save_steps: 0\n").save_steps, None);
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
        ("lr", "4e-3"),
    ];
    let job = load_with(&text, &environment, &flags).unwrap();
    assert_eq!(job.learning_rate, 4e-3);
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
            "job: `base_model` is missing: the folder of the model to fine-tune",
            "job: `datasets` is missing: the JSON Lines files to train on",
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
fn a_starting_adapter_gives_the_shape() {
    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"peft_type":"LORA","r":4,"lora_alpha":8,"lora_dropout":0.1,"use_rslora":true,"target_modules":["v_proj","q_proj"]}"#;
    fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    let start = format!("adapter: lora\nlora_model_dir: {}\n", dir.path().display());
    let Method::Lora(lora) = job(&start).method else {
        panic!("not lora")
    };
    assert_eq!(
        (lora.r, lora.alpha, lora.dropout, lora.use_rslora),
        (4, 8.0, 0.1, true)
    );
    assert_eq!(
        lora.target_modules,
        TargetModules::Named(vec!["q_proj".into(), "v_proj".into()])
    );
    check(
        &format!("{start}lora_r: 16\n"),
        &["5: `lora_r` is 16, but the adapter of lora_model_dir has rank 4; remove it"],
    );
    let missing = problems_of("adapter: lora\nlora_model_dir: /nowhere/adapter\n");
    assert!(
        missing[0].starts_with(
            "4: `lora_model_dir` cannot be started from: /nowhere/adapter/adapter_config.json:"
        ),
        "{missing:?}"
    );
}

// ---- what is wrong with a job ----

#[test]
fn every_problem_is_reported_with_its_place() {
    let text = "base_model: m\nlerning_rate: 1e-4\nsequence_len: long\nadapter: lroa\nmicro_batch_size: 3\nglobal_batch_size: 8\n\
                seed: -1\n";
    let result = load_with(
        text,
        &[("MUSTER_NUM_EPOCHS", "many")],
        &[("logging_step", "5"), ("--warmup-ratio", "2")],
    );
    assert_eq!(
        problems(result),
        [
            "file: `datasets` is missing: the JSON Lines files to train on",
            "2: unknown field `lerning_rate`; did you mean `learning_rate`?",
            "3: `sequence_len` must be a whole number from 2 to 1048576, found `long`",
            "4: `adapter` must be one of lora, full, found `lroa`; did you mean `lora`?",
            "5: `micro_batch_size` (3) does not divide `global_batch_size` (8)",
            "7: `seed` must be a whole number, 0 or more, found `-1`",
            "environment MUSTER_NUM_EPOCHS: `num_epochs` must be a number above 0, at most 100000, found `many`",
            "--set logging_step: unknown field `logging_step`; did you mean `logging_steps`?",
            "--warmup-ratio: `warmup_ratio` must be a number from 0 to 1, found `2`",
        ]
    );
}

#[test]
fn errors_are_one_line_each_and_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.yaml");
    fs::write(
        &path,
        "base_model: m\ndatasets: d\n\"a\\nb\": 1\nseed: \"x\\ny\"\n",
    )
    .unwrap();
    let errors = load(JobSources {
        file: Some(path.clone()),
        ..JobSources::default()
    })
    .unwrap_err();
    let text = errors.to_string();
    assert_eq!(text.lines().count(), 2, "{text}");
    for line in text.lines() {
        assert!(line.starts_with(&format!("{}:", path.display())), "{line}");
    }
}

#[test]
fn wrong_types_are_named() {
    check(
        "learning_rate: [1]\n",
        &["3: `learning_rate` must be a number above 0, at most 1000, found a list"],
    );
    check(
        "learning_rate: .nan\n",
        &["3: `learning_rate` must be a number above 0, at most 1000, found `.nan`"],
    );
    check(
        "learning_rate: inf\n",
        &["3: `learning_rate` must be a number above 0, at most 1000, found `inf`"],
    );
    check(
        "max_steps: 1.5\n",
        &["3: `max_steps` must be a whole number from 1 to 1000000000, found `1.5`"],
    );
    check(
        "shuffle: maybe\n",
        &["3: `shuffle` must be true or false, found `maybe`"],
    );
    check(
        "output_dir: true\n",
        &["3: `output_dir` must be text (quote it if it is meant), found `true`"],
    );
    check(
        "output_dir: {a: b}\n",
        &["3: `output_dir` must be text, found a mapping"],
    );
    check(
        "test_prompts: [[a]]\n",
        &["3: `test_prompts` must be a list of texts, found a list"],
    );
    check(
        "val_set_size: 1.0\n",
        &[
            "3: `val_set_size` must be 0, a fraction below 1 or a whole number of examples, found `1.0`",
        ],
    );
    check(
        "cluster: 3\n",
        &["3: `cluster` is a mapping (cluster: {min_workers: 2}), found `3`"],
    );
    check(
        "cluster:\n  min_worker: 3\n",
        &["4: unknown field `cluster.min_worker`; did you mean `cluster.min_workers`?"],
    );
    check(
        "base_dtype: float16\n",
        &[
            "3: `base_dtype` must be one of float32, bfloat16, found `float16`; did you mean `bfloat16`?",
        ],
    );
}

#[test]
fn a_job_that_is_no_mapping_is_refused() {
    let no_mapping = problems(load_text("- a\n- b\n"));
    assert_eq!(
        no_mapping,
        ["1: a job is a mapping of `field: value`, found a list"]
    );
    assert_eq!(
        problems(load_text("# nothing\n")).len(),
        2,
        "empty: what is missing is said"
    );
}

#[test]
fn datasets_that_cannot_be_are_named() {
    let of = |text: &str| problems(load_text(&format!("base_model: m\n{text}")));
    assert_eq!(
        of("datasets: []\n"),
        ["2: `datasets` is empty: name the JSON Lines files to train on"]
    );
    assert_eq!(
        of("datasets:\n- type: text\n"),
        ["3: dataset 1 has no `path`"]
    );
    assert_eq!(
        of("datasets:\n- path:\n"),
        ["3: `path` must be a JSON Lines file, found nothing"]
    );
    assert_eq!(
        of("datasets:\n- path: a\n  feild_text: b\n"),
        ["4: unknown field of a dataset `feild_text`; did you mean `field_text`?"]
    );
    assert_eq!(
        of("datasets:\n- path: a\n  type: alpaca\n"),
        ["4: `type` must be one of auto, messages, prompt_completion, text, found `alpaca`"]
    );
    assert_eq!(
        of("datasets:\n- [a]\n"),
        ["3: a dataset is a path or a mapping with `path`, found a list"]
    );
    assert_eq!(
        of("datasets: a\ntrain_file: b\n"),
        ["3: `train_file` means the same as `datasets`, given at line 2; remove one"]
    );
    let far = load_with(SMALL, &[], &[("datasets.5.path", "x")]);
    assert_eq!(
        problems(far),
        [
            "--set datasets.5.path: there is no dataset 5: the job has 1, and datasets.1 would append one"
        ]
    );
}

#[test]
fn impossible_combinations_are_refused() {
    check(
        "lora_r: 8\n",
        &["3: `lora_r` has no effect without `adapter: lora`"],
    );
    check(
        "lora_target_linear: false\nuse_rslora: false\nmax_steps: 3\nseed: x\n",
        &["6: `seed` must be a whole number, 0 or more, found `x`"],
    );
    check(
        "adapter: lora\ninit_weights: random\n",
        &[
            "4: `init_weights` is random, but an adapter on random weights learns nothing of use; remove `adapter: lora`",
        ],
    );
    check(
        "warmup_ratio: 0.1\nwarmup_steps: 3\n",
        &["4: `warmup_steps` and `warmup_ratio` (line 3) both decide the warm-up; remove one"],
    );
    check(
        "lr_scheduler: constant\nwarmup_steps: 3\n",
        &[
            "4: `warmup_steps` has no effect with `lr_scheduler: constant`; use constant_with_warmup",
        ],
    );
    check(
        "max_steps: 3\nwarmup_steps: 4\n",
        &["4: `warmup_steps` (4) is more than `max_steps` (3)"],
    );
    check(
        "eval_steps: 5\n",
        &["3: `eval_steps` has nothing to evaluate: `val_set_size` holds no examples out"],
    );
    check(
        "cluster: {min_workers: 4, max_workers: 2}\n",
        &["3: `cluster.max_workers` (2) is less than `cluster.min_workers` (4)"],
    );
    check(
        "global_batch_size: 8\nmicro_batch_size: 2\ngradient_accumulation_steps: 2\n",
        &[
            "5: `gradient_accumulation_steps` and `global_batch_size` (line 3) both decide the number of blocks in a step; remove one",
        ],
    );
    check(
        "adapter: full\nuse_peft: true\n",
        &["4: `use_peft` and `adapter` (line 3) both decide the method; remove one"],
    );
    check(
        "resume: never\nresume_from_checkpoint: /tmp\n",
        &["4: `resume_from_checkpoint` means the same as `resume`, given at line 3; remove one"],
    );
    check(
        "resume: alwyas\n",
        &[
            "3: `resume` must be auto, never or a checkpoint folder, and there is no folder `alwyas`",
        ],
    );
    check(
        "resume: nevr\n",
        &[
            "3: `resume` must be auto, never or a checkpoint folder, and there is no folder `nevr`; did you mean `never`?",
        ],
    );
    check(
        "adapter: lora\nlora_target_modules: []\n",
        &["4: `lora_target_modules` is empty; leave it out for all-linear"],
    );
    check(
        "adapter: lora\nlora_target_modules: [lm_head]\nlora_target_linear: true\n",
        &[
            "4: `lora_target_modules` names `lm_head`, which `lora_target_linear: true` leaves out; give one of the two",
        ],
    );
    check(
        "adapter: lora\nlora_target_modules: '.*proj'\n",
        &[
            "4: `lora_target_modules` holds `.*proj`, which is no module name (regular expressions are not supported)",
        ],
    );
    let smaller = load_with(
        &format!("{SMALL}micro_batch_size: 4\n"),
        &[],
        &[("--global-batch-size", "6")],
    );
    assert_eq!(
        problems(smaller),
        ["--global-batch-size: `global_batch_size` (6) is no multiple of `micro_batch_size` (4)"]
    );
}

#[test]
fn a_field_given_twice_is_refused() {
    check(
        "seed: 1\nseed: 1\n",
        &["4: `seed` is given twice, first at line 3"],
    );
    check(
        "lr: 1\nlearning_rate: 1\n",
        &["4: `learning_rate` means the same as `lr`, given at line 3; remove one"],
    );
    let variables = load_with(
        SMALL,
        &[("MUSTER_LR", "1"), ("MUSTER_LEARNING_RATE", "1")],
        &[],
    );
    assert_eq!(
        problems(variables),
        [
            "environment MUSTER_LR: `lr` means the same as `learning_rate`, given at environment MUSTER_LEARNING_RATE; remove one"
        ]
    );
}

#[test]
fn what_other_trainers_do_and_muster_does_not_is_said() {
    check(
        "load_in_4bit: true\n",
        &[
            "3: `load_in_4bit` is not supported: quantised base weights are not supported; remove it, or set base_dtype: bfloat16",
        ],
    );
    check(
        "deepspeed: zero3.json\n",
        &[
            "3: `deepspeed` is not supported: the work is shared out without it; remove it and start more workers",
        ],
    );
    check(
        "optim: lion\n",
        &["3: `optim` is not supported: AdamW is the only optimizer; remove it"],
    );
    check(
        "wandb_project: mine\n",
        &[
            "3: `wandb_project` is not supported: the measurements are in metrics.jsonl in output_dir; remove it",
        ],
    );
    check(
        "adapter: qlora\n",
        &["3: `adapter` must be one of lora, full, found `qlora`; did you mean `lora`?"],
    );
    job(
        "optim: adamw_torch\nreport_to: []\nfsdp:\ntrust_remote_code: false\nmodel_type: LlamaForCausalLM\n",
    );
}

#[test]
fn variables_that_are_no_field_are_reported() {
    let result = load_with(SMALL, &[("MUSTER_LERNING_RATE", "1")], &[]);
    assert_eq!(
        problems(result),
        [
            "environment MUSTER_LERNING_RATE: unknown field `lerning_rate`; did you mean `learning_rate`?"
        ]
    );
}

// ---- hostile files ----

#[test]
fn a_file_that_is_no_yaml_names_its_line() {
    for (lines, line) in [
        ("a: [1, 2\n", 4),
        ("a: 'x\n", 3),
        ("\tb: 1\n", 3),
        ("a: b: c\n", 3),
        ("*x : 1\n", 3),
        ("a: &a [*a]\n", 3),
        ("a: !secret x\n", 3),
        ("---\nb: 1\n", 3),
    ] {
        let found = problems_of(lines);
        assert_eq!(found.len(), 1, "{lines:?}: {found:?}");
        let place: usize = found[0].split(':').next().unwrap().parse().unwrap();
        assert!(place.abs_diff(line) <= 1, "{lines:?}: {found:?}");
    }
}

#[test]
fn an_alias_bomb_is_refused_at_once() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for level in 1..30 {
        let below = format!("*a{}", level - 1);
        bomb += &format!("a{level}: &a{level} [{}]\n", vec![below; 9].join(", "));
    }
    let started = std::time::Instant::now();
    let found = problems_of(&bomb);
    assert!(found[0].contains("too much for a job file"), "{found:?}");
    assert!(started.elapsed().as_secs() < 5);
    let long_text = format!(
        "a: &a {}\nb: [{}]\n",
        "x".repeat(500_000),
        vec!["*a"; 1000].join(", ")
    );
    assert!(problems_of(&long_text)[0].contains("too much for a job file"));
}

#[test]
fn deep_nesting_is_refused() {
    for (open, close) in [("[", "]"), ("{a: ", "}"), ("- ", "")] {
        let deep = format!("a:\n  {}x{}\n", open.repeat(100_000), close.repeat(100_000));
        let found = problems_of(&deep);
        assert_eq!(found.len(), 1, "{found:?}");
    }
}

#[test]
fn a_huge_or_binary_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.yaml");
    let load_bytes = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        problems(load(JobSources {
            file: Some(path.clone()),
            ..JobSources::default()
        }))
    };
    assert_eq!(
        load_bytes(&vec![b'#'; 3 << 20]),
        ["file: too big for a job file (more than 1048576 bytes)"]
    );
    assert_eq!(load_bytes(b"a: 1\nb: \xff\n"), ["2: not UTF-8 text"]);
    assert!(!load_bytes(b"\0\0\0\0").is_empty());
    let missing = problems(load(JobSources {
        file: Some(dir.path().join("no.yaml")),
        ..JobSources::default()
    }));
    assert_eq!(
        missing,
        ["file: cannot read the job file: No such file or directory (os error 2)"]
    );
    let folder = problems(load(JobSources {
        file: Some(dir.path().to_owned()),
        ..JobSources::default()
    }));
    assert!(
        folder[0].starts_with("file: cannot read the job file:"),
        "{folder:?}"
    );
}

#[test]
fn random_text_never_panics() {
    let words = [
        "base_model",
        "datasets",
        "path",
        "lora_r",
        "cluster",
        "min_workers",
        ": ",
        ":",
        "\n",
        "\n  ",
        "\n- ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "&a ",
        "*a",
        "!!str ",
        "!x ",
        "'",
        "\"",
        "|\n",
        ">\n",
        "#",
        "---\n",
        "...\n",
        "? ",
        "%YAML 1.2\n",
        "\t",
        "~",
        "null",
        "true",
        "1e9",
        "-1",
        "9999999999999999999999",
        "0x10",
        ".nan",
        "é",
        "\u{feff}",
        "\u{2028}",
        "\0",
        "\\",
        "<<: *a",
        "lora_target_modules",
        "resume",
        "seed",
    ];
    let mut random = crate::rng::CounterRng::new(7, &[]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.yaml");
    for _ in 0..20_000 {
        let length = random.below(60);
        let text: String = (0..length)
            .map(|_| words[random.below(words.len() as u64) as usize])
            .collect();
        fs::write(&path, &text).unwrap();
        let flags = (0..random.below(3)).map(|_| {
            let mut word = || words[random.below(words.len() as u64) as usize].to_owned();
            (
                format!("{}.{}{}", word(), word(), word()),
                format!("{}{}", word(), word()),
            )
        });
        let flags = flags.collect::<Vec<_>>();
        if let Err(errors) = load(JobSources {
            file: Some(path.clone()),
            environment: flags
                .iter()
                .map(|(n, v)| (format!("MUSTER_{n}"), v.clone()))
                .collect(),
            flags,
        }) {
            assert_eq!(
                errors.to_string().lines().count(),
                errors.problems.len(),
                "{text:?}"
            );
        }
    }
}

// ---- digest and table ----

#[test]
fn the_digest_follows_what_decides_the_result() {
    let base = job("adapter: lora\n").digest();
    assert_eq!(base.len(), 64);
    for same in [
        "output_dir: elsewhere\n",
        "resume: never\n",
        "logging_steps: 3\n",
        "save_steps: 7\n",
        "save_total_limit: 1\n",
        "cluster: {min_workers: 4}\n",
        "test_prompt: hello\n",
        "max_skipped_steps: 1\n",
        "model_revision: main\n",
        "gradient_checkpointing: true\n",
        "lora_r: 16\n",
        "lora_target_modules: all-linear\n",
    ] {
        assert_eq!(
            job(&format!("adapter: lora\n{same}")).digest(),
            base,
            "{same}"
        );
    }
    for other in [
        "seed: 1\n",
        "lora_r: 8\n",
        "learning_rate: 1e-3\n",
        "micro_batch_size: 2\n",
        "reduction: fast\n",
        "sequence_len: 64\n",
        "shuffle: false\n",
        "val_set_size: 1\n",
        "base_dtype: bfloat16\n",
        "max_steps: 3\n",
    ] {
        assert_ne!(
            job(&format!("adapter: lora\n{other}")).digest(),
            base,
            "{other}"
        );
    }
    let moved = load_text("base_model: elsewhere\ndatasets: moved.jsonl\nadapter: lora\n").unwrap();
    assert_eq!(moved.digest(), base);
    let one_more = load_text("base_model: m\ndatasets: [a, b]\nadapter: lora\n").unwrap();
    assert_ne!(one_more.digest(), base);
}

#[test]
fn a_job_survives_the_wire() {
    let job = job(
        "adapter: lora\nval_set_size: 0.1\nlora_target_modules: [q_proj]\nlearning_rate: 0.1\nadam_beta2: 0.95\n",
    );
    let json = serde_json::to_string(&job).unwrap();
    let back: JobSpec = serde_json::from_str(&json).unwrap();
    assert_eq!(back, job);
    assert_eq!(back.digest(), job.digest());
}

#[test]
fn every_field_of_the_table_is_read() {
    // A mapping is the wrong type everywhere, so a field that is not read is one that does not complain.
    for field in fields() {
        let (text, name) = match field.name.split_once('.') {
            Some(("datasets[]", inner)) => (
                format!("base_model: m\ndatasets:\n- path: a\n  {inner}: {{a: {{b: c}}}}\n"),
                inner,
            ),
            Some(("cluster", inner)) => (format!("{SMALL}cluster:\n  {inner}: {{a: b}}\n"), inner),
            _ => (
                format!("{SMALL}{}: {{a: {{b: c}}}}\n", field.name),
                field.name,
            ),
        };
        let found = problems(load_text(&text));
        assert!(
            found.iter().any(|problem| problem.contains(name)),
            "{name}: {found:?}"
        );
    }
}

#[test]
fn no_name_means_two_things() {
    let mut seen = std::collections::HashSet::new();
    for field in fields() {
        let prefix = if field.name.starts_with("datasets[].") {
            "datasets[]."
        } else {
            ""
        };
        let aliases = field.aliases.iter().map(|alias| format!("{prefix}{alias}"));
        for name in std::iter::once(field.name.to_owned()).chain(aliases) {
            assert!(
                seen.insert(name.clone()),
                "{name} stands twice in the table"
            );
        }
        assert!(
            field.help.ends_with('.') && !field.default.is_empty(),
            "{}",
            field.name
        );
    }
}
