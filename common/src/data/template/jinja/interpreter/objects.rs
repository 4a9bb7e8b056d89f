//! Values that change: namespaces, loops, cyclers and joiners.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::ast::ForLoop;
use super::super::failure::{Result, fail};
use super::super::value::{List, Value};
use super::scopes::ScopeId;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What `namespace()` makes: attributes that can be set from inside of loops.
#[derive(Clone)]
pub struct Namespace(Arc<Mutex<Vec<(String, Value)>>>);

impl std::fmt::Debug for Namespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // It may hold itself.
        f.debug_struct("Namespace").finish_non_exhaustive()
    }
}

impl Namespace {
    pub(super) fn new() -> Self {
        Self(Arc::default())
    }

    pub fn get(&self, name: &str) -> Option<Value> {
        let pairs = lock(&self.0);
        let found = pairs.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.clone())
    }

    /// Transformers keeps names with an underscore before them out.
    pub fn set(&self, name: &str, value: Value) -> Result<()> {
        if name.starts_with('_') {
            return fail(format!(
                "a namespace cannot have `{name}`: it begins with an underscore"
            ));
        }
        let mut pairs = lock(&self.0);
        match pairs.iter_mut().find(|(known, _)| known == name) {
            Some((_, place)) => {
                let old = std::mem::replace(place, value);
                drop(pairs);
                drop(old);
            }
            None => pairs.push((name.to_owned(), value)),
        }
        Ok(())
    }

    pub fn pairs(&self) -> Vec<(Value, Value)> {
        let pairs = lock(&self.0);
        pairs
            .iter()
            .map(|(name, value)| (Value::text(name.as_str()), value.clone()))
            .collect()
    }

    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(super) fn clear(&self) {
        let held = std::mem::take(&mut *lock(&self.0));
        drop(held);
    }
}

/// The variable `loop`.
#[derive(Clone)]
pub struct Loop(Arc<LoopState>);

struct LoopState {
    items: Vec<Value>,
    index: AtomicUsize,
    depth: usize,
    items_depth: usize,
    changed: Mutex<Option<Vec<Value>>>,
    recursive: Option<(Arc<ForLoop>, ScopeId)>,
}

impl std::fmt::Debug for Loop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loop").finish_non_exhaustive()
    }
}

impl Loop {
    pub(super) fn new(
        items: Vec<Value>,
        depth: usize,
        recursive: Option<(Arc<ForLoop>, ScopeId)>,
    ) -> Self {
        Self(Arc::new(LoopState {
            items_depth: items.iter().map(Value::depth).max().unwrap_or(0),
            items,
            index: AtomicUsize::new(0),
            depth,
            changed: Mutex::new(None),
            recursive,
        }))
    }

    pub fn length(&self) -> usize {
        self.0.items.len()
    }

    pub fn items_depth(&self) -> usize {
        self.0.items_depth
    }

    pub fn index0(&self) -> usize {
        self.0.index.load(Ordering::Relaxed)
    }

    pub(super) fn go_to(&self, index: usize) {
        self.0.index.store(index, Ordering::Relaxed);
    }

    pub(super) fn item(&self, index: usize) -> Value {
        self.0.items.get(index).cloned().unwrap_or(Value::None)
    }

    pub(super) fn recursive(&self) -> Option<(Arc<ForLoop>, ScopeId, usize)> {
        let recursive = self.0.recursive.as_ref();
        recursive.map(|(node, scope)| (Arc::clone(node), *scope, self.0.depth))
    }

    pub(super) fn attribute(&self, name: &str) -> Option<Value> {
        let (index, length) = (self.index0(), self.length());
        Some(match name {
            "index" => Value::int(index + 1),
            "index0" => Value::int(index),
            "revindex" => Value::int(length - index),
            "revindex0" => Value::int(length - index - 1),
            "first" => Value::Bool(index == 0),
            "last" => Value::Bool(index + 1 == length),
            "length" => Value::int(length),
            "depth" => Value::int(self.0.depth + 1),
            "depth0" => Value::int(self.0.depth),
            "previtem" if index == 0 => Value::undefined_hint("there is no previous item"),
            "previtem" => self.item(index - 1),
            "nextitem" if index + 1 == length => Value::undefined_hint("there is no next item"),
            "nextitem" => self.item(index + 1),
            _ => return None,
        })
    }

    /// Whether these values are others than those of the last call.
    pub(super) fn changed(&self, values: Vec<Value>) -> Result<bool> {
        let mut last = lock(&self.0.changed);
        let same = match last.as_ref() {
            Some(last) if last.len() == values.len() => {
                let mut same = true;
                for (a, b) in last.iter().zip(&values) {
                    same &= super::super::operators::equal(a, b)?;
                }
                same
            }
            _ => false,
        };
        *last = Some(values);
        Ok(!same)
    }
}

/// What `cycler()` makes.
#[derive(Clone, Debug)]
pub struct Cycler(Arc<(List, AtomicUsize)>);

impl Cycler {
    pub(super) fn new(items: Vec<Value>) -> Result<Self> {
        Ok(Self(Arc::new((List::new(items)?, AtomicUsize::new(0)))))
    }

    pub fn depth(&self) -> usize {
        self.0.0.depth()
    }

    pub(super) fn current(&self) -> Value {
        let (items, at) = &*self.0;
        let at = at.load(Ordering::Relaxed) % items.len().max(1);
        items.get(at).cloned().unwrap_or(Value::None)
    }

    pub(super) fn next(&self) -> Value {
        let value = self.current();
        self.0.1.fetch_add(1, Ordering::Relaxed);
        value
    }

    pub(super) fn reset(&self) {
        self.0.1.store(0, Ordering::Relaxed);
    }
}

/// What `joiner()` makes.
#[derive(Clone, Debug)]
pub struct Joiner(Arc<(List, AtomicUsize)>);

impl Joiner {
    pub(super) fn new(separator: Value) -> Result<Self> {
        let separator = List::new(vec![separator])?;
        Ok(Self(Arc::new((separator, AtomicUsize::new(0)))))
    }

    pub fn depth(&self) -> usize {
        self.0.0.depth()
    }

    /// Nothing the first time, then the separator.
    pub(super) fn next(&self) -> Value {
        match self.0.1.fetch_add(1, Ordering::Relaxed) {
            0 => Value::text(""),
            _ => self.0.0.first().cloned().unwrap_or(Value::None),
        }
    }
}
