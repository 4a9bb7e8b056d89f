//! Which modules of a model get an adapter, by their paths, as PEFT matches them.

use super::pattern::whole_path;
use super::spec::{LoraSpec, TargetModules};

/// Paths of the modules outside of layers that an adapter may be put on: the embedding and the output layer.
pub const TOKEN_MODULES: [&str; 2] = ["model.embed_tokens", "lm_head"];

impl TargetModules {
    /// What says whether the linear at a path is among these.
    pub fn matcher(&self) -> Box<dyn Fn(&str) -> bool + '_> {
        match self {
            Self::AllLinear => Box::new(|_| true),
            Self::Named(names) => {
                Box::new(move |path| names.iter().any(|name| is_named(path, name)))
            }
            Self::Matching(pattern) => {
                let regex = whole_path(pattern).ok();
                Box::new(move |path| regex.as_ref().is_some_and(|regex| regex.is_match(path)))
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
