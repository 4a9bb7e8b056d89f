//! Expressions have values.

use super::super::arguments::Args;
use super::super::ast::{Arguments, Expression, ExpressionKind, Step, StepKind, UnaryOperator};
use super::super::failure::{Result, fail};
use super::super::meter::{descend, spend};
use super::super::methods;
use super::super::operators;
use super::super::print::write_str;
use super::super::value::{Builder, Dict, Value};
use super::Interpreter;
use super::items;
use super::scopes::ScopeId;

impl Interpreter<'_> {
    pub(super) fn value(&mut self, expression: &Expression, scope: ScopeId) -> Result<Value> {
        spend(1)?;
        descend()?;
        self.evaluate(expression, scope)
            .map_err(|failure| failure.at(expression.line))
    }

    pub(super) fn truth(&mut self, expression: &Expression, scope: ScopeId) -> Result<bool> {
        if let Some(value) = self.scopes.known(expression, scope) {
            return Ok(value.is_true());
        }
        Ok(self.value(expression, scope)?.is_true())
    }

    fn evaluate(&mut self, expression: &Expression, scope: ScopeId) -> Result<Value> {
        match &expression.kind {
            ExpressionKind::Constant(value) => Ok(value.clone()),
            ExpressionKind::Name(name) => Ok(self.lookup(name, scope)),
            ExpressionKind::Tuple(items) => Value::tuple(self.values(items, scope)?),
            ExpressionKind::List(items) => Value::list(self.values(items, scope)?),
            ExpressionKind::Dict(pairs) => {
                let mut values = Vec::with_capacity(pairs.len());
                for (key, value) in pairs {
                    values.push((self.value(key, scope)?, self.value(value, scope)?));
                }
                Ok(Value::Dict(Dict::new(values)?))
            }
            ExpressionKind::Arithmetic { first, rest } => {
                let mut value = self.value(first, scope)?;
                for (operator, right) in rest {
                    value = match self.scopes.known(right, scope) {
                        Some(right) => operators::apply(*operator, value, right)?,
                        None => {
                            let right = self.value(right, scope)?;
                            operators::apply(*operator, value, &right)?
                        }
                    };
                }
                Ok(value)
            }
            ExpressionKind::Concat(items) => {
                let values = self.values(items, scope)?;
                concat(&values)
            }
            ExpressionKind::And(items) => self.until(items, scope, false),
            ExpressionKind::Or(items) => self.until(items, scope, true),
            ExpressionKind::Unary { operators, operand } => {
                let mut value = self.value(operand, scope)?;
                for operator in operators.iter().rev() {
                    value = match operator {
                        UnaryOperator::Not => Value::Bool(!value.is_true()),
                        UnaryOperator::Minus => operators::negate(&value)?,
                        UnaryOperator::Plus => operators::plus(&value)?,
                    };
                }
                Ok(value)
            }
            ExpressionKind::Compare { first, rest } => {
                if let [(comparison, right)] = &rest[..]
                    && let Some(left) = self.scopes.known(first, scope)
                    && let Some(right) = self.scopes.known(right, scope)
                {
                    return operators::compare(*comparison, left, right).map(Value::Bool);
                }
                let mut left = self.value(first, scope)?;
                for (comparison, right) in rest {
                    let right = self.value(right, scope)?;
                    if !operators::compare(*comparison, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Ok(Value::Bool(true))
            }
            ExpressionKind::Conditional {
                test,
                then,
                otherwise,
            } => match (self.truth(test, scope)?, otherwise) {
                (true, _) => self.value(then, scope),
                (false, Some(otherwise)) => self.value(otherwise, scope),
                (false, None) => Ok(Value::undefined_hint(
                    "an inline `if` without `else` is false, and so without a value",
                )),
            },
            ExpressionKind::Postfix { base, steps } => {
                if let Some(value) = self.scopes.known(expression, scope) {
                    return Ok(value.clone());
                }
                let value = self.value(base, scope)?;
                self.steps(value, steps, scope)
            }
        }
    }

    fn values(&mut self, items: &[Expression], scope: ScopeId) -> Result<Vec<Value>> {
        items.iter().map(|item| self.value(item, scope)).collect()
    }

    /// The first value whose truth is `wanted`, else the last.
    fn until(&mut self, items: &[Expression], scope: ScopeId, wanted: bool) -> Result<Value> {
        let mut last = Value::None;
        for item in items {
            last = self.value(item, scope)?;
            if last.is_true() == wanted {
                break;
            }
        }
        Ok(last)
    }

    pub(super) fn steps(&mut self, value: Value, steps: &[Step], scope: ScopeId) -> Result<Value> {
        let mut value = value;
        let mut steps = steps.iter().peekable();
        while let Some(step) = steps.next() {
            spend(1)?;
            // A method that is called at once need not become a value before.
            let call = steps.next_if(|next| {
                matches!((&step.kind, &next.kind), (StepKind::Attribute(name), StepKind::Call(_))
                    if matches!(value, Value::Text(_) | Value::Dict(_)) && methods::has(&value, name))
            });
            value = match (&step.kind, call) {
                (
                    StepKind::Attribute(name),
                    Some(Step {
                        line,
                        kind: StepKind::Call(arguments),
                    }),
                ) => {
                    spend(1)?;
                    let args = self.arguments(arguments, scope);
                    args.and_then(|args| methods::call(&value, name, args))
                        .map_err(|failure| failure.at(*line))?
                }
                _ => self
                    .step(value, step, scope)
                    .map_err(|failure| failure.at(step.line))?,
            };
        }
        Ok(value)
    }

    fn step(&mut self, value: Value, step: &Step, scope: ScopeId) -> Result<Value> {
        match &step.kind {
            StepKind::Attribute(name) => items::attribute(&value, name),
            StepKind::Item(index) => {
                let index = self.value(index, scope)?;
                items::item(&value, &index)
            }
            StepKind::Slice(parts) => {
                let mut bounds = [Value::None, Value::None, Value::None];
                for (bound, part) in bounds.iter_mut().zip(parts.iter()) {
                    if let Some(part) = part {
                        *bound = self.value(part, scope)?;
                    }
                }
                items::slice(&value, &bounds)
            }
            StepKind::Call(arguments) => {
                let args = self.arguments(arguments, scope)?;
                self.call(&value, args)
            }
            StepKind::Filter(name, arguments) => {
                let args = self.arguments(arguments, scope)?;
                super::super::filters::filter(self, name, value, args)
            }
            StepKind::Test(name, arguments) => {
                let args = self.arguments(arguments, scope)?;
                super::super::predicates::test(name, &value, args).map(Value::Bool)
            }
        }
    }

    pub(super) fn arguments(&mut self, arguments: &Arguments, scope: ScopeId) -> Result<Args> {
        let mut args = Args::of(self.values(&arguments.positional, scope)?);
        if let Some(more) = &arguments.more_positional {
            args.positional.extend(self.value(more, scope)?.items()?);
        }
        for (name, value) in &arguments.keyword {
            let value = self.value(value, scope)?;
            args.keyword.push((name.clone(), value));
        }
        if let Some(more) = &arguments.more_keyword {
            let value = self.value(more, scope)?;
            let Value::Dict(dict) = &value else {
                return fail(format!("`**` takes an object, not {}", value.described()));
            };
            for (name, value) in dict.pairs() {
                match name.as_str() {
                    Some(name) => args.keyword.push((name.to_owned(), value.clone())),
                    None => return fail("`**` takes an object whose keys are text"),
                }
            }
        }
        Ok(args)
    }
}

/// `a ~ b`: plain text, even of Markup.
fn concat(values: &[Value]) -> Result<Value> {
    let mut out = Builder::default();
    for value in values {
        write_str(&mut out, value)?;
    }
    Ok(Value::text(out.finish()))
}
