//! Runs a template: statements print, expressions have values.
//!
//! Enters: the parsed template and its variables. Leaves: the text, or why there is none. What the template may use is
//! counted by [`super::meter`].

mod calls;
mod expressions;
pub mod items;
pub mod objects;
mod scopes;

use std::sync::Arc;

use super::ast::{ForLoop, Macro, Statement, StatementKind, Target};
use super::callable::Callable;
use super::failure::{Result, fail};
use super::meter::{descend, spend};
use super::print::write_str;
use super::value::{Builder, Value};
use objects::{Loop, Namespace};
pub use scopes::ScopeId;
use scopes::Scopes;

/// What a row and the model give a template, by name.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<Value>;

/// What the template's functions need to know.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setting {
    /// The time that templates may print, in seconds since 1970.
    pub unix_seconds: i64,
    /// Printed at the start and at the end of a generation block.
    pub marks: Option<(char, char)>,
}

pub struct Interpreter<'a> {
    variables: Variables<'a>,
    setting: Setting,
    scopes: Scopes,
    /// Where text is printed: the template itself, and what is kept for later.
    outputs: Vec<Builder>,
    /// All that were made: they may hold each other, and are emptied at the end.
    namespaces: Vec<Namespace>,
    /// Functions that hold a scope were made: scopes have to stay.
    captured: usize,
}

/// How a statement ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
}

/// Bytes that a template writes beside the texts of messages, usually.
const USUAL_MORE: usize = 256;

/// Most bytes for which there is room from the start.
const MOST_ROOM: usize = 1 << 20;

pub fn run(
    body: &[Statement],
    variables: Variables,
    setting: Setting,
    expected: usize,
) -> Result<String> {
    let mut interpreter = Interpreter {
        variables,
        setting,
        scopes: Scopes::default(),
        outputs: vec![Builder::with_room(
            expected.saturating_add(USUAL_MORE).min(MOST_ROOM),
        )?],
        namespaces: Vec::new(),
        captured: 0,
    };
    let result = interpreter.statements(body, ScopeId::OUTERMOST);
    let output = interpreter.outputs.pop().unwrap_or_default();
    result.map(|_| output.finish())
}

impl Drop for Interpreter<'_> {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            namespace.clear();
        }
    }
}

impl Interpreter<'_> {
    fn statements(&mut self, body: &[Statement], scope: ScopeId) -> Result<Flow> {
        descend()?;
        for statement in body {
            spend(1)?;
            let flow = self
                .statement(statement, scope)
                .map_err(|failure| failure.at(statement.line))?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&mut self, statement: &Statement, scope: ScopeId) -> Result<Flow> {
        match &statement.kind {
            StatementKind::Data(value) => self.print(value)?,
            StatementKind::Print(expression) => {
                match (
                    self.scopes.known(expression, scope),
                    self.outputs.last_mut(),
                ) {
                    (Some(value), Some(output)) => write_str(output, value)?,
                    _ => {
                        let value = self.value(expression, scope)?;
                        self.print(&value)?;
                    }
                }
            }
            StatementKind::If {
                branches,
                otherwise,
            } => {
                for (test, body) in branches {
                    if self.truth(test, scope)? {
                        return self.statements(body, scope);
                    }
                }
                return self.statements(otherwise, scope);
            }
            StatementKind::For(node) => {
                let items = self.value(&node.iterated, scope)?.items()?;
                self.run_loop(node, items, scope, 0)?;
            }
            StatementKind::Set { target, value } => {
                let value = self.value(value, scope)?;
                self.assign(target, value, scope)?;
            }
            StatementKind::SetBlock {
                target,
                filters,
                body,
            } => {
                let text = self.captured(|this| this.inner(body, scope))?;
                let value = self.steps(text, filters, scope)?;
                self.assign(target, value, scope)?;
            }
            StatementKind::Macro(node) => {
                let value = self.new_macro(node, scope);
                self.scopes.set(scope, &node.name, value);
            }
            StatementKind::Call { caller, call } => {
                let caller = self.new_macro(caller, scope);
                let value = self.call_with_caller(call, caller, scope)?;
                self.print(&value)?;
            }
            StatementKind::Filter { filters, body } => {
                let text = self.captured(|this| this.inner(body, scope))?;
                let value = self.steps(text, filters, scope)?;
                self.print(&value)?;
            }
            StatementKind::With { variables, body } => {
                // All values are those from outside, as in Jinja since 2.9.
                let values: Vec<Value> = variables
                    .iter()
                    .map(|(_, value)| self.value(value, scope))
                    .collect::<Result<_>>()?;
                return self.in_scope(scope, |this, inner| {
                    for ((target, _), value) in variables.iter().zip(values) {
                        this.assign(target, value, inner)?;
                    }
                    this.statements(body, inner)
                });
            }
            StatementKind::Generation(body) => self.generation(body, scope)?,
            StatementKind::Block(body) => self.inner(body, scope)?,
            StatementKind::Break => return Ok(Flow::Break),
            StatementKind::Continue => return Ok(Flow::Continue),
            StatementKind::NoLoader(word) => {
                return fail(format!(
                    "`{word}` needs another template, and there is none"
                ));
            }
        }
        Ok(Flow::Next)
    }

    fn print(&mut self, value: &Value) -> Result<()> {
        match self.outputs.last_mut() {
            Some(output) => write_str(output, value),
            None => fail("there is nowhere to print to"),
        }
    }

    fn print_char(&mut self, c: char) -> Result<()> {
        self.outputs
            .last_mut()
            .map_or(Ok(()), |output| output.push_char(c))
    }

    /// What a generation block prints, between marks where they are wanted.
    fn generation(&mut self, body: &[Statement], scope: ScopeId) -> Result<()> {
        let Some((start, end)) = self.setting.marks else {
            return self.inner(body, scope);
        };
        self.print_char(start)?;
        self.inner(body, scope)?;
        self.print_char(end)
    }

    fn inner(&mut self, body: &[Statement], scope: ScopeId) -> Result<()> {
        self.in_scope(scope, |this, inner| this.statements(body, inner).map(drop))
    }

    /// The text that `print` prints, for later.
    fn captured(&mut self, print: impl FnOnce(&mut Self) -> Result<()>) -> Result<Value> {
        self.outputs.push(Builder::default());
        let result = print(self);
        let output = self.outputs.pop().unwrap_or_default();
        result.map(|()| Value::Text(output.finish_text()))
    }

    /// Runs within a scope of its own, which goes with it unless a macro was made there.
    fn in_scope<T>(
        &mut self,
        parent: ScopeId,
        run: impl FnOnce(&mut Self, ScopeId) -> Result<T>,
    ) -> Result<T> {
        let captured = self.captured;
        let scope = self.scopes.open(parent);
        let result = run(self, scope);
        if self.captured == captured {
            self.scopes.close(scope);
        }
        result
    }

    fn assign(&mut self, target: &Target, value: Value, scope: ScopeId) -> Result<()> {
        match target {
            Target::Name(name) => self.scopes.set(scope, name, value),
            Target::Attribute(name, attribute) => match self.lookup(name, scope) {
                Value::Namespace(namespace) => namespace.set(attribute, value)?,
                other => {
                    let text = format!(
                        "`{name}.{attribute}` cannot be set: `{name}` is no namespace but {}",
                        other.described()
                    );
                    return fail(text);
                }
            },
            Target::Tuple(targets) => {
                let values = value.items()?;
                if values.len() != targets.len() {
                    let text = format!(
                        "{} values cannot be assigned to {} names",
                        values.len(),
                        targets.len()
                    );
                    return Err(value.blamed(text));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value, scope)?;
                }
            }
        }
        Ok(())
    }

    fn run_loop(
        &mut self,
        node: &Arc<ForLoop>,
        items: Vec<Value>,
        scope: ScopeId,
        depth: usize,
    ) -> Result<()> {
        let items = match &node.condition {
            Some(condition) => {
                let mut kept = Vec::new();
                for item in items {
                    let keep = self.in_scope(scope, |this, inner| {
                        this.assign(&node.target, item.clone(), inner)?;
                        this.truth(condition, inner)
                    })?;
                    if keep {
                        kept.push(item);
                    }
                }
                kept
            }
            None => items,
        };
        if items.is_empty() {
            return self.inner(&node.otherwise, scope);
        }
        let state = Loop::new(
            items,
            depth,
            node.recursive.then(|| (Arc::clone(node), scope)),
        );
        for index in 0..state.length() {
            state.go_to(index);
            let flow = self.in_scope(scope, |this, inner| {
                this.scopes.set(inner, "loop", Value::Loop(state.clone()));
                this.assign(&node.target, state.item(index), inner)?;
                this.statements(&node.body, inner)
            })?;
            if flow == Flow::Break {
                break;
            }
        }
        Ok(())
    }

    fn new_macro(&mut self, node: &Arc<Macro>, scope: ScopeId) -> Value {
        self.captured += 1;
        Value::Callable(Arc::new(Callable::Macro {
            node: Arc::clone(node),
            scope,
        }))
    }

    fn lookup(&self, name: &str, scope: ScopeId) -> Value {
        if let Some(value) = self.scopes.get(scope, name) {
            return value.clone();
        }
        if let Some(value) = (self.variables)(name) {
            return value;
        }
        Callable::global(name).map_or_else(
            || Value::undefined(name),
            |global| Value::Callable(Arc::new(global)),
        )
    }
}
