//! Which modules of a model get an adapter, by their paths, as PEFT matches them.

use regex::Regex;
use serde_json::{Value, json};

use super::adapter_shape::sorted;
use super::pattern::{spellings, whole_path};
use super::spec::{LoraSpec, TargetModules};

/// Paths of the modules outside of layers that an adapter may be put on: the embedding and the output layer.
pub const TOKEN_MODULES: [&str; 2] = ["model.embed_tokens", "lm_head"];

impl TargetModules {
    /// What an `adapter_config.json` says of them: a list of names, which is empty only where parameters have an adapter, or PEFT's text
    /// of a regular expression. None: neither.
    pub fn of_adapter(config: &Value) -> Option<Self> {
        let parameters = config["target_parameters"].as_array();
        let has_parameters = parameters.is_some_and(|parameters| !parameters.is_empty());
        match &config["target_modules"] {
            Value::Null if has_parameters => Some(Self::Named(Vec::new())),
            Value::Array(items) if items.is_empty() && has_parameters => {
                Some(Self::Named(Vec::new()))
            }
            Value::String(text) if text == "all-linear" => Some(Self::AllLinear),
            Value::String(text) if whole_path(text).is_ok() => Some(Self::Matching(text.clone())),
            Value::Array(items) if !items.is_empty() => {
                let names = items.iter().map(|item| item.as_str().map(str::to_owned));
                // PEFT writes a set, in any order.
                Some(Self::Named(sorted(names.collect::<Option<_>>()?)))
            }
            _ => None,
        }
    }

    /// As an `adapter_config.json` has them.
    pub fn in_adapter(&self) -> Value {
        match self {
            Self::AllLinear => json!("all-linear"),
            Self::Named(names) => json!(names),
            Self::Matching(pattern) => json!(pattern),
        }
    }

    /// What says whether the linear at a path is among these.
    pub fn matcher(&self) -> Box<dyn Fn(&str) -> bool + '_> {
        match self {
            Self::AllLinear => Box::new(|_| true),
            Self::Named(names) => {
                Box::new(move |path| names.iter().any(|name| is_named(path, name)))
            }
            Self::Matching(pattern) => {
                let regex = whole_path(pattern).ok();
                // By the names, too, that a job for a model that sees has for its decoder.
                Box::new(move |path| {
                    let fits =
                        |regex: &Regex| spellings(path).iter().any(|path| regex.is_match(path));
                    regex.as_ref().is_some_and(fits)
                })
            }
        }
    }

    /// Whether the embedding, and the output layer, are among these: they are never meant by all-linear.
    pub fn name_tokens(&self) -> [bool; 2] {
        match self {
            Self::AllLinear => [false; 2],
            named => TOKEN_MODULES.map(named.matcher()),
        }
    }
}

impl LoraSpec {
    /// Whether there is an adapter on the embedding, and one on the output layer. Who asks for layers by number asks for neither.
    pub fn adapts_tokens(&self) -> [bool; 2] {
        let excluded = self.shape.excluded.as_ref();
        let excluded = excluded.map_or([false; 2], TargetModules::name_tokens);
        let named = self.target_modules.name_tokens();
        let is_there =
            |index: usize| named[index] && !excluded[index] && self.shape.layers.is_none();
        [is_there(0), is_there(1)]
    }
}

/// Whether a target names the module at that path: the path itself, or its end.
pub fn is_named(path: &str, name: &str) -> bool {
    path == name
        || path
            .strip_suffix(name)
            .is_some_and(|rest| rest.ends_with('.'))
}
