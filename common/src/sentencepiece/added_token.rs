//! A token that is added to a vocabulary, read from the JSON files that describe one and written as they do.

use serde_json::{Value, json};

/// A token that text becomes whole, and where it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AddedToken {
    pub text: String,
    is_special: bool,
    /// Whether it is looked for in the text as the normalizer leaves it.
    normalized: bool,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
}

impl AddedToken {
    pub fn plain(text: &str, is_special: bool) -> Self {
        Self {
            text: text.to_owned(),
            is_special,
            normalized: !is_special,
            single_word: false,
            lstrip: false,
            rstrip: false,
        }
    }

    /// A token that a file describes. None where it is not described as it should be.
    pub fn parse(json: &Value) -> Option<Self> {
        let flag = |name: &str, default: bool| match &json[name] {
            Value::Null => Some(default),
            other => other.as_bool(),
        };
        let text = json["content"].as_str().filter(|text| !text.is_empty())?;
        let is_special = flag("special", false)?;
        Some(Self {
            text: text.to_owned(),
            is_special,
            normalized: flag("normalized", !is_special)?,
            single_word: flag("single_word", false)?,
            lstrip: flag("lstrip", false)?,
            rstrip: flag("rstrip", false)?,
        })
    }

    /// A special token as a file names it: its text, or its description.
    pub fn named(json: &Value) -> Option<Self> {
        match json {
            Value::String(text) if !text.is_empty() => Some(Self::plain(text, true)),
            Value::Object(_) => Some(Self {
                is_special: true,
                ..Self::parse(json)?
            }),
            _ => None,
        }
    }

    /// The token, looked for in the text before the normalizer changes that.
    pub fn in_raw_text(self) -> Self {
        Self {
            normalized: false,
            ..self
        }
    }

    /// The token as `tokenizer.json` describes it, and without an id as `tokenizer_config.json` does.
    pub fn described(&self, id: Option<u32>) -> Value {
        let mut token = json!({
            "id": id,
            "content": self.text,
            "single_word": self.single_word,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": self.normalized,
            "special": self.is_special,
        });
        if let (None, Some(fields)) = (id, token.as_object_mut()) {
            fields.shift_remove("id");
        }
        token
    }
}
