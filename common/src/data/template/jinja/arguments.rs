//! What a function, filter or test is called with.

use super::failure::{Result, fail};
use super::value::Value;

#[derive(Clone, Debug, Default)]
pub struct Args {
    pub positional: Vec<Value>,
    pub keyword: Vec<(String, Value)>,
}

impl Args {
    pub fn of(positional: Vec<Value>) -> Self {
        Self {
            positional,
            keyword: Vec::new(),
        }
    }

    /// Puts the values in the places of the parameters. `what` is called.
    pub fn bind<const N: usize>(self, what: &str, names: [&str; N]) -> Result<[Option<Value>; N]> {
        if self.positional.len() > N {
            return fail(format!(
                "`{what}` takes at most {N} arguments, not {}",
                self.positional.len()
            ));
        }
        let mut places = [const { None }; N];
        for (place, value) in places.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        for (name, value) in self.keyword {
            match names.iter().position(|known| *known == name) {
                Some(at) if places[at].is_none() => places[at] = Some(value),
                Some(_) => return fail(format!("`{what}` gets `{name}` twice")),
                None => return fail(format!("`{what}` has no parameter `{name}`")),
            }
        }
        Ok(places)
    }

    /// [`Args::bind`] where all values have to be given.
    pub fn bind_all<const N: usize>(self, what: &str, names: [&str; N]) -> Result<[Value; N]> {
        let mut values = [const { Value::None }; N];
        for ((value, given), name) in values.iter_mut().zip(self.bind(what, names)?).zip(names) {
            *value = match given {
                Some(given) => given,
                None => return fail(format!("`{what}` needs `{name}`")),
            };
        }
        Ok(values)
    }

    pub fn none(self, what: &str) -> Result<()> {
        self.bind(what, []).map(|[]| ())
    }
}

/// An argument that is text, or else a number of its own.
pub fn text_or<'a>(value: Option<&'a Value>, default: &'a str, what: &str) -> Result<&'a str> {
    match value {
        None => Ok(default),
        Some(Value::Text(text)) => Ok(text.as_str()),
        Some(other) => Err(other.blamed(format!("{what} must be text, not {}", other.described()))),
    }
}

pub fn count_or(value: Option<&Value>, default: i64, what: &str) -> Result<i64> {
    value.map_or(Ok(default), |value| value.to_count(what))
}

pub fn truth_or(value: Option<&Value>, default: bool) -> bool {
    value.map_or(default, Value::is_true)
}
