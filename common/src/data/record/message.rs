//! Reads one message of a conversation: checked, and with the template's own names.
//!
//! Enters: an item of a list of messages. Leaves: the message as templates read it and whether it is learned, or why not.
//! Which roles there are is the template's business; only what looks like a slip of the pen is refused.

use serde_json::{Map, Value as Json, json};

use super::super::json::{self, kind_of};
use super::super::notes::Note;
use super::details::{self, Detail, PartialMask};
use super::meant::{columns_found, nearest};
use crate::job::{FieldNames, MaskSpec, REASONING, SHAREGPT_ROLES};

const ASSISTANT: &str = "assistant";

/// Roles that are known, so that they need no note.
pub(super) const ROLES: [&str; 4] = ["system", "user", ASSISTANT, "tool"];

/// ShareGPT's role of a message that calls tools.
const FUNCTION_CALL: &str = "function_call";

/// Keys that say whether a message is learned: of Axolotl, OpenAI and ms-swift.
const SWITCHES: [&str; 3] = ["train", "weight", "loss"];

/// Keys that weigh or mask in ways that are not done here.
const REFUSED_KEYS: [&str; 9] = [
    "train_detail",
    "training_detail",
    "trainable",
    "mask",
    "masked",
    "loss_mask",
    "loss_weight",
    "loss_scale",
    "training",
];

/// Kinds of content parts that a model which only reads text never sees.
const MEDIA_PARTS: [&str; 11] = [
    "image",
    "image_url",
    "input_image",
    "video",
    "video_url",
    "input_video",
    "audio",
    "audio_url",
    "input_audio",
    "file",
    "input_file",
];

/// A message that can be used.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub json: Json,
    /// Whether the message says of itself that it is learned; None where it says nothing.
    pub learned: Option<bool>,
    /// Which of its characters are, where that is not all of them.
    pub partial: Option<PartialMask>,
}

/// Reads the messages of one dataset.
pub struct MessageReader<'a> {
    pub names: &'a FieldNames,
    /// Roles by the data's own names for them.
    pub roles: &'a [(String, String)],
    /// Further keys that say what is learned.
    pub mask: &'a MaskSpec,
    /// Whether the chat template itself names this role.
    pub accepts_role: &'a (dyn Fn(&str) -> bool + Sync),
}

impl MessageReader<'_> {
    pub fn read(&self, message: &Json, notes: &mut Vec<Note>) -> Result<Message, String> {
        let Json::Object(fields) = message else {
            return Err(format!(
                "must be an object with role and content, not {}",
                kind_of(message)
            ));
        };
        let role = self.role(fields, notes)?;
        self.check_content(fields)?;
        if role == FUNCTION_CALL {
            return self.function_call(fields);
        }
        let (learned, partial) = said_of(fields, self)?;
        let own = [&self.mask.training, &self.mask.training_detail];
        let is_switch = |name: &str| {
            SWITCHES.contains(&name) || own.iter().any(|own| own.as_deref() == Some(name))
        };
        let renamed = fields
            .iter()
            .filter(|(name, _)| !is_switch(name))
            .map(|(name, value)| {
                let joined = self.joined(name, value);
                let value = joined.as_ref().unwrap_or(value);
                let thinking = self.names.thinking.as_ref().filter(|[own, _]| name == own);
                match (name, thinking) {
                    (name, _) if *name == self.names.role => ("role".to_owned(), role.into()),
                    (name, _) if *name == self.names.content => {
                        ("content".to_owned(), value.clone())
                    }
                    (_, Some([_, read])) => (read.clone(), value.clone()),
                    (name, None) => (name.clone(), value.clone()),
                }
            })
            .collect();
        Ok(Message {
            json: Json::Object(renamed),
            learned,
            partial,
        })
    }

    /// Keys of a message that have its thinking.
    fn reasoning_keys(&self) -> impl Iterator<Item = &str> {
        let own = self.names.thinking.as_ref().map(|[own, _]| own.as_str());
        REASONING.into_iter().chain(own)
    }

    /// A list of parts that say of themselves whether they are learned, as one text: a template must not see that.
    fn joined(&self, name: &str, value: &Json) -> Option<Json> {
        let is_text = name == self.names.content || self.reasoning_keys().any(|key| key == name);
        let parts = value.as_array().filter(|_| is_text)?;
        let joined = details::join(parts, of_part).ok()??;
        joined.details.is_some().then(|| Json::String(joined.text))
    }

    /// A message that is nothing but calls of tools: ShareGPT's `function_call`, whose text is their JSON.
    fn function_call(&self, fields: &Map<String, Json>) -> Result<Message, String> {
        let name = &self.names.content;
        let text = fields.get(name).and_then(Json::as_str).unwrap_or_default();
        let is_call = |call: &Json| call["name"].is_string() && call.get("arguments").is_some();
        let calls = match json::parse_text(text) {
            Ok(Json::Array(calls)) => calls,
            Ok(call) => vec![call],
            Err(reason) => return Err(format!("`{name}` of a function call is no JSON: {reason}")),
        };
        if calls.is_empty() || !calls.iter().all(is_call) {
            return Err(format!(
                "`{name}` of a function call must be JSON with `name` and `arguments`, or a list of such"
            ));
        }
        let calls: Vec<Json> = calls
            .into_iter()
            .map(|call| json!({"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}))
            .collect();
        Ok(Message {
            json: json!({"role": ASSISTANT, "content": "", "tool_calls": calls}),
            learned: said_of(fields, self)?.0,
            partial: None,
        })
    }

    fn role<'a>(
        &'a self,
        fields: &'a Map<String, Json>,
        notes: &mut Vec<Note>,
    ) -> Result<&'a str, String> {
        let name = &self.names.role;
        let role = match fields.get(name) {
            Some(Json::String(role)) => role,
            Some(other) => {
                return Err(format!("`{name}` must be a string, not {}", kind_of(other)));
            }
            None => return Err(format!("no `{name}`; {}", columns_found(fields, &[name]))),
        };
        if let Some((_, known)) = self.roles.iter().find(|(own, _)| own == role) {
            return Ok(known);
        }
        if ROLES.contains(&role.as_str()) || role == FUNCTION_CALL || (self.accepts_role)(role) {
            return Ok(role);
        }
        if let Some((_, known)) = SHAREGPT_ROLES.iter().find(|(own, _)| own == role) {
            notes.push(Note::RoleRenamed(format!("{role} as {known}")));
            return Ok(known);
        }
        let meant = match role.trim().to_lowercase().as_str() {
            "human" | "prompter" => Some("user"),
            "gpt" | "bot" | "ai" | "model" | "chatbot" => Some(ASSISTANT),
            "function" | "ipython" | "function_response" => Some("tool"),
            "" => return Err(format!("`{name}` is empty")),
            lower => nearest(lower, &ROLES),
        };
        match meant {
            Some(meant) => Err(format!("unknown role `{role}` (did you mean `{meant}`?)")),
            None => {
                notes.push(Note::Role(role.clone()));
                Ok(role)
            }
        }
    }

    fn check_content(&self, fields: &Map<String, Json>) -> Result<(), String> {
        let name = &self.names.content;
        if fields
            .get("function_call")
            .is_some_and(|call| !call.is_null())
        {
            return Err(
                "`function_call` is the old form of a tool call: write it as `tool_calls`"
                    .to_owned(),
            );
        }
        let has = |name: &str| match fields.get(name) {
            None | Some(Json::Null) => false,
            Some(Json::Array(items)) => !items.is_empty(),
            Some(_) => true,
        };
        let says_else = has("tool_calls") || REASONING.iter().any(|name| has(name));
        match fields.get(name) {
            Some(Json::String(_)) => Ok(()),
            Some(Json::Array(parts)) => parts.iter().enumerate().try_for_each(|(index, part)| {
                check_part(part)
                    .map_err(|reason| format!("part {} of `{name}` {reason}", index + 1))
            }),
            None | Some(Json::Null) if says_else => Ok(()),
            Some(Json::Null) => Err(format!(
                "`{name}` is null and there are no `tool_calls`: write the text, or \"\" where there is none"
            )),
            None => Err(format!(
                "no `{name}`; {}",
                columns_found(fields, &[name.as_str()])
            )),
            Some(other) => Err(format!(
                "`{name}` must be a string or a list of parts, not {}",
                kind_of(other)
            )),
        }
    }
}

fn check_part(part: &Json) -> Result<(), String> {
    let kind = part["type"].as_str().unwrap_or("text");
    if MEDIA_PARTS.contains(&kind) {
        return Err(format!("is of type `{kind}`: only text is learned from"));
    }
    Ok(())
}

/// What a message says of itself about being learned, under the keys in `names` and in parts of its texts.
fn said_of(
    fields: &Map<String, Json>,
    reader: &MessageReader,
) -> Result<(Option<bool>, Option<PartialMask>), String> {
    let mask = reader.mask;
    let named = [&mask.training, &mask.training_detail];
    let is_named = |name: &str| named.iter().any(|own| own.as_deref() == Some(name));
    let is_set = |name: &&&str| fields.get(**name).is_some_and(|value| !value.is_null());
    let refused = REFUSED_KEYS.iter().filter(|name| !is_named(name));
    if let Some(name) = refused.clone().find(is_set) {
        return Err(format!(
            "`{name}` is not read: a message says with `train` or `weight` whether it is learned; other names are given as message_field_training (true or false) or message_field_training_detail (ranges of characters)"
        ));
    }
    let mut said: Option<(&str, bool)> = None;
    for name in SWITCHES.into_iter().chain(mask.training.as_deref()) {
        let Some(value) = fields.get(name).filter(|value| !value.is_null()) else {
            continue;
        };
        let learned = switch(name, value)?;
        if let Some((other, other_learned)) = said
            && other_learned != learned
        {
            return Err(format!("`{other}` and `{name}` contradict each other"));
        }
        said = Some((name, learned));
    }
    let partial = partial_mask(fields, reader)?;
    Ok(match (said, partial) {
        (Some((name, true)), Some(partial)) if !partial.learns_anything() => {
            return Err(format!("`{name}` and its parts contradict each other"));
        }
        (Some((_, false)), _) => (Some(false), None),
        (_, Some(partial)) if !partial.learns_anything() => (Some(false), None),
        (_, Some(partial)) if is_whole(fields, &partial, reader) => (Some(true), None),
        (_, Some(partial)) => (Some(true), Some(partial)),
        (said, None) => (said.map(|(_, learned)| learned), None),
    })
}

/// Which characters are learned, where a message says so of parts of it.
fn partial_mask(
    fields: &Map<String, Json>,
    reader: &MessageReader,
) -> Result<Option<PartialMask>, String> {
    let content = &reader.names.content;
    let of_parts = |name: &str| -> Result<Option<Vec<Detail>>, String> {
        match fields.get(name) {
            Some(Json::Array(parts)) => {
                let joined = details::join(parts, of_part)?;
                Ok(joined.and_then(|joined| joined.details))
            }
            _ => Ok(None),
        }
    };
    let ranges = match &reader.mask.training_detail {
        Some(name) => details::read(fields, name, content)?,
        None => None,
    };
    let own = of_parts(content)?;
    if own.is_some() && ranges.is_some() {
        return Err(format!(
            "parts of `{content}` say what is learned, and ranges of characters, too: remove one"
        ));
    }
    let mut reasoning = None;
    for name in reader.reasoning_keys() {
        reasoning = reasoning.or(of_parts(name)?);
    }
    let content = ranges.or(own);
    if content.is_none() && reasoning.is_none() {
        return Ok(None);
    }
    Ok(Some(PartialMask {
        content: content.unwrap_or_default(),
        reasoning: reasoning.unwrap_or_default(),
    }))
}

/// Whether parts say no more than that the message is learned: all of its content, and it has nothing else.
fn is_whole(fields: &Map<String, Json>, partial: &PartialMask, reader: &MessageReader) -> bool {
    let has = |name: &str| fields.get(name).is_some_and(|value| !value.is_null());
    let is_list = fields
        .get(&reader.names.content)
        .is_some_and(Json::is_array);
    let mut others = reader.reasoning_keys().chain(["tool_calls"]);
    is_list && partial.content.iter().all(|detail| detail.train) && !others.any(has)
}

/// Whether a part of a text says that it is learned.
fn of_part(part: &Json) -> Result<Option<bool>, String> {
    let mut said = None;
    for name in SWITCHES {
        if let Some(value) = part.get(name).filter(|value| !value.is_null()) {
            said = Some(switch(name, value)?);
        }
    }
    Ok(said)
}

fn switch(name: &str, value: &Json) -> Result<bool, String> {
    match value {
        Json::Bool(learned) => Ok(*learned),
        Json::Number(number) if number.as_f64() == Some(0.0) => Ok(false),
        Json::Number(number) if number.as_f64() == Some(1.0) => Ok(true),
        other => Err(format!(
            "`{name}` is {other}: only 0 (not learned) and 1 (learned) are known"
        )),
    }
}
