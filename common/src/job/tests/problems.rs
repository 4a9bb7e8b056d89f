//! Every way in which a job can be wrong, and what is said about it.

use super::*;

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
            "file: `datasets` is missing: the data to train on",
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
    check_problems(
        "learning_rate: [1]\n",
        &["3: `learning_rate` must be a number above 0, at most 1000, found a list"],
    );
    check_problems(
        "learning_rate: .nan\n",
        &["3: `learning_rate` must be a number above 0, at most 1000, found `.nan`"],
    );
    check_problems(
        "learning_rate: inf\n",
        &["3: `learning_rate` must be a number above 0, at most 1000, found `inf`"],
    );
    check_problems(
        "max_steps: 1.5\n",
        &["3: `max_steps` must be a whole number from 1 to 1000000000, found `1.5`"],
    );
    check_problems(
        "shuffle: maybe\n",
        &["3: `shuffle` must be true or false, found `maybe`"],
    );
    check_problems(
        "output_dir: true\n",
        &["3: `output_dir` must be text (quote it if it is meant), found `true`"],
    );
    check_problems(
        "output_dir: {a: b}\n",
        &["3: `output_dir` must be text, found a mapping"],
    );
    check_problems(
        "test_prompts: [[a]]\n",
        &["3: `test_prompts` must be a list of texts, found a list"],
    );
    check_problems(
        "val_set_size: 1.0\n",
        &[
            "3: `val_set_size` must be 0, a fraction below 1 or a whole number of examples, found `1.0`",
        ],
    );
    check_problems(
        "cluster: 3\n",
        &["3: `cluster` is a mapping (cluster: {min_workers: 2}), found `3`"],
    );
    check_problems(
        "cluster:\n  min_worker: 3\n",
        &["4: unknown field `cluster.min_worker`; did you mean `cluster.min_workers`?"],
    );
    check_problems(
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
        ["2: `datasets` is empty: name the data to train on"]
    );
    assert_eq!(
        of("datasets:\n- type: text\n"),
        ["3: dataset 1 has no `path`"]
    );
    assert_eq!(
        of("datasets:\n- path:\n"),
        ["3: `path` must be a file, a folder or a dataset on the hub, found nothing"]
    );
    assert_eq!(
        of("datasets:\n- path: a\n  feild_text: b\n"),
        ["4: unknown field of a dataset `feild_text`; did you mean `field_text`?"]
    );
    assert_eq!(
        of("datasets:\n- path: a\n  type: geopardy\n"),
        [
            "4: `type` must be one of auto, messages, sharegpt, prompt_completion, alpaca, instructions, user_defined, input_output, tokenized, text, found `geopardy`"
        ]
    );
    assert_eq!(
        of("datasets:\n- path: a\n  field_output: b\n"),
        [
            "4: `field_output` is read with `type: alpaca` or `type: instructions` only; without it, give field_prompt and field_completion"
        ]
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
fn a_step_of_too_many_slots_is_refused() {
    let reason =
        "makes 65537 slots of 1 blocks in a step, more than 65536: raise `micro_batch_size`";
    for name in ["global_batch_size", "gradient_accumulation_steps"] {
        check_problems(
            &format!("{name}: 65537\n"),
            &[&format!("3: `{name}` {reason}")],
        );
    }
    job("global_batch_size: 131072\nmicro_batch_size: 2\n");
}

#[test]
fn what_says_of_an_adapter_what_holds_anyway_is_said_of_full_training_too() {
    for line in [
        "bias: none",
        "bias: None",
        "bias: 'false'",
        "lora_bias: none",
        "lora_bias: false",
        "lora_bias: 'off'",
        "init_lora_weights: true",
        "init_lora_weights: True",
        "init_lora_weights: yes",
        "pissa_init: false",
        "use_dora: false",
    ] {
        let read = job(&format!("{line}\n"));
        assert_eq!(read.method, Method::Full, "{line}");
        let read = job(&format!("adapter: lora\n{line}\n"));
        assert!(read.reading.notices.is_empty(), "{line}");
    }
    for line in [
        "bias: all",
        "lora_bias: true",
        "init_lora_weights: gaussian",
        "pissa_init: true",
        "use_dora: true",
    ] {
        let (field, _) = line.split_once(':').unwrap();
        let told = format!("3: `{field}` has no effect without `adapter: lora`");
        check_problems(&format!("{line}\n"), &[&told]);
    }
}

#[test]
fn what_only_processors_do_of_an_adapter_is_told() {
    for (lines, fields) in [
        ("use_dora: true\nbias: all\n", "use_dora, bias"),
        ("lora_bias: true\n", "lora_bias"),
        ("init_lora_weights: olora\n", "init_lora_weights"),
        ("pissa_init: true\n", "pissa_init"),
        (
            "lora_target_modules: [lm_head, embed_tokens, q_proj]\n",
            "embed_tokens in lora_target_modules, lm_head in lora_target_modules",
        ),
    ] {
        let told = format!("{fields}: done on processors; a worker on a GPU refuses the job");
        let read = job(&format!("adapter: lora\n{lines}"));
        assert_eq!(read.reading.notices, [told]);
    }
    for lines in ["", "init_lora_weights: gaussian\n", "bias: none\n"] {
        let read = job(&format!("adapter: lora\n{lines}"));
        assert!(read.reading.notices.is_empty(), "{lines}");
    }
}

#[test]
fn what_says_something_of_an_adapter_must_fit_to_one() {
    check_problems(
        "lora_r: 8\n",
        &["3: `lora_r` has no effect without `adapter: lora`"],
    );
    check_problems(
        "lora_target_linear: false\nuse_rslora: false\nmax_steps: 3\nseed: x\n",
        &["6: `seed` must be a whole number, 0 or more, found `x`"],
    );
    check_problems(
        "adapter: lora\ninit_weights: random\n",
        &[
            "4: `init_weights` is random, but an adapter on random weights learns nothing of use; remove `adapter: lora`",
        ],
    );
    check_problems(
        "use_dora: true\ninit_lora_weights: true\n",
        &["3: `use_dora` has no effect without `adapter: lora`"],
    );
    check_problems(
        "adapter: lora\nuse_dora: true\noptimizer: muon\n",
        &[
            "5: `optimizer` trains matrices alone, and `use_dora` has vectors to train; use adamw, sgd or lion, or `use_muon: true`",
        ],
    );
    check_problems(
        "bias: lora_only\n",
        &["3: `bias` has no effect without `adapter: lora`"],
    );
    check_problems(
        "adapter: lora\nlora_bias: true\nuse_dora: true\n",
        &["4: `lora_bias` goes with no `use_dora` in PEFT; remove one"],
    );
    check_problems(
        "adapter: lora\ninit_lora_weights: orthogonal\nlora_r: 7\n",
        &["4: `init_lora_weights` is orthogonal, which needs even ranks of at most 512, not 7"],
    );
    check_problems(
        "adapter: lora\npeft_init_lora_weights: loftq\n",
        &[
            "4: `peft_init_lora_weights` must be one of true, gaussian, orthogonal, pissa, pissa_niter_N, olora, with N from 1 to 64, found `loftq`",
        ],
    );
    check_problems(
        "adapter: lora\ninit_lora_weights: olora\nlora_r: 300\nlora_dropout: 0.1\n",
        &[
            "4: `init_lora_weights` takes directions off the weights, 256 at most, not 300",
            "4: `init_lora_weights` is OLoRA, which takes directions off the weights; inputs that are dropped would miss them: remove `lora_dropout`",
        ],
    );
    check_problems(
        "adapter: lora\npissa_init: true\nuse_muon: true\npissa_iter: 0\n",
        &[
            "5: `use_muon` mixes all directions of a matrix, and those that PiSSA takes off the weights stay as they are; use adamw, sgd or lion",
            "6: `pissa_iter` must be a whole number from 1 to 64, or -1, found `0`",
        ],
    );
    check_problems(
        "adapter: lora\ninit_lora_weights: pissa\npissa_init: true\n",
        &[
            "5: `pissa_init` and `init_lora_weights` (line 4) both decide what an adapter starts with; remove one",
        ],
    );
    check_problems(
        "adapter: lora\nlora_target_modules: []\n",
        &["4: `lora_target_modules` is empty; leave it out for all-linear"],
    );
    check_problems(
        "adapter: lora\nlora_target_modules: [lm_head]\nlora_target_linear: true\n",
        &[
            "4: `lora_target_modules` names `lm_head`, which `lora_target_linear: true` leaves out; give one of the two",
        ],
    );
    check_problems(
        "adapter: lora\nlora_target_modules: ['.*proj']\n",
        &[
            "4: `lora_target_modules` holds `.*proj`, which is no module name (a regular expression stands alone, not in a list)",
        ],
    );
}

#[test]
fn two_fields_that_decide_the_same_are_refused() {
    check_problems(
        "warmup_ratio: 0.1\nwarmup_steps: 3\n",
        &["4: `warmup_steps` and `warmup_ratio` (line 3) both decide the warm-up; remove one"],
    );
    check_problems(
        "global_batch_size: 8\nmicro_batch_size: 2\ngradient_accumulation_steps: 2\n",
        &[
            "5: `gradient_accumulation_steps` and `global_batch_size` (line 3) both decide the number of blocks in a step; remove one",
        ],
    );
    check_problems(
        "adapter: full\nuse_peft: true\n",
        &["4: `use_peft` and `adapter` (line 3) both decide the method; remove one"],
    );
    check_problems(
        "resume: never\nresume_from_checkpoint: /tmp\n",
        &["4: `resume_from_checkpoint` means the same as `resume`, given at line 3; remove one"],
    );
}

#[test]
fn fields_that_contradict_each_other_are_refused() {
    check_problems(
        "max_steps: 3\nwarmup_steps: 4\n",
        &["4: `warmup_steps` (4) is more than `max_steps` (3)"],
    );
    check_problems(
        "cluster: {min_workers: 4, max_workers: 2}\n",
        &["3: `cluster.max_workers` (2) is less than `cluster.min_workers` (4)"],
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
fn a_run_is_resumed_from_what_there_is() {
    check_problems(
        "resume: alwyas\n",
        &[
            "3: `resume` must be auto, never or a checkpoint folder, and there is no folder `alwyas`",
        ],
    );
    check_problems(
        "resume: nevr\n",
        &[
            "3: `resume` must be auto, never or a checkpoint folder, and there is no folder `nevr`; did you mean `never`?",
        ],
    );
}

#[test]
fn two_names_of_a_field_may_say_the_same() {
    let text = format!("{SMALL}bf16: true\nbfloat16: true\nlr: 1e-4\nlearning_rate: 0.0001\n");
    let job = load_with(&text, &[], &[]).unwrap();
    assert_eq!(job.learning_rate, 1e-4);
    assert_eq!(job.base_dtype, BaseDtype::Bfloat16);
}

#[test]
fn a_field_given_twice_is_refused() {
    check_problems(
        "seed: 1\nseed: 1\n",
        &["4: `seed` is given twice, first at line 3"],
    );
    check_problems(
        "lr: 1\nlearning_rate: 2\n",
        &["4: `learning_rate` means the same as `lr`, given at line 3; remove one"],
    );
    let variables = load_with(
        SMALL,
        &[("MUSTER_LR", "1"), ("MUSTER_LEARNING_RATE", "2")],
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
    check_problems(
        "load_in_4bit: true\n",
        &[
            "3: `load_in_4bit` needs `adapter: lora`: weights of 4 bits stay as they are, and full training would train them",
        ],
    );
    check_problems(
        "adapter: qlora\nload_in_4bit: false\nbnb_4bit_quant_type: fp4\nbnb_config_kwargs: {llm_int8_skip_modules: [up_proj]}\n",
        &[
            "4: `load_in_4bit` is false, but `adapter: qlora` trains on weights of 4 bits; write adapter: lora, or remove it",
            "5: `bnb_4bit_quant_type` must be one of nf4, found `fp4`",
            "6: `bnb_config_kwargs` has `llm_int8_skip_modules`, which is not supported: every linear of the decoder is kept in 4 bits, \
             as NF4; remove it",
        ],
    );
    check_problems(
        "optim: galore_adamw\n",
        &[
            "3: `optim` is galore_adamw, which projects gradients to need less memory for moments; adapter: lora needs less still: use \
             one of adamw, adamw_8bit, sgd, lion, lion_8bit, muon",
        ],
    );
    job(
        "optim: adamw_torch\nreport_to: []\nfsdp:\ntrust_remote_code: false\nmodel_type: LlamaForCausalLM\n",
    );
}

#[test]
fn patterns_of_weights_and_the_router_s_loss_are_refused_in_a_line_each() {
    check_problems(
        "unfrozen_parameters: [mlp, 'lm_head.weight$[:9]']\nrouter_aux_loss_coef: -1\n\
         model_config: {output_router_logits: perhaps, hidden_size: 3}\n",
        &[
            "3: `unfrozen_parameters` has `lm_head.weight$[:9]`: rows of a tensor are not trained apart; leave the range out, and all of it is (or end it in `.`, where it means characters)",
            "4: `router_aux_loss_coef` must be a number from 0 to 1000, found `-1`",
            "5: `output_router_logits` in `model_config` must be true or false, found `perhaps`",
            "5: `model_config` has `hidden_size`, and config.json of base_model decides it; change it there, and remove it here",
        ],
    );
    check_problems(
        "unfrozen_parameters: layers.(\n",
        &[
            "3: `unfrozen_parameters` has `layers.(`, which is no regular expression: unclosed group",
        ],
    );
}

#[test]
fn values_that_would_change_what_is_learned_are_refused() {
    for line in [
        "do_train: false",
        "model_type: AutoModelForSequenceClassification",
        "finetuning_type: freeze",
        "finetuning_type: false",
        "peft_init_lora_weights: false",
        "adapter: lora\ninit_lora_weights: eva",
        "save_safetensors: false",
        "average_tokens_across_devices: false",
        "save_strategy: best",
        "save_strategy: epoch\nsave_steps: 3",
        "saves_per_epoch: 2\nsave_steps: 3",
        "evals_per_epoch: 2\neval_steps: 3\nval_set_size: 0.1",
        "saves_per_epoch: 0.5",
        "save_strategy: no\nsave_steps: 3",
        "eval_strategy: steps\nval_set_size: 0.1",
        "eval_strategy: no\nval_set_size: 0.1",
        "train_on_eos: last",
        "adapter: lora\nlora_target_linear: false",
    ] {
        let found = problems_of(&format!("{line}\n"));
        let key = line
            .rsplit('\n')
            .next()
            .and_then(|line| line.split(':').next());
        assert_eq!(found.len(), 1, "{line}: {found:?}");
        assert!(
            line.split('\n')
                .any(|line| found[0].contains(line.split(':').next().unwrap())),
            "{key:?}: {found:?}"
        );
    }
    let of_dataset = |line: &str| {
        problems(load_text(&format!(
            "base_model: m\ndatasets:\n- path: d\n  {line}\n"
        )))
    };
    assert_eq!(
        of_dataset("split: 'a test'"),
        ["4: `split` is `a test`, which names no split: write train, or the name of another one"]
    );
    for line in [
        "split: 'train[:120%]'",
        "split: 'train[5:5]'",
        "split: 'train[-3:-3]'",
    ] {
        assert!(of_dataset(line)[0].contains("names no rows"), "{line}");
    }
    assert_eq!(
        of_dataset("train_on_eos: false"),
        ["4: `train_on_eos` must be one of turn, all, last, none, found `false`"]
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

#[test]
fn two_values_of_one_field_on_a_command_line_are_refused() {
    let of = |flags: &[(&str, &str)]| problems(load_with(SMALL, &[], flags));
    assert_eq!(
        of(&[("finetuning_type", "full"), ("--adapter", "lora")]),
        [
            "--adapter: gives `lora`, but --set finetuning_type gives `full` for the same field; remove one"
        ]
    );
    assert_eq!(
        of(&[("--seed", "1"), ("--seed", "2")]),
        ["--seed: gives `2`, but --seed gives `1` for the same field; remove one"]
    );
    assert_eq!(
        of(&[("datasets.0.path", "a.jsonl"), ("--dataset", "b.jsonl")]),
        [
            "--set datasets.0.path: gives `a.jsonl`, but --dataset gives `b.jsonl` for the same field; remove one"
        ]
    );
    assert_eq!(
        of(&[("datasets", "a.jsonl"), ("--train-file", "b.jsonl")]),
        [
            "--train-file: gives `b.jsonl`, but --set datasets gives `a.jsonl` for the same field; remove one"
        ]
    );
    assert_eq!(
        of(&[("cluster.min_workers", "2"), ("--min-workers", "3")]),
        [
            "--min-workers: gives `3`, but --set cluster.min_workers gives `2` for the same field; remove one"
        ]
    );
    let equal = [
        ("adapter", "lora"),
        ("--adapter", "lora"),
        ("lr", "2e-4"),
        ("--learning-rate", "0.0002"),
        ("datasets", "a.jsonl"),
        ("--dataset", "[\"a.jsonl\"]"),
        ("packing", "True"),
        ("--sample-packing", "true"),
    ];
    load_with(SMALL, &[], &equal).unwrap_or_else(|errors| panic!("{errors}"));
}
