//! What can be called: functions of the environment, methods, and macros.

use std::sync::Arc;

use super::ast::Macro;
use super::interpreter::ScopeId;
use super::value::Value;

#[derive(Clone, Debug)]
pub enum Callable {
    Function(Function),
    /// A method and what it is called on.
    Method {
        receiver: Value,
        name: String,
    },
    Macro {
        node: Arc<Macro>,
        scope: ScopeId,
    },
}

/// The environment's own functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    Range,
    Dict,
    Namespace,
    Cycler,
    Joiner,
    RaiseException,
    StrftimeNow,
}

impl Callable {
    /// Levels of containers in it.
    pub fn depth(&self) -> usize {
        match self {
            Self::Method { receiver, .. } => receiver.depth() + 1,
            _ => 0,
        }
    }

    pub fn macro_name(&self) -> Option<&str> {
        match self {
            Self::Macro { node, .. } => Some(&node.name),
            _ => None,
        }
    }

    pub fn global(name: &str) -> Option<Self> {
        Some(Self::Function(match name {
            "range" => Function::Range,
            "dict" => Function::Dict,
            "namespace" => Function::Namespace,
            "cycler" => Function::Cycler,
            "joiner" => Function::Joiner,
            "raise_exception" => Function::RaiseException,
            "strftime_now" => Function::StrftimeNow,
            _ => return None,
        }))
    }
}
