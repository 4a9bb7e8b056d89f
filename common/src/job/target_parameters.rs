//! Which parameters of a layer's experts and of their router get an adapter, as PEFT matches them (`target_parameters`), and where it has
//! their factors.
//!
//! Source: PEFT 0.21, `_inject_parameters` (names, nesting) and `ParamWrapper` (factors); Transformers 5.24, which keeps the experts of
//! a layer in two parameters, whatever files have.

use super::AdapterInit;
use super::pattern::spellings;
use super::spec::LoraSpec;
use super::target_modules::is_named;

/// The parameters within a layer, in the order of Transformers: gates and ups together, and downs.
pub const EXPERT_PARAMETERS: [&str; 2] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"];
/// What they are parts of.
const EXPERTS: &str = "mlp.experts";
/// The weight of the router within a layer, by its name in a family.
const ROUTERS: [&str; 2] = ["mlp.gate.weight", "mlp.router.weight"];

/// The weight of a router of this name, within its layer.
pub fn router_parameter(router: &str) -> &'static str {
    let [gate, other] = ROUTERS;
    match router {
        "router" => other,
        _ => gate,
    }
}

/// A parameter of the experts of a layer, or of their router, that has an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertParameter {
    /// `model.layers.0.mlp.experts.down_proj`
    pub path: String,
    /// What stands for the path of a module in the names of its factors.
    pub module: String,
}

/// Which of the parameters of a layer's experts are named as targets, and whether that of their router is; `prefix` is what the names of
/// the layer's tensors begin with, and `router` the router's name.
///
/// Of the experts' the first has its factors inside what the second wraps, where both have some.
pub fn named_parameters(
    (prefix, router): (&str, &str),
    targets: &[String],
) -> [Option<ExpertParameter>; 3] {
    let is_target = |path: &String| targets.iter().any(|target| is_parameter(path, target));
    let [first, second] = EXPERT_PARAMETERS.map(|name| format!("{prefix}{name}"));
    let router = format!("{prefix}{}", router_parameter(router));
    let outer = format!("{prefix}{EXPERTS}");
    let inner = match is_target(&second) {
        true => format!("{outer}.base_layer"),
        false => outer.clone(),
    };
    let of_router = router.trim_end_matches(".weight").to_owned();
    let all = [(first, inner), (second, outer), (router, of_router)];
    all.map(|(path, module)| is_target(&path).then_some(ExpertParameter { path, module }))
}

/// Whether a target names the parameter at that path: by all of it, or by its end.
pub fn is_parameter(path: &str, target: &str) -> bool {
    spellings(path).iter().any(|path| is_named(path, target))
}

/// Whether the factors of the module at this path are of a parameter of experts, or of their router.
pub fn is_of_parameter(module: &str) -> bool {
    let outer = module.strip_suffix(".base_layer").unwrap_or(module);
    let of_router = |router: &str| module.ends_with(router.trim_end_matches(".weight"));
    outer.ends_with(EXPERTS) || ROUTERS.into_iter().any(of_router)
}

impl LoraSpec {
    /// The field of what PEFT does on no parameter, where the job asks for both.
    pub fn conflict_of_parameters(&self) -> Option<&'static str> {
        if self.shape.parameters.is_empty() {
            return None;
        }
        let starts_alike = matches!(self.init, AdapterInit::Kaiming | AdapterInit::Gaussian);
        let fields = [
            (self.dropout > 0.0, "lora_dropout"),
            (self.use_dora, "use_dora"),
            (self.lora_bias, "lora_bias"),
            (!starts_alike, "init_lora_weights"),
        ];
        let found = fields.into_iter().find(|(is_there, _)| *is_there);
        found.map(|(_, field)| field)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn modules(targets: &[&str]) -> [Option<String>; 3] {
        let targets: Vec<String> = targets.iter().map(|name| name.to_string()).collect();
        let found = named_parameters(("model.layers.1.", "router"), &targets);
        found.map(|parameter| Some(parameter?.module))
    }

    #[test]
    fn of_two_parameters_the_first_is_inside_the_second() {
        let (outer, inner) = (
            "model.layers.1.mlp.experts",
            "model.layers.1.mlp.experts.base_layer",
        );
        let router = "model.layers.1.mlp.router";
        let some = |path: &str| Some(path.to_owned());
        for (targets, expected) in [
            (&["experts.down_proj"][..], [None, some(outer), None]),
            (&["gate_up_proj"], [some(outer), None, None]),
            (
                &[
                    "model.layers.1.mlp.experts.down_proj",
                    "layers.1.mlp.experts.gate_up_proj",
                    "router.weight",
                ],
                [some(inner), some(outer), some(router)],
            ),
            (
                &["model.language_model.layers.1.mlp.experts.gate_up_proj"],
                [some(outer), None, None],
            ),
            (
                &["layers.0.mlp.experts.down_proj", "s.down_proj", "experts"],
                [None, None, None],
            ),
        ] {
            assert_eq!(modules(targets), expected, "{targets:?}");
        }
        assert!(is_of_parameter(router));
        assert!(is_of_parameter(outer) && is_of_parameter(inner));
        assert!(!is_of_parameter("model.layers.1.self_attn.q_proj"));
    }
}
