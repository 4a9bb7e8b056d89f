//! Variables by name, in scopes within scopes.

use super::super::ast::{Expression, ExpressionKind, StepKind};
use super::super::methods;
use super::super::value::Value;

/// A scope's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScopeId(usize);

impl ScopeId {
    pub const OUTERMOST: Self = Self(0);
}

#[derive(Debug, Default)]
struct Scope {
    parent: Option<ScopeId>,
    /// The variables, and behind them the places of those that it had when it was open before.
    variables: Vec<(String, Value)>,
    /// Number of its variables.
    count: usize,
}

/// All scopes of a run. Macros refer to theirs by place, so nothing holds itself.
#[derive(Debug)]
pub struct Scopes {
    /// Those that are open, and behind them closed ones: a loop opens the same ones again and again.
    scopes: Vec<Scope>,
    /// Number of those that are open.
    count: usize,
}

impl Default for Scopes {
    fn default() -> Self {
        Self {
            scopes: vec![Scope::default()],
            count: 1,
        }
    }
}

impl Scopes {
    pub fn open(&mut self, parent: ScopeId) -> ScopeId {
        if self.count == self.scopes.len() {
            self.scopes.push(Scope::default());
        }
        self.scopes[self.count].parent = Some(parent);
        self.count += 1;
        ScopeId(self.count - 1)
    }

    /// Forgets the scope and all that were opened after it.
    pub fn close(&mut self, scope: ScopeId) {
        let (from, to) = (scope.0.min(self.count), self.count);
        for closed in &mut self.scopes[from..to] {
            let variables = closed.variables.iter_mut().take(closed.count);
            variables.for_each(|(_, value)| *value = Value::None);
            closed.count = 0;
        }
        self.count = from;
    }

    pub fn get(&self, scope: ScopeId, name: &str) -> Option<&Value> {
        let mut place = Some(scope);
        while let Some(place_of) = place.filter(|place| place.0 < self.count) {
            let scope = &self.scopes[place_of.0];
            let mut variables = scope.variables[..scope.count].iter();
            if let Some((_, value)) = variables.find(|(known, _)| known == name) {
                return Some(value);
            }
            place = scope.parent;
        }
        None
    }

    pub fn set(&mut self, scope: ScopeId, name: &str, value: Value) {
        if scope.0 >= self.count {
            return;
        }
        let Scope {
            variables, count, ..
        } = &mut self.scopes[scope.0];
        let known = variables[..*count]
            .iter_mut()
            .find(|(known, _)| known == name);
        if let Some((_, place)) = known {
            *place = value;
            return;
        }
        match variables.get_mut(*count) {
            Some((known, place)) => {
                if known != name {
                    name.clone_into(known);
                }
                *place = value;
            }
            None => variables.push((name.to_owned(), value)),
        }
        *count += 1;
    }

    /// The value of an expression, where that is a constant, a variable or an item of one, which needs no work: None for all else.
    pub fn known<'a>(&'a self, expression: &'a Expression, scope: ScopeId) -> Option<&'a Value> {
        match &expression.kind {
            ExpressionKind::Constant(value) => Some(value),
            ExpressionKind::Name(name) => self.get(scope, name),
            ExpressionKind::Postfix { base, steps } => {
                let mut value = self.known(base, scope)?;
                for step in steps {
                    value = match (&step.kind, value) {
                        (StepKind::Attribute(name), Value::Dict(dict))
                            if !methods::is_own(value, name) =>
                        {
                            dict.get_str(name)?
                        }
                        _ => return None,
                    };
                }
                Some(value)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_that_is_opened_again_has_none_of_its_old_variables() {
        let mut scopes = Scopes::default();
        scopes.set(ScopeId::OUTERMOST, "a", Value::int(1));
        for round in 0..3 {
            let outer = scopes.open(ScopeId::OUTERMOST);
            let inner = scopes.open(outer);
            for name in ["b", "c", "d"] {
                assert!(scopes.get(inner, name).is_none(), "{round} {name}");
            }
            // Not the same names in each round.
            scopes.set(inner, ["b", "c", "d"][round], Value::int(round));
            scopes.set(inner, "a", Value::int(7));
            let of_inner = |name: &str| scopes.get(inner, name).and_then(Value::as_integer);
            assert_eq!(of_inner("a").and_then(|a| a.to_i64()), Some(7));
            let own = of_inner(["b", "c", "d"][round]).and_then(|own| own.to_i64());
            assert_eq!(own, Some(round as i64));
            let outermost = scopes.get(outer, "a").and_then(Value::as_integer);
            assert_eq!(outermost.and_then(|a| a.to_i64()), Some(1));
            scopes.close(outer);
            assert!(scopes.get(inner, "a").is_none());
        }
    }
}
