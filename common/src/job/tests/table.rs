//! The digest, the wire, and the table of fields.

use super::*;

/// The digest of a job with an adapter, and of one that says more.
fn digests(more: &str) -> [String; 2] {
    ["", more].map(|more| job(&format!("adapter: lora\n{more}")).digest())
}

#[test]
fn the_digest_is_the_same_whatever_does_not_decide_the_result() {
    for same in [
        "output_dir: elsewhere\n",
        "resume: never\n",
        "logging_steps: 3\n",
        "save_steps: 7\n",
        "save_total_limit: 1\n",
        "save_first_step: true\n",
        "logging_first_step: true\n",
        "cluster: {min_workers: 4}\n",
        "test_prompt: hello\n",
        "max_skipped_steps: 1\n",
        "model_revision: main\n",
        "gradient_checkpointing: true\n",
        "gradient_checkpointing: off\n",
        "lora_r: 16\n",
        "lora_target_modules: all-linear\n",
        "optimizer: paged_adamw_32bit\n",
        "loss_type: nll\n",
        "label_smoothing_factor: 0\n",
        "lr_groups: []\n",
        "use_dora: false\n",
        "init_lora_weights: true\n",
        "bias: none\n",
        "lora_bias: false\n",
        "unfrozen_parameters: []\n",
        "model_config: {}\n",
        "pure_bf16: false\n",
    ] {
        let [base, found] = digests(same);
        assert_eq!(base.len(), 64);
        assert_eq!(found, base, "{same}");
    }
}

#[test]
fn the_digest_is_another_for_all_that_decides_the_result() {
    for other in [
        "seed: 1\n",
        "lora_r: 8\n",
        "optimizer: adamw_8bit\n",
        "optimizer: lion_8bit\n",
        "learning_rate: 1e-3\n",
        "micro_batch_size: 2\n",
        "reduction: fast\n",
        "sequence_len: 64\n",
        "shuffle: false\n",
        "val_set_size: 1\n",
        "base_dtype: bfloat16\n",
        "max_steps: 3\n",
        "optimizer: sgd\n",
        "optimizer: lion\nadam_beta2: 0.999\n",
        "loraplus_lr_ratio: 4\n",
        "embedding_lr: 1e-6\n",
        "lr_groups: [{name: a, modules: [q_proj], lr: 1e-6}]\n",
        "loss_type: dft\n",
        "use_eaft: true\n",
        "label_smoothing_factor: 0.1\n",
        "use_dora: true\n",
        "init_lora_weights: orthogonal\n",
        "pissa_init: true\n",
        "bias: all\n",
        "lora_bias: true\n",
        "unfrozen_parameters: [norm]\n",
        "lora_target_parameters: [down_proj]\n",
        "output_router_logits: true\n",
        "router_aux_loss_coef: 0.1\n",
    ] {
        let [base, found] = digests(other);
        assert_ne!(found, base, "{other}");
    }
}

#[test]
fn the_digest_follows_evaluations_where_they_decide_what_comes_out() {
    let evaluated = |more: &str| job(&format!("val_set_size: 4\n{more}")).digest();
    let steps = evaluated("eval_steps: 2\n");
    for same in [
        "eval_steps: 5\n",
        "eval_on_start: true\n",
        "eval_steps: 2\nsave_strategy: best\n",
        "eval_steps: 2\nmetric_for_best_model: eval_loss\n",
    ] {
        assert_eq!(evaluated(same), steps, "{same}");
    }
    // Where evaluations decide what comes out, so does when they are made.
    let best = evaluated("eval_steps: 2\nload_best_model_at_end: true\n");
    let kept = evaluated("eval_steps: 2\nload_best_model_at_end: true\nsave_strategy: best\n");
    assert_eq!(best, kept);
    for other in [
        "eval_steps: 2\n",
        "eval_steps: 5\nload_best_model_at_end: true\n",
        "eval_steps: 2\nload_best_model_at_end: true\ngreater_is_better: true\n",
        "eval_steps: 2\nload_best_model_at_end: true\nearly_stopping_patience: 2\n",
    ] {
        assert_ne!(evaluated(other), best, "{other}");
    }
}

#[test]
fn the_digest_is_one_of_sets_and_not_of_where_they_lie() {
    let base = job("adapter: lora\n").digest();
    let moved = load_text("base_model: elsewhere\ndatasets: moved.jsonl\nadapter: lora\n").unwrap();
    assert_eq!(moved.digest(), base);
    let one_more = load_text("base_model: m\ndatasets: [a, b]\nadapter: lora\n").unwrap();
    assert_ne!(one_more.digest(), base);
}

#[test]
fn a_job_survives_the_wire() {
    let mut job = job(
        "adapter: lora\nval_set_size: 0.1\nlora_target_modules: [q_proj]\nlearning_rate: 0.1\nadam_beta2: 0.95\n\
         optimizer: sgd\noptim_args: momentum=0.9\nloraplus_lr_ratio: 16\nuse_eaft_loss: true\n",
    );
    let json = serde_json::to_string(&job).unwrap();
    let back: JobSpec = serde_json::from_str(&json).unwrap();
    job.reading = Reading::default();
    assert_eq!(back, job);
    assert_eq!(back.digest(), job.digest());
}

#[test]
fn every_field_of_the_table_is_read() {
    // A mapping is the wrong type nearly everywhere, so a field that is not read is one that does not complain.
    for field in fields() {
        let wrong = match field.name {
            "chat_template_kwargs" => "[a]",
            _ => "{a: {b: c}}",
        };
        let (text, name) = match field.name.split_once('.') {
            Some(("datasets[]", inner)) => (
                format!("base_model: m\ndatasets:\n- path: a\n  {inner}: {{a: {{b: c}}}}\n"),
                inner,
            ),
            Some(("cluster", inner)) => (format!("{SMALL}cluster:\n  {inner}: {{a: b}}\n"), inner),
            _ => (format!("{SMALL}{}: {wrong}\n", field.name), field.name),
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

/// All `MUSTER_…` names in the sources below this folder.
fn variables_in(folder: &std::path::Path, found: &mut std::collections::BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            variables_in(&path, found);
        }
        let is_source = path
            .extension()
            .is_some_and(|e| e == "rs" || e == "yaml" || e == "py");
        let text = if is_source {
            fs::read_to_string(&path).unwrap_or_default()
        } else {
            String::new()
        };
        for part in text.split("MUSTER_").skip(1) {
            let name: String = part
                .chars()
                .take_while(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || *c == '_')
                .collect();
            if !name.is_empty() && !name.ends_with('_') {
                found.insert(format!("MUSTER_{name}"));
            }
        }
    }
}

#[test]
fn the_programs_own_variables_are_no_fields() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut variables = std::collections::BTreeSet::new();
    for folder in ["coordinator", "worker", "deploy", "common/tests"] {
        variables_in(&root.join(folder), &mut variables);
    }
    assert!(variables.contains("MUSTER_LISTEN"));
    for variable in variables {
        let result = load_with(SMALL, &[(&variable, "1")], &[]);
        let text = result
            .err()
            .map(|errors| errors.to_string())
            .unwrap_or_default();
        assert!(!text.contains("unknown field"), "{text}");
    }
}
