//! What a template computes with: Python's values, as far as JSON and templates can make them.
//!
//! Values are immutable, as in Transformers' sandbox; only namespaces, generators and the like change.

mod containers;
mod text;

use std::sync::Arc;

use super::callable::Callable;
use super::failure::{Result, fail, failure};
use super::integer::Integer;
use super::interpreter::objects::{Cycler, Joiner, Loop, Namespace};
pub use containers::{Dict, Generator, List, Part, Range, View, is_hashable};
pub use text::{Builder, Text};

#[derive(Clone, Debug)]
pub enum Value {
    Undefined(Arc<Undefined>),
    None,
    Bool(bool),
    Int(Integer),
    Float(f64),
    Text(Text),
    List(List),
    /// A list of another type's name.
    Tuple(List),
    Dict(Dict),
    /// `dict.keys()`, `.values()`, `.items()`.
    View(View),
    Range(Range),
    /// What filters such as `map` return: once iterated, it is empty.
    Generator(Generator),
    Callable(Arc<Callable>),
    Namespace(Namespace),
    Loop(Loop),
    Cycler(Cycler),
    Joiner(Joiner),
}

/// What has no value, and why.
#[derive(Debug, Default)]
pub struct Undefined {
    /// What was asked for.
    pub name: Option<String>,
    /// What it was asked of.
    pub owner: Option<Value>,
    /// Set where it is something else than a name that is missing.
    pub hint: Option<String>,
}

impl Undefined {
    /// Why it cannot be used, in Jinja's words.
    pub fn reason(&self) -> String {
        match (&self.hint, &self.name, &self.owner) {
            (Some(hint), ..) => hint.clone(),
            (None, Some(name), None) => format!("`{name}` is undefined"),
            (None, Some(name), Some(owner)) => {
                format!("{} has no `{name}`", owner.described())
            }
            (None, None, _) => "a value is undefined".to_owned(),
        }
    }
}

impl Value {
    pub fn undefined(name: &str) -> Self {
        Self::Undefined(Arc::new(Undefined {
            name: Some(name.to_owned()),
            ..Undefined::default()
        }))
    }

    pub fn undefined_of(owner: &Self, name: String) -> Self {
        Self::Undefined(Arc::new(Undefined {
            name: Some(name),
            owner: Some(owner.clone()),
            ..Undefined::default()
        }))
    }

    pub fn undefined_hint(hint: impl Into<String>) -> Self {
        Self::Undefined(Arc::new(Undefined {
            hint: Some(hint.into()),
            ..Undefined::default()
        }))
    }

    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(Text::new(text.into()))
    }

    pub fn int(value: impl Into<Integer>) -> Self {
        Self::Int(value.into())
    }

    pub fn list(items: Vec<Self>) -> Result<Self> {
        Ok(Self::List(List::new(items)?))
    }

    pub fn tuple(items: Vec<Self>) -> Result<Self> {
        Ok(Self::Tuple(List::new(items)?))
    }

    pub fn generator(items: Vec<Self>) -> Self {
        Self::Generator(Generator::new(items))
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text.as_str()),
            _ => None,
        }
    }

    pub fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined(_))
    }

    pub fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    pub fn is_markup(&self) -> bool {
        matches!(self, Self::Text(text) if text.is_markup())
    }

    /// The integer that Python would take this for (`True` is 1).
    pub fn as_integer(&self) -> Option<Integer> {
        match self {
            Self::Int(value) => Some(value.clone()),
            Self::Bool(value) => Some(Integer::Small(i64::from(*value))),
            _ => None,
        }
    }

    /// `bool(value)`.
    pub fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => !value.is_zero(),
            Self::Float(value) => *value != 0.0,
            Self::Text(text) => !text.as_str().is_empty(),
            Self::List(list) | Self::Tuple(list) => !list.is_empty(),
            Self::Dict(dict) => !dict.is_empty(),
            Self::View(view) => !view.dict.is_empty(),
            Self::Range(range) => range.len() > 0,
            Self::Loop(value) => value.length() > 0,
            Self::Generator(_)
            | Self::Callable(_)
            | Self::Namespace(_)
            | Self::Cycler(_)
            | Self::Joiner(_) => true,
        }
    }

    /// `len(value)`.
    pub fn length(&self) -> Result<usize> {
        match self {
            Self::Undefined(_) => Ok(0),
            Self::Text(text) => Ok(text.char_count()),
            Self::List(list) | Self::Tuple(list) => Ok(list.len()),
            Self::Dict(dict) => Ok(dict.len()),
            Self::View(view) => Ok(view.dict.len()),
            Self::Range(range) => Ok(range.len()),
            Self::Loop(value) => Ok(value.length()),
            _ => Err(self.blamed(format!("{} has no length", self.described()))),
        }
    }

    /// What a loop over the value goes through.
    pub fn items(&self) -> Result<Vec<Self>> {
        let items = match self {
            Self::Undefined(_) => Vec::new(),
            Self::Text(text) => {
                super::meter::reserve(text.as_str().len().saturating_mul(64))?;
                let chars = text.as_str().chars();
                chars.map(Self::text).collect()
            }
            Self::List(list) | Self::Tuple(list) => list.to_vec(),
            Self::Dict(dict) => dict.keys().cloned().collect(),
            Self::View(view) => view.items()?,
            Self::Range(range) => range.items(),
            Self::Generator(generator) => generator.take_all(),
            _ => return Err(self.blamed(format!("{} cannot be iterated", self.described()))),
        };
        super::meter::spend(items.len())?;
        Ok(items)
    }

    pub fn is_iterable(&self) -> bool {
        matches!(
            self,
            Self::Undefined(_)
                | Self::Text(_)
                | Self::List(_)
                | Self::Tuple(_)
                | Self::Dict(_)
                | Self::View(_)
                | Self::Range(_)
                | Self::Generator(_)
                | Self::Loop(_)
        )
    }

    /// Steps that it takes to look through it once.
    pub fn work(&self) -> usize {
        match self {
            Self::Text(text) => text.as_str().len() / 16,
            Self::Int(Integer::Large(_)) => 256,
            _ => 0,
        }
    }

    /// Levels of containers in it.
    pub fn depth(&self) -> usize {
        match self {
            Self::List(list) | Self::Tuple(list) => list.depth(),
            Self::Dict(dict) => dict.depth(),
            Self::View(view) => view.dict.depth() + 1,
            Self::Generator(generator) => generator.depth(),
            Self::Undefined(undefined) => undefined
                .owner
                .as_ref()
                .map_or(0, |owner| owner.depth() + 1),
            Self::Callable(callable) => callable.depth(),
            Self::Loop(state) => state.items_depth() + 1,
            Self::Cycler(cycler) => cycler.depth(),
            Self::Joiner(joiner) => joiner.depth(),
            _ => 0,
        }
    }

    /// What Python calls its type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(text) if text.is_markup() => "Markup",
            Self::Text(_) => "str",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::View(view) => view.type_name(),
            Self::Range(_) => "range",
            Self::Generator(_) => "generator",
            Self::Callable(_) => "function",
            Self::Namespace(_) => "Namespace",
            Self::Loop(_) => "LoopContext",
            Self::Cycler(_) => "Cycler",
            Self::Joiner(_) => "Joiner",
        }
    }

    /// For people: what it is, in an error.
    pub fn described(&self) -> String {
        match self {
            Self::Undefined(undefined) => undefined.reason(),
            Self::None => "none".to_owned(),
            Self::Bool(_) => "a boolean".to_owned(),
            Self::Int(_) | Self::Float(_) => "a number".to_owned(),
            Self::Text(_) => "text".to_owned(),
            Self::List(_) => "a list".to_owned(),
            Self::Tuple(_) => "a tuple".to_owned(),
            Self::Dict(_) => "an object".to_owned(),
            other => format!("a value of type {}", other.type_name()),
        }
    }

    /// A failure that this value is to blame for.
    pub fn blamed(&self, text: String) -> Box<super::failure::Failure> {
        failure(text).blaming(self)
    }

    /// Fails where even Jinja's undefined values cannot be used.
    pub fn defined(&self) -> Result<&Self> {
        match self {
            Self::Undefined(undefined) => Err(self.blamed(undefined.reason())),
            other => Ok(other),
        }
    }

    /// A number of things, as `indent(4)` takes it.
    pub fn to_count(&self, what: &str) -> Result<i64> {
        match self.as_integer().and_then(|value| value.to_i64()) {
            Some(value) => Ok(value),
            None => fail(format!(
                "{what} must be an integer, not {}",
                self.described()
            )),
        }
    }
}
