//! Jinja as Transformers runs it: an interpreter with Python's values, within bounds.
//!
//! Enters: a template's source, and variables. Leaves: text, or why there is none. It is our own because a template is
//! right only where each value prints, compares and computes as in Python, and because a hostile one must not be able to
//! take the memory, the stack or the time of the program that renders it.

mod arguments;
mod ast;
mod callable;
mod characters;
mod failure;
mod filters;
mod format;
mod integer;
mod interpreter;
mod json;
mod lexer;
mod meter;
mod methods;
mod operators;
mod parser;
mod percent;
mod predicates;
mod print;
mod value;

use ast::Statement;
pub use failure::{Failure, Reason};
pub use integer::Integer;
pub use interpreter::Setting;
pub use meter::MAX_BYTES;
pub use value::{Dict, Value};

/// A template, ready to run.
#[derive(Debug)]
pub struct Template {
    body: Vec<Statement>,
    has_generation_marks: bool,
}

impl Template {
    pub fn parse(source: &str) -> Result<Self, Box<Failure>> {
        meter::metered(|| {
            let (body, has_generation_marks) = parser::parse(source)?;
            Ok(Self {
                body,
                has_generation_marks,
            })
        })
    }

    /// It says with `{% generation %}` what is learned.
    pub fn has_generation_marks(&self) -> bool {
        self.has_generation_marks
    }

    /// Runs it. `expected` bytes of text make room for what it will write.
    pub fn render(
        &self,
        variables: &dyn Fn(&str) -> Option<Value>,
        setting: Setting,
        expected: usize,
    ) -> Result<String, Box<Failure>> {
        meter::metered(|| interpreter::run(&self.body, variables, setting, expected))
    }
}
