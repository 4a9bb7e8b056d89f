//! Variables by name, in scopes within scopes.

use super::super::value::Value;

/// A scope's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScopeId(usize);

impl ScopeId {
    pub const OUTERMOST: Self = Self(0);
}

#[derive(Debug)]
struct Scope {
    parent: Option<ScopeId>,
    variables: Vec<(String, Value)>,
}

/// All scopes of a run. Macros refer to theirs by place, so nothing holds itself.
#[derive(Debug)]
pub struct Scopes(Vec<Scope>);

impl Default for Scopes {
    fn default() -> Self {
        Self(vec![Scope {
            parent: None,
            variables: Vec::new(),
        }])
    }
}

impl Scopes {
    pub fn open(&mut self, parent: ScopeId) -> ScopeId {
        self.0.push(Scope {
            parent: Some(parent),
            variables: Vec::new(),
        });
        ScopeId(self.0.len() - 1)
    }

    /// Forgets the scope and all that were opened after it.
    pub fn close(&mut self, scope: ScopeId) {
        self.0.truncate(scope.0);
    }

    pub fn get(&self, scope: ScopeId, name: &str) -> Option<Value> {
        let mut place = Some(scope);
        while let Some(scope) = place.and_then(|place| self.0.get(place.0)) {
            let mut variables = scope.variables.iter();
            if let Some((_, value)) = variables.find(|(known, _)| known == name) {
                return Some(value.clone());
            }
            place = scope.parent;
        }
        None
    }

    pub fn set(&mut self, scope: ScopeId, name: &str, value: Value) {
        let Some(scope) = self.0.get_mut(scope.0) else {
            return;
        };
        match scope.variables.iter_mut().find(|(known, _)| known == name) {
            Some((_, place)) => *place = value,
            None => scope.variables.push((name.to_owned(), value)),
        }
    }
}
