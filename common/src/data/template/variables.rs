//! Further variables for a template, as a row (`chat_template_kwargs`) gives them.
//!
//! Enters: a JSON object. Leaves: variables that a template sees by their names, or which name they cannot have.

use serde_json::{Map, Value as Json};

use super::super::json::kind_of;
use super::{Value, to_value};

/// Further variables that a template sees, by name.
#[derive(Clone, Debug, Default)]
pub struct Variables(Vec<(String, Value)>);

/// Names that Transformers' `apply_chat_template` gives a meaning of its own, so that it would not hand them to the
/// template (parameters of `apply_chat_template` and `render_jinja_template`, Transformers 5).
const RESERVED: [&str; 23] = [
    "messages",
    "conversation",
    "conversations",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "processor_kwargs",
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl Variables {
    /// Variables as a row gives them. The error names what is wrong, to be put after the name of the column.
    pub fn from_json(json: &Json) -> Result<Self, String> {
        match json {
            Json::Null => Ok(Self::default()),
            Json::Object(fields) => Self::from_fields(fields),
            other => Err(format!(
                "must be an object of names and values for the chat template, not {}",
                kind_of(other)
            )),
        }
    }

    fn from_fields(fields: &Map<String, Json>) -> Result<Self, String> {
        if let Some(name) = fields.keys().find(|name| is_reserved(name)) {
            return Err(format!(
                "`{name}` is set by Muster itself and cannot be given to the chat template"
            ));
        }
        if let Some(name) = fields.keys().find(|name| !is_name(name)) {
            return Err(format!(
                "{name:?} is not a name that a chat template can use"
            ));
        }
        let pairs = fields.iter();
        Ok(Self(
            pairs
                .map(|(name, value)| (name.clone(), to_value(value)))
                .collect(),
        ))
    }

    /// These variables, with those of `over` where both have the name: a row's over the job's.
    pub fn overlaid(&self, over: &Self) -> Self {
        let kept = self.0.iter().filter(|(name, _)| over.get(name).is_none());
        Self(kept.chain(&over.0).cloned().collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        let mut pairs = self.0.iter();
        pairs
            .find(|(known, _)| known == name)
            .map(|(_, value)| value)
    }
}

fn is_reserved(name: &str) -> bool {
    RESERVED.contains(&name)
}

fn is_name(name: &str) -> bool {
    let starts_well = |c: char| c.is_alphabetic() || c == '_';
    name.starts_with(starts_well) && name.chars().all(|c| c.is_alphanumeric() || c == '_')
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_with_a_meaning_of_their_own_are_refused() {
        for name in [
            "messages",
            "tools",
            "add_generation_prompt",
            "bos_token",
            "a b",
            "",
            "1a",
        ] {
            let error = Variables::from_json(&json!({"fine": 1, name: 2})).unwrap_err();
            assert!(error.contains(name), "{error}");
        }
        assert!(
            Variables::from_json(&json!([1]))
                .unwrap_err()
                .contains("a list")
        );
        assert!(Variables::from_json(&Json::Null).unwrap().is_empty());
    }

    #[test]
    fn a_row_has_the_last_word() {
        let of = |json: Json| Variables::from_json(&json).unwrap();
        let job = of(json!({"a": 1, "b": 2}));
        let both = job.overlaid(&of(json!({"b": 3})));
        let number = |name| both.get(name).and_then(Value::as_integer);
        assert_eq!(number("a"), Some(1.into()));
        assert_eq!(number("b"), Some(3.into()));
    }
}
