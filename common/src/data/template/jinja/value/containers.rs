//! Lists, objects, ranges and generators.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::failure::{Result, fail};
use super::super::integer::Integer;
use super::super::meter::{Held, reserve, spend};
use super::Value;

/// Most levels of containers (JSON has 128 at most).
pub const MAX_DEPTH: usize = 160;

/// Objects with fewer entries are searched one by one.
const INDEXED_FROM: usize = 12;

#[derive(Clone, Debug)]
pub struct List(Arc<ListInner>);

#[derive(Debug)]
struct ListInner {
    items: Vec<Value>,
    depth: usize,
    _held: Held,
}

impl List {
    pub fn new(items: Vec<Value>) -> Result<Self> {
        let bytes = items.len() * size_of::<Value>();
        reserve(bytes)?;
        let depth = checked_depth(items.iter())?;
        Ok(Self(Arc::new(ListInner {
            depth,
            _held: Held::new(bytes + size_of::<ListInner>()),
            items,
        })))
    }

    pub fn depth(&self) -> usize {
        self.0.depth
    }

    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl std::ops::Deref for List {
    type Target = [Value];

    fn deref(&self) -> &[Value] {
        &self.0.items
    }
}

fn checked_depth<'a>(items: impl Iterator<Item = &'a Value>) -> Result<usize> {
    let depth = 1 + items.map(Value::depth).max().unwrap_or(0);
    if depth > MAX_DEPTH {
        return fail(format!(
            "a value is nested more than {MAX_DEPTH} levels deep"
        ));
    }
    Ok(depth)
}

/// A value as a key of an object: equal keys are equal in Python.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Key {
    None,
    Int(Integer),
    Float(u64),
    Text(Box<str>),
    Tuple(Vec<Key>),
    Undefined,
    Range(Range),
}

fn key_of(value: &Value) -> Result<Key> {
    Ok(match value {
        Value::None => Key::None,
        Value::Bool(value) => Key::Int(Integer::Small(i64::from(*value))),
        Value::Int(value) => Key::Int(value.clone()),
        Value::Float(value) if value.fract() == 0.0 => match Integer::from_f64(*value) {
            Some(value) => Key::Int(value),
            None => Key::Float(value.to_bits()),
        },
        Value::Float(value) => Key::Float(value.to_bits()),
        Value::Text(text) => Key::Text(text.as_str().into()),
        Value::Tuple(items) => Key::Tuple(items.iter().map(key_of).collect::<Result<_>>()?),
        Value::Undefined(_) => Key::Undefined,
        Value::Range(range) => Key::Range(range.clone()),
        other => return fail(format!("{} cannot be a key", other.described())),
    })
}

/// Whether two values are one key, for values that were keys already or are none.
fn same_key(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Text(a), Value::Text(b)) => a.as_str() == b.as_str(),
        (Value::Text(_), _) | (_, Value::Text(_)) => false,
        _ => match (key_of(a), key_of(b)) {
            (Ok(a), Ok(b)) => a == b,
            _ => false,
        },
    }
}

/// An object, in the order in which its keys came.
#[derive(Clone, Debug)]
pub struct Dict(Arc<DictInner>);

#[derive(Debug)]
struct DictInner {
    pairs: Vec<(Value, Value)>,
    index: Option<HashMap<Key, usize>>,
    depth: usize,
    _held: Held,
}

impl Dict {
    /// The last value of a key that comes twice, at its first place.
    pub fn new(given: impl IntoIterator<Item = (Value, Value)>) -> Result<Self> {
        let given = given.into_iter();
        let mut pairs: Vec<(Value, Value)> = Vec::with_capacity(given.size_hint().0);
        let mut index: Option<HashMap<Key, usize>> = None;
        for (key, value) in given {
            let place = match &index {
                Some(index) => index.get(&key_of(&key)?).copied(),
                None => {
                    if !matches!(key, Value::Text(_)) {
                        key_of(&key)?;
                    }
                    pairs.iter().position(|(known, _)| same_key(known, &key))
                }
            };
            if let Some(place) = place {
                pairs[place].1 = value;
                continue;
            }
            if let Some(index) = &mut index {
                index.insert(key_of(&key)?, pairs.len());
            }
            pairs.push((key, value));
            if index.is_none() && pairs.len() >= INDEXED_FROM {
                let keys = pairs.iter().enumerate();
                let keys = keys.map(|(place, (key, _))| Ok((key_of(key)?, place)));
                index = Some(keys.collect::<Result<_>>()?);
            }
        }
        spend(pairs.len())?;
        let bytes = pairs.len() * size_of::<(Value, Value)>();
        reserve(bytes)?;
        let depth = checked_depth(pairs.iter().map(|(_, value)| value))?;
        Ok(Self(Arc::new(DictInner {
            index,
            depth,
            _held: Held::new(bytes + size_of::<DictInner>()),
            pairs,
        })))
    }

    pub fn get(&self, key: &Value) -> Option<&Value> {
        let place = match &self.0.index {
            Some(index) => index.get(&key_of(key).ok()?).copied(),
            None => self
                .0
                .pairs
                .iter()
                .position(|(known, _)| same_key(known, key)),
        };
        place.map(|place| &self.0.pairs[place].1)
    }

    pub fn get_str(&self, key: &str) -> Option<&Value> {
        if self.0.index.is_some() {
            return self.get(&Value::text(key));
        }
        let pairs = self.0.pairs.iter();
        let mut found = pairs.filter(|(known, _)| known.as_str() == Some(key));
        found.next().map(|(_, value)| value)
    }

    pub fn pairs(&self) -> &[(Value, Value)] {
        &self.0.pairs
    }

    pub fn keys(&self) -> impl Iterator<Item = &Value> {
        self.0.pairs.iter().map(|(key, _)| key)
    }

    pub fn values(&self) -> impl Iterator<Item = &Value> {
        self.0.pairs.iter().map(|(_, value)| value)
    }

    pub fn len(&self) -> usize {
        self.0.pairs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.pairs.is_empty()
    }

    pub fn depth(&self) -> usize {
        self.0.depth
    }

    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub fn items(&self) -> Result<Vec<Value>> {
        let pairs = self.0.pairs.iter();
        pairs
            .map(|(key, value)| Value::tuple(vec![key.clone(), value.clone()]))
            .collect()
    }
}

/// A value that `dict[key]` would refuse because it cannot be a key.
pub fn is_hashable(value: &Value) -> bool {
    key_of(value).is_ok()
}

/// What of an object is seen.
#[derive(Clone, Debug)]
pub struct View {
    pub dict: Dict,
    pub part: Part,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Keys,
    Values,
    Items,
}

impl View {
    pub fn items(&self) -> Result<Vec<Value>> {
        match self.part {
            Part::Keys => Ok(self.dict.keys().cloned().collect()),
            Part::Values => Ok(self.dict.values().cloned().collect()),
            Part::Items => self.dict.items(),
        }
    }

    pub fn type_name(&self) -> &'static str {
        match self.part {
            Part::Keys => "dict_keys",
            Part::Values => "dict_values",
            Part::Items => "dict_items",
        }
    }
}

/// Integers from a first one, evenly spaced.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    pub start: i64,
    pub stop: i64,
    pub step: i64,
}

impl Range {
    pub fn len(&self) -> usize {
        let (start, stop) = (i128::from(self.start), i128::from(self.stop));
        let span = if self.step > 0 {
            stop - start
        } else {
            start - stop
        };
        let step = i128::from(self.step.unsigned_abs());
        usize::try_from((span + step - 1).max(0) / step.max(1)).unwrap_or(usize::MAX)
    }

    pub fn at(&self, place: usize) -> Value {
        let place = i128::try_from(place).unwrap_or(0);
        let value = i128::from(self.start) + place * i128::from(self.step);
        Value::Int(Integer::from_i128(value))
    }

    pub fn items(&self) -> Vec<Value> {
        (0..self.len()).map(|place| self.at(place)).collect()
    }
}

/// Values that can be gone through once.
#[derive(Clone, Debug)]
pub struct Generator(Arc<Mutex<VecDeque<Value>>>, usize);

impl Generator {
    pub fn new(items: Vec<Value>) -> Self {
        let depth = 1 + items.iter().map(Value::depth).max().unwrap_or(0);
        Self(Arc::new(Mutex::new(items.into())), depth)
    }

    pub fn take_all(&self) -> Vec<Value> {
        std::mem::take(&mut *self.items()).into()
    }

    pub fn take_first(&self) -> Option<Value> {
        self.items().pop_front()
    }

    pub fn depth(&self) -> usize {
        self.1
    }

    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn items(&self) -> MutexGuard<'_, VecDeque<Value>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
