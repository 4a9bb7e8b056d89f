//! Optimizers, learning rates by group, and losses.

use super::*;

const MUON: Optimizer = Optimizer::Muon {
    trains_vectors: true,
};

fn sgd(momentum: f64, dampening: f64, nesterov: bool) -> Optimizer {
    Optimizer::Sgd {
        momentum,
        dampening,
        nesterov,
    }
}

#[test]
fn an_optimizer_has_its_owner_s_betas_where_none_are_given() {
    let axolotl_s = Optimizer::Muon {
        trains_vectors: false,
    };
    for (text, optimizer, betas) in [
        ("", Optimizer::Adamw, (0.9, 0.999)),
        ("optimizer:\n", Optimizer::Adamw, (0.9, 0.999)),
        ("optim: adamw-torch-fused\n", Optimizer::Adamw, (0.9, 0.999)),
        ("optim: sgd\n", sgd(0.0, 0.0, false), (0.9, 0.999)),
        ("optimizer: lion_pytorch\n", Optimizer::Lion, (0.9, 0.99)),
        ("optimizer: lion_32bit\n", Optimizer::Lion, (0.9, 0.999)),
        (
            "optimizer: paged_lion_8bit\n",
            Optimizer::Lion8bit,
            (0.9, 0.999),
        ),
        ("optimizer: lion_8bit\n", Optimizer::Lion8bit, (0.9, 0.999)),
        ("optimizer: muon\n", axolotl_s, (0.95, 0.95)),
        ("use_muon: true\n", MUON, (0.9, 0.999)),
        ("use_muon: true\noptim: adamw_torch\n", MUON, (0.9, 0.999)),
        ("use_muon: false\n", Optimizer::Adamw, (0.9, 0.999)),
        (
            "optimizer: lion\nadam_beta2: 0.95\n",
            Optimizer::Lion,
            (0.9, 0.95),
        ),
    ] {
        let job = job(text);
        assert_eq!(job.optimizer, optimizer, "{text}");
        assert_eq!((job.adam_beta1, job.adam_beta2), betas, "{text}");
    }
}

#[test]
fn every_name_of_8_bits_is_adamw_with_moments_of_8_bits() {
    for (name, told) in [
        ("adamw_8bit", None),
        ("adamw_bnb_8bit", None),
        ("paged_adamw_8bit", None),
        ("adamw_torch_8bit", Some("not torchao")),
        ("ao_adamw_8bit", Some("not torchao")),
        ("adamw_torch_4bit", Some("in 8 bits")),
        ("ao_adamw_4bit", Some("in 8 bits")),
        ("ao_adamw_fp8", Some("in 8 bits")),
    ] {
        let job = job(&format!("optimizer: {name}\n"));
        assert_eq!(job.optimizer, Optimizer::Adamw8bit, "{name}");
        let notices = &job.reading.notices;
        assert_eq!(notices.len(), usize::from(told.is_some()), "{notices:?}");
        assert!(
            told.is_none_or(|told| notices[0].contains(told)),
            "{notices:?}"
        );
    }
    let of_32_bits = job("optimizer: adamw_anyprecision\n");
    assert_eq!(of_32_bits.optimizer, Optimizer::Adamw);
    assert!(of_32_bits.reading.notices[0].contains("adamw_8bit takes 2"));
}

#[test]
fn settings_of_sgd_are_a_mapping_or_a_text() {
    for (arguments, expected) in [
        ("{momentum: 0.9, nesterov: true}", sgd(0.9, 0.0, true)),
        ("momentum=0.9, dampening=0.5", sgd(0.9, 0.5, false)),
        ("'{\"momentum\": 0.5}'", sgd(0.5, 0.0, false)),
        ("momentum=0.9,nesterov=True", sgd(0.9, 0.0, true)),
    ] {
        let job = job(&format!("optimizer: sgd\noptim_args: {arguments}\n"));
        assert_eq!(job.optimizer, expected, "{arguments}");
    }
}

#[test]
fn what_no_optimizer_takes_is_refused_in_one_line() {
    let own = "use one of adamw, adamw_8bit, sgd, lion, lion_8bit, muon";
    for name in [
        "adafactor",
        "came_pytorch",
        "ademamix_8bit",
        "rmsprop",
        "galore_adamw_layerwise",
        "apollo_adamw",
        "q_galore_adamw8bit",
        "lomo",
        "grokadamw",
        "schedule_free_adamw",
        "stable_adamw",
        "adopt_adamw",
        "dion",
        "sinkgd",
        "flash_sgdw",
    ] {
        let found = problems(load_text(&format!("{SMALL}optimizer: {name}\n")));
        assert!(
            found.len() == 1 && found[0].contains(name) && found[0].ends_with(own),
            "{found:?}"
        );
    }
    for (text, expected) in [
        ("optimizer: adamx\n", "did you mean `adamw`?"),
        (
            "optimizer: lion\noptim_args: {betas: 1}\n",
            "adam_beta2, adam_epsilon and weight_decay instead",
        ),
        (
            "optimizer: muon\noptim_args: {ns_steps: 6}\n",
            "it takes none; remove it",
        ),
        (
            "optimizer: sgd\noptim_args: {momentun: 1}\n",
            "did you mean `momentum`?",
        ),
        (
            "optimizer: sgd\noptim_args: {momentum: 1}\n",
            "a momentum of 1",
        ),
        (
            "optimizer: sgd\noptim_args: {nesterov: true}\n",
            "needs a momentum",
        ),
        (
            "optimizer: sgd\noptim_args: [momentum]\n",
            "must be a mapping",
        ),
        (
            "optimizer: lion\nuse_muon: true\n",
            "both name the optimizer",
        ),
        (
            "optimizer: muon\nembedding_lr: 1e-6\n",
            "one learning rate for all",
        ),
        ("use_galore: true\n", "adapter: lora"),
        (
            "use_badam: true\n",
            "one part of the weights after the other",
        ),
        ("use_asft_loss: true\n", "a second model"),
    ] {
        let found = problems(load_text(&format!("{SMALL}{text}")));
        assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
    }
}

#[test]
fn lora_plus_decays_as_its_owner_does() {
    let text = "adapter: lora\nloraplus_lr_ratio: 16\nweight_decay: 0.1\n";
    let of_peft = job(text);
    let plus = |embedding| RateGroups::LoraPlus {
        ratio: 16.0,
        embedding,
    };
    assert_eq!(of_peft.lr_groups, plus(None));
    let on_embedding = format!("{text}lora_target_modules: [embed_tokens, q_proj]\n");
    assert_eq!(job(&on_embedding).lr_groups, plus(Some(1e-6)));
    let given = job(&format!("{on_embedding}loraplus_lr_embedding: 2e-5\n"));
    assert_eq!(given.lr_groups, plus(Some(2e-5)));
    assert_eq!(of_peft.weight_decay, 0.0);
    assert!(of_peft.reading.notices[0].starts_with("weight_decay: changes nothing"));
    let of_llama_factory = job(&format!("{text}dialect: llama_factory\n"));
    assert_eq!(of_llama_factory.weight_decay, 0.1);
    check_problems(
        "loraplus_lr_ratio: 16\n",
        &["3: `loraplus_lr_ratio` has no effect without `adapter: lora`"],
    );
    let unused = job("adapter: lora\nloraplus_lr_ratio: 16\nloraplus_lr_embedding: 1e-6\n");
    assert!(unused.reading.notices[0].contains("no adapter is on an embedding"));
}

#[test]
fn groups_of_weights_are_read_with_their_rates() {
    let job = job(
        "learning_rate: 1e-4\nembedding_lr_scale: 0.5\nlr_groups:\n  - name: output\n    modules: [o_proj]\n    lr: 5e-5\n",
    );
    let group = RateGroup {
        name: "output".to_owned(),
        modules: vec!["o_proj".to_owned()],
        lr: 5e-5,
    };
    let expected = RateGroups::Named {
        embedding: Some(5e-5),
        groups: vec![group],
    };
    assert_eq!(job.lr_groups, expected);
    assert_eq!(super::job("embedding_lr: 0\n").lr_groups, RateGroups::None);
    for (text, expected) in [
        ("lr_groups: {a: 1}\n", "must be a list of groups"),
        ("lr_groups: [{name: a, lr: 1}]\n", "a group without modules"),
        (
            "lr_groups: [{modules: [a], lr: 1}]\n",
            "a group without name",
        ),
        (
            "lr_groups: [{name: a, modules: [b]}]\n",
            "a group without lr",
        ),
        (
            "lr_groups: [{name: a, modules: [b], lr: -1}]\n",
            "from 0 to 1000",
        ),
        (
            "lr_groups: [{name: a, modules: [b], lr: 1, wd: 2}]\n",
            "has `wd`",
        ),
        ("embedding_lr: 1e-5\nembedding_lr_scale: 2\n", "remove one"),
    ] {
        let found = problems(load_text(&format!("{SMALL}{text}")));
        assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
    }
    let adapter = super::job("adapter: lora\nembedding_lr: 1e-5\n");
    assert!(adapter.reading.notices[0].contains("neither embedding nor output layer is trained"));
}

#[test]
fn a_loss_is_its_owner_s() {
    let eaft = |alpha, k, divisor| TokenLoss::Eaft(Eaft { alpha, k, divisor });
    for (text, expected) in [
        ("", TokenLoss::CrossEntropy),
        ("loss_type: nll\n", TokenLoss::CrossEntropy),
        ("loss_type: chunked_nll\n", TokenLoss::CrossEntropy),
        ("loss_type: dft\n", TokenLoss::Dft),
        ("use_dft_loss: true\n", TokenLoss::Dft),
        ("use_dft_loss: true\nloss_type: dft\n", TokenLoss::Dft),
        ("use_eaft_loss: true\n", eaft(1.0, 20, 3.0)),
        ("use_eaft_loss: true\neaft_alpha: 0.5\n", eaft(0.5, 20, 3.0)),
        ("use_eaft: true\neaft_k: 5\n", eaft(1.0, 5, 1.0)),
        (
            "label_smoothing_factor: 0.1\n",
            TokenLoss::Smoothed { share: 0.1 },
        ),
    ] {
        assert_eq!(job(text).token_loss, expected, "{text}");
    }
    let two = problems(load_text(&format!(
        "{SMALL}loss_type: dft\nlabel_smoothing_factor: 0.1\n"
    )));
    assert!(
        two[0].contains("both decide the loss of a token"),
        "{two:?}"
    );
    assert!(job("eaft_k: 5\n").reading.notices[0].starts_with("eaft_k: changes nothing"));
}
