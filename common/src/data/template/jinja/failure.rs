//! Why a template could not be rendered.

use super::value::Value;

pub type Result<T> = std::result::Result<T, Box<Failure>>;

/// What went wrong, where, and with which values.
#[derive(Clone, Debug)]
pub struct Failure {
    pub reason: Reason,
    /// The line of the template, from 1; 0 while it is not known yet.
    pub line: usize,
    /// The values that did not fit, so that whoever knows where they come from can say so.
    pub blamed: Vec<Value>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The template called `raise_exception` with this.
    Raised(String),
    /// It cannot be compiled.
    Syntax(String),
    /// It used up its steps.
    Endless,
    /// It holds or writes more than it may.
    TooLarge,
    /// Anything that Python raises too.
    Failed(String),
}

impl Failure {
    pub fn new(reason: Reason) -> Box<Self> {
        Box::new(Self {
            reason,
            line: 0,
            blamed: Vec::new(),
        })
    }

    pub fn blaming(mut self: Box<Self>, value: &Value) -> Box<Self> {
        self.blamed.push(value.clone());
        self
    }

    /// The failure at this line, unless it was on a line further in.
    pub fn at(mut self: Box<Self>, line: usize) -> Box<Self> {
        if self.line == 0 {
            self.line = line;
        }
        self
    }
}

pub fn failure(text: impl Into<String>) -> Box<Failure> {
    Failure::new(Reason::Failed(text.into()))
}

pub fn fail<T>(text: impl Into<String>) -> Result<T> {
    Err(failure(text))
}
