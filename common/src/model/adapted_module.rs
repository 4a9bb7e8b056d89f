//! What an adapter is on: a linear, the embedding, or a parameter that the experts of a layer have together.

use super::geometry::LinearShape;
use crate::files::adapter::Adapted;
use crate::job::TOKEN_MODULES;

/// One linear of a layer, a parameter of its experts, the output layer, or the embedding, as adapters name it. The inputs of the
/// embedding are tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdaptedModule {
    /// `model.layers.0.self_attn.q_proj`
    pub path: String,
    /// Of a parameter what one of its experts has.
    pub shape: LinearShape,
    pub rank: usize,
    /// What a parameter of experts has beside that.
    pub stack: Option<Stack>,
}

/// The factors of all experts in one pair of tensors: `A` is `[experts · rank][in]`, expert by expert, and in `B`,
/// `[out][rank · experts]`, every so manieth column is of the same expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// What stands for the path of a module in the names of the tensors.
    pub module: String,
    pub experts: usize,
}

impl AdaptedModule {
    /// Whether it is the embedding, whose adapter has a column for each token.
    pub fn is_embedding(&self) -> bool {
        self.path == TOKEN_MODULES[0]
    }

    /// The path of the module in the names of its tensors.
    pub fn module(&self) -> &str {
        match &self.stack {
            Some(stack) => &stack.module,
            None => &self.path,
        }
    }

    /// How many experts its factors are of.
    pub fn experts(&self) -> usize {
        self.stack.as_ref().map_or(1, |stack| stack.experts)
    }

    /// The name of the weight that it is on.
    pub fn weight(&self) -> String {
        match &self.stack {
            Some(_) => self.path.clone(),
            None => format!("{}.weight", self.path),
        }
    }
}

impl From<&AdaptedModule> for Adapted {
    fn from(module: &AdaptedModule) -> Self {
        Self {
            path: module.module().to_owned(),
            rank: module.rank * module.experts(),
            inputs: module.shape.width,
            outputs: module.shape.out,
            has_bias: module.shape.bias,
        }
    }
}
