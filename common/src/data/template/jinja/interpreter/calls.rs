//! Calls of functions, macros and what else can be called.

use std::sync::Arc;

use super::super::super::date;
use super::super::arguments::{Args, text_or};
use super::super::ast::{Arguments, Expression, ExpressionKind, Macro, StepKind};
use super::super::callable::{Callable, Function};
use super::super::failure::{Failure, Reason, Result, fail};
use super::super::methods;
use super::super::print::to_text;
use super::super::value::{Dict, Range, Value};
use super::Interpreter;
use super::objects::{Cycler, Joiner, Namespace};
use super::scopes::ScopeId;

/// Longest range that Jinja's sandbox makes.
const MAX_RANGE: usize = 100_000;

impl Interpreter<'_> {
    pub fn call(&mut self, callee: &Value, args: Args) -> Result<Value> {
        match callee {
            Value::Callable(callable) => match &**callable {
                Callable::Function(function) => self.call_function(*function, args),
                Callable::Method { receiver, name } => self.call_method(receiver, name, args),
                Callable::Macro { node, scope } => self.call_macro(node, *scope, args),
            },
            Value::Joiner(joiner) => Ok(joiner.next()),
            Value::Loop(state) => {
                let Some((node, scope, depth)) = state.recursive() else {
                    return fail("this loop cannot be called: it is not `recursive`");
                };
                let [items] = args.bind_all("loop", ["iterable"])?;
                let items = items.items()?;
                self.captured(|this| this.run_loop(&node, items, scope, depth + 1))
            }
            Value::Undefined(undefined) => Err(callee.blamed(format!(
                "{}, so that it cannot be called",
                undefined.reason()
            ))),
            other => Err(other.blamed(format!("{} cannot be called", other.described()))),
        }
    }

    /// `{% call %}`: the call gets the block as `caller`.
    pub(super) fn call_with_caller(
        &mut self,
        call: &Expression,
        caller: Value,
        scope: ScopeId,
    ) -> Result<Value> {
        let ExpressionKind::Postfix { base, steps } = &call.kind else {
            return fail("`call` needs a call");
        };
        let Some((last, before)) = steps.split_last() else {
            return fail("`call` needs a call");
        };
        let StepKind::Call(arguments) = &last.kind else {
            return fail("`call` needs a call");
        };
        let callee = self.value(base, scope)?;
        let callee = self.steps(callee, before, scope)?;
        self.call_named(&callee, arguments, caller, scope)
            .map_err(|failure| failure.at(last.line))
    }

    fn call_named(
        &mut self,
        callee: &Value,
        arguments: &Arguments,
        caller: Value,
        scope: ScopeId,
    ) -> Result<Value> {
        let mut args = self.arguments(arguments, scope)?;
        args.keyword.push(("caller".to_owned(), caller));
        self.call(callee, args)
    }

    fn call_method(&mut self, receiver: &Value, name: &str, args: Args) -> Result<Value> {
        match receiver {
            Value::Loop(state) => match name {
                "cycle" if args.positional.is_empty() => {
                    fail("`loop.cycle` needs what it goes through")
                }
                "cycle" => {
                    let count = args.positional.len();
                    Ok(args.positional[state.index0() % count].clone())
                }
                _ => Ok(Value::Bool(state.changed(args.positional)?)),
            },
            Value::Cycler(cycler) => match name {
                "next" => Ok(cycler.next()),
                _ => {
                    cycler.reset();
                    Ok(Value::None)
                }
            },
            _ => methods::call(receiver, name, args),
        }
    }

    fn call_function(&mut self, function: Function, args: Args) -> Result<Value> {
        match function {
            Function::Range => range(args),
            Function::Dict => dict(args),
            Function::Namespace => {
                let namespace = Namespace::new();
                self.namespaces.push(namespace.clone());
                let Value::Dict(given) = dict(args)? else {
                    return fail("`namespace` takes names and values");
                };
                for (name, value) in given.pairs() {
                    match name.as_str() {
                        Some(name) => namespace.set(name, value.clone())?,
                        None => return fail("the names of a namespace are text"),
                    }
                }
                Ok(Value::Namespace(namespace))
            }
            Function::Cycler if args.positional.is_empty() => {
                fail("`cycler` needs what it goes through")
            }
            Function::Cycler => Ok(Value::Cycler(Cycler::new(args.positional)?)),
            Function::Joiner => {
                let [separator] = args.bind("joiner", ["sep"])?;
                let separator = separator.unwrap_or_else(|| Value::text(", "));
                Ok(Value::Joiner(Joiner::new(separator)?))
            }
            Function::RaiseException => {
                let [message] = args.bind_all("raise_exception", ["message"])?;
                let text = to_text(&message)?.as_str().to_owned();
                Err(Failure::new(Reason::Raised(text)))
            }
            Function::StrftimeNow => {
                let [format] = args.bind_all("strftime_now", ["format"])?;
                let format = text_or(Some(&format), "", "the format of `strftime_now`")?;
                Ok(Value::text(date::strftime(
                    format,
                    self.setting.unix_seconds,
                )))
            }
        }
    }

    fn call_macro(&mut self, node: &Arc<Macro>, scope: ScopeId, args: Args) -> Result<Value> {
        self.in_scope(scope, |this, inner| {
            this.bind_macro(node, inner, args)?;
            this.captured(|this| this.statements(&node.body, inner).map(drop))
        })
    }

    fn bind_macro(&mut self, node: &Macro, inner: ScopeId, args: Args) -> Result<()> {
        let Args {
            positional,
            mut keyword,
        } = args;
        let name = &node.name;
        let count = node.parameters.len();
        let mut positional = positional.into_iter();
        for (parameter, default) in &node.parameters {
            let named = keyword.iter().position(|(known, _)| known == parameter);
            let value = match (positional.next(), named) {
                (Some(_), Some(_)) => return fail(format!("`{name}` gets `{parameter}` twice")),
                (Some(value), None) => value,
                (None, Some(at)) => keyword.remove(at).1,
                (None, None) => match default {
                    Some(default) => self.value(default, inner)?,
                    None => {
                        Value::undefined_hint(format!("`{parameter}` was not given to `{name}`"))
                    }
                },
            };
            self.scopes.set(inner, parameter, value);
        }
        let rest: Vec<Value> = positional.collect();
        let takes_caller = node.parameters.iter().any(|(name, _)| name == "caller");
        let caller = keyword.iter().position(|(known, _)| known == "caller");
        if node.uses_caller && !takes_caller {
            let caller = caller.map_or_else(
                || Value::undefined_hint("there is no `caller`"),
                |at| keyword.remove(at).1,
            );
            self.scopes.set(inner, "caller", caller);
        }
        if node.uses_kwargs {
            let pairs = std::mem::take(&mut keyword).into_iter();
            let pairs = pairs.map(|(name, value)| (Value::text(name), value));
            self.scopes
                .set(inner, "kwargs", Value::Dict(Dict::new(pairs)?));
        } else if let Some((unknown, _)) = keyword.first() {
            return fail(format!("`{name}` has no parameter `{unknown}`"));
        }
        if node.uses_varargs {
            self.scopes.set(inner, "varargs", Value::tuple(rest)?);
        } else if !rest.is_empty() {
            return fail(format!("`{name}` takes at most {count} arguments"));
        }
        Ok(())
    }
}

fn range(args: Args) -> Result<Value> {
    let [first, second, step] = args.bind("range", ["start", "stop", "step"])?;
    let bound = |value: &Value| value.to_count("a bound of `range`");
    let (start, stop) = match (&first, &second) {
        (Some(first), Some(second)) => (bound(first)?, bound(second)?),
        (Some(first), None) => (0, bound(first)?),
        _ => return fail("`range` needs a bound"),
    };
    let step = step.as_ref().map_or(Ok(1), bound)?;
    if step == 0 {
        return fail("the step of `range` cannot be 0");
    }
    let range = Range { start, stop, step };
    if range.len() > MAX_RANGE {
        return fail(format!("a range of more than {MAX_RANGE} numbers"));
    }
    Ok(Value::Range(range))
}

/// `dict(..)`: of an object or of pairs, and of names.
fn dict(args: Args) -> Result<Value> {
    let names = args.keyword.into_iter();
    let named = names.map(|(name, value)| (Value::text(name), value));
    let mut pairs = Vec::new();
    let mut positional = args.positional.into_iter();
    match positional.next() {
        Some(Value::Dict(dict)) => pairs.extend(dict.pairs().iter().cloned()),
        Some(other) => {
            for item in other.items()? {
                let mut pair = item.items()?.into_iter();
                match (pair.next(), pair.next(), pair.next()) {
                    (Some(key), Some(value), None) => pairs.push((key, value)),
                    _ => return fail("`dict` takes pairs of a key and a value"),
                }
            }
        }
        None => {}
    }
    if positional.next().is_some() {
        return fail("`dict` takes one argument at most");
    }
    Ok(Value::Dict(Dict::new(pairs.into_iter().chain(named))?))
}
