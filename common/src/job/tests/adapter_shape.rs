//! Linears without an adapter, and those whose rank or alpha is another.

use super::*;
use crate::job::{LoraSpec, TargetModules};

fn lora(text: &str) -> LoraSpec {
    match job(&format!("adapter: lora\n{text}")).method {
        Method::Lora(lora) => lora,
        Method::Full => panic!("an adapter was asked for"),
    }
}

#[test]
fn linears_are_left_out_by_name_by_pattern_and_by_layer() {
    let named = |text: &str| lora(text).shape.excluded;
    let names = TargetModules::Named(vec!["1.mlp.down_proj".into(), "k_proj".into()]);
    assert_eq!(
        named("exclude_modules: [k_proj, 1.mlp.down_proj]\n"),
        Some(names)
    );
    assert_eq!(
        named("peft_exclude_modules: '.*k_proj'\n"),
        Some(TargetModules::Matching(".*k_proj".into()))
    );
    assert_eq!(named("exclude_modules: []\n"), None);
    let layers = |text: &str| lora(text).shape.layers;
    assert_eq!(layers("layers_to_transform: [2, 0]\n"), Some(vec![2, 0]));
    assert_eq!(layers("peft_layers_to_transform: 0\n"), Some(vec![0]));
    assert_eq!(layers("layers_to_transform: none\n"), None);
}

#[test]
fn parameters_of_experts_stand_beside_linears_or_alone() {
    let named = |text: &str| {
        let found = lora(text);
        (found.target_modules, found.shape.parameters)
    };
    let both = vec![
        "experts.down_proj".to_owned(),
        "experts.gate_up_proj".to_owned(),
    ];
    let none = TargetModules::Named(Vec::new());
    let alone = "lora_target_parameters: [experts.gate_up_proj, experts.down_proj]\n";
    assert_eq!(named(alone), (none.clone(), both.clone()));
    let empty = format!("target_modules: []\n{alone}");
    assert_eq!(named(&empty), (none.clone(), both.clone()));
    let all = format!("lora_target_linear: true\n{alone}");
    assert_eq!(named(&all), (TargetModules::AllLinear, both));
    let beside = "lora_target_modules: [q_proj]\npeft_target_parameters: down_proj\n";
    let q = TargetModules::Named(vec!["q_proj".to_owned()]);
    assert_eq!(named(beside), (q, vec!["down_proj".to_owned()]));
    for off in ["lora_target_parameters: none\n", "target_parameters: []\n"] {
        assert_eq!(named(off), (TargetModules::AllLinear, Vec::new()));
    }
}

#[test]
fn what_peft_does_on_no_parameter_is_refused_beside_some() {
    for (text, expected) in [
        (
            "lora_dropout: 0.1\n",
            "5: `lora_dropout` goes with no `lora_target_parameters` in PEFT; remove one",
        ),
        (
            "use_dora: true\n",
            "5: `use_dora` goes with no `lora_target_parameters` in PEFT; remove one",
        ),
        (
            "lora_bias: true\n",
            "5: `lora_bias` goes with no `lora_target_parameters` in PEFT; remove one",
        ),
        (
            "init_lora_weights: orthogonal\n",
            "5: `init_lora_weights` goes with no `lora_target_parameters` in PEFT; remove one",
        ),
        (
            "pissa_init: true\n",
            "5: `pissa_init` goes with no `lora_target_parameters` in PEFT; remove one",
        ),
    ] {
        let text = format!("adapter: lora\nlora_target_parameters: [down_proj]\n{text}");
        assert_eq!(problems_of(&text), [expected]);
    }
    let told = "adapter: lora\nlora_target_parameters: ['.*down_proj']\n";
    assert_eq!(
        problems_of(told),
        [
            "4: `lora_target_parameters` holds `.*down_proj`, which is no name of a parameter (PEFT takes no patterns here)"
        ]
    );
    lora("lora_target_parameters: [down_proj]\ninit_lora_weights: gaussian\n");
}

#[test]
fn patterns_keep_their_order_and_give_ranks_and_scales() {
    let found = lora(
        "lora_r: 8\nlora_alpha: 16\nrank_pattern: {q_proj: 2, 'layers.1.*': 4}\nalpha_pattern: {k_proj: 4}\n",
    );
    let sizes = found.sizes();
    assert_eq!(sizes.rank("model.layers.1.self_attn.q_proj"), 2);
    assert_eq!(sizes.rank("model.layers.1.self_attn.v_proj"), 4);
    assert_eq!(sizes.scale("model.layers.1.self_attn.q_proj"), 8.0);
    assert_eq!(sizes.scale("model.layers.0.self_attn.k_proj"), 0.5);
    assert_eq!(found.scale(), 2.0);
    assert!(lora("").shape.is_default());
}

#[test]
fn what_is_no_rank_or_no_pattern_is_refused() {
    for (text, expected) in [
        (
            "adapter: lora\nrank_pattern: {q_proj: 1.5}\n",
            "4: `rank_pattern` has `q_proj`, which must be a whole number from 1 to 4096",
        ),
        (
            "adapter: lora\nalpha_pattern: {q_proj: high}\n",
            "4: `alpha_pattern` has `q_proj`, which must be a number above 0",
        ),
        (
            "adapter: lora\nrank_pattern: {'q_(proj': 2}\n",
            "4: `rank_pattern` has `q_(proj`, which is no regular expression: unclosed group",
        ),
        (
            "adapter: lora\nlayers_to_transform: first\n",
            "4: `layers_to_transform` must be the numbers of layers, found `first`",
        ),
        (
            "rank_pattern: {q_proj: 2}\n",
            "3: `rank_pattern` has no effect without `adapter: lora`",
        ),
    ] {
        assert_eq!(problems_of(text), [expected]);
    }
}
