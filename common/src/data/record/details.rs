//! Which characters of a message are learned, where it says so of parts of it.
//!
//! Enters: a message's content as a list of parts with `train` or `weight`, or a list of ranges of characters. Leaves: the
//! content as one text, and ranges of its characters.

use serde_json::{Map, Value as Json};

use super::super::json::kind_of;

/// Most ranges of one message.
const MAX_DETAILS: usize = 10_000;

/// A range of characters that is learned, or is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Detail {
    /// Index of its first character.
    pub begin: usize,
    /// Index of its last character.
    pub end: usize,
    pub train: bool,
}

/// Which characters of a message's texts are learned; of a text without ranges none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartialMask {
    pub content: Vec<Detail>,
    pub reasoning: Vec<Detail>,
}

impl PartialMask {
    pub fn learns_anything(&self) -> bool {
        let mut all = self.content.iter().chain(&self.reasoning);
        all.any(|detail| detail.train)
    }
}

/// Parts of a text put together.
pub(super) struct Joined {
    pub text: String,
    /// A range for each part, where any of them says whether it is learned; those that say nothing are.
    pub details: Option<Vec<Detail>>,
}

/// Puts the parts of a list together. None where a part is no text.
pub(super) fn join(
    parts: &[Json],
    is_learned: impl Fn(&Json) -> Result<Option<bool>, String>,
) -> Result<Option<Joined>, String> {
    let mut text = String::new();
    let mut details = Vec::new();
    let mut says = false;
    let mut begin = 0;
    for part in parts {
        let own = match part {
            Json::String(own) => Some(own.as_str()),
            part => ["text", "content", "value"]
                .iter()
                .find_map(|name| part[*name].as_str()),
        };
        let Some(own) = own else {
            return Ok(None);
        };
        let learned = is_learned(part)?;
        says |= learned.is_some();
        let length = own.chars().count();
        if length > 0 {
            details.push(Detail {
                begin,
                end: begin + length - 1,
                train: learned.unwrap_or(true),
            });
        }
        text.push_str(own);
        begin += length;
    }
    Ok(Some(Joined {
        text,
        details: says.then_some(details),
    }))
}

/// Reads the ranges under a message's key `name`, which are of its `content`.
pub(super) fn read(
    fields: &Map<String, Json>,
    name: &str,
    content: &str,
) -> Result<Option<Vec<Detail>>, String> {
    let list = match fields.get(name) {
        None | Some(Json::Null) => return Ok(None),
        Some(Json::Array(list)) => list,
        Some(other) => {
            return Err(format!(
                "`{name}` must be a list of ranges (begin_offset, end_offset, train), not {}",
                kind_of(other)
            ));
        }
    };
    if list.is_empty() {
        return Ok(None);
    }
    if list.len() > MAX_DETAILS {
        return Err(format!("`{name}` has more than {MAX_DETAILS} ranges"));
    }
    let Some(Json::String(text)) = fields.get(content) else {
        return Err(format!(
            "`{name}` is of characters of `{content}`, which is no string"
        ));
    };
    let length = text.chars().count();
    let details = list.iter().zip(1..).map(|(range, number)| {
        detail(range, length).map_err(|reason| format!("range {number} of `{name}` {reason}"))
    });
    details.collect::<Result<_, _>>().map(Some)
}

fn detail(range: &Json, length: usize) -> Result<Detail, String> {
    const NAMES: [&str; 3] = ["begin_offset", "end_offset", "train"];
    let Json::Object(fields) = range else {
        return Err(format!("must be an object, not {}", kind_of(range)));
    };
    if let Some(other) = fields.keys().find(|key| !NAMES.contains(&key.as_str())) {
        return Err(format!("has `{other}`, which is not read"));
    }
    let offset = |name: &str| {
        let number = fields.get(name).and_then(Json::as_u64);
        let number = number.and_then(|number| usize::try_from(number).ok());
        number.ok_or_else(|| format!("must have `{name}`, the number of a character from 0"))
    };
    let (begin, end) = (offset(NAMES[0])?, offset(NAMES[1])?);
    let Some(train) = fields.get(NAMES[2]).and_then(Json::as_bool) else {
        return Err("must have `train`, true or false".to_owned());
    };
    if begin > end || begin >= length {
        return Err(format!(
            "is of the characters {begin} to {end}, and the text has {length} (from 0)"
        ));
    }
    Ok(Detail { begin, end, train })
}
