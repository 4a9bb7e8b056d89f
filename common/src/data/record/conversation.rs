//! Conversations of a row: its messages with what else the row and the job say of them, and which of them are learned.

use serde_json::{Map, Value as Json, json};

use super::super::json::{self, kind_of};
use super::super::notes::Note;
use super::super::template::Variables;
use super::message::{self, Message, MessageReader};
use super::{Chat, Ends, Record, RecordParser, VARIABLES};
use crate::job::MaskSpec;

impl RecordParser<'_> {
    pub(super) fn conversation(
        &self,
        messages: Vec<Message>,
        trained_from: usize,
        row: &Map<String, Json>,
        notes: &mut Vec<Note>,
    ) -> Result<Record, String> {
        let (messages, trained_from) = self.with_system(messages, trained_from, row)?;
        let learned = self.learned(&messages, trained_from, notes)?;
        let partial = messages
            .iter()
            .enumerate()
            .filter(|(index, _)| learned[*index]);
        let partial = partial.filter_map(|(index, said)| Some((index, said.partial.clone()?)));
        let partial = partial.collect();
        let variables = match row.get(VARIABLES) {
            None => self.variables.clone(),
            Some(given) => {
                let given = Variables::from_json(given)
                    .map_err(|reason| format!("column `{VARIABLES}`: {reason}"))?;
                self.variables.overlaid(&given)
            }
        };
        let mask = &self.spec.mask;
        Ok(Record::Conversation(Chat {
            messages: messages.into_iter().map(|message| message.json).collect(),
            learned,
            partial,
            ends: Ends {
                eos: mask.eos,
                eot: mask.eot,
            },
            tools: self.tools(row)?,
            variables,
        }))
    }

    /// The messages with the system message that the job wants, and the first of them that may be learned.
    fn with_system(
        &self,
        mut messages: Vec<Message>,
        mut trained_from: usize,
        row: &Map<String, Json>,
    ) -> Result<(Vec<Message>, usize), String> {
        let is_system = |said: &Message| {
            ["system", "developer"].contains(&said.json["role"].as_str().unwrap_or_default())
        };
        if self.spec.drop_system_message {
            let before = messages[..trained_from]
                .iter()
                .filter(|said| is_system(said));
            trained_from -= before.count();
            messages.retain(|said| !is_system(said));
        }
        let system = self.system_of(row)?.or(self.default_system);
        if let Some(text) = system.filter(|_| !messages.first().is_some_and(is_system)) {
            messages.insert(
                0,
                Message {
                    json: json!({"role": "system", "content": text}),
                    learned: None,
                    partial: None,
                },
            );
            trained_from += usize::from(trained_from > 0);
        }
        Ok((messages, trained_from))
    }

    /// Which messages are learned.
    fn learned(
        &self,
        messages: &[Message],
        trained_from: usize,
        notes: &mut Vec<Note>,
    ) -> Result<Vec<bool>, String> {
        let mask = &self.spec.mask;
        let mut learned = vec![false; messages.len()];
        let mut answers = 0;
        for (index, message) in messages.iter().enumerate() {
            let role = message.json["role"].as_str().unwrap_or_default();
            self.met.look_at_role(role);
            let is_answer = index >= trained_from && mask.learns_role(role);
            learned[index] = index >= trained_from && message.learned.unwrap_or(is_answer);
            answers += usize::from(is_answer || learned[index]);
            if is_answer && !learned[index] {
                notes.push(Note::LeftOut);
            }
            let is_less = message.learned == Some(false) || message.partial.is_some();
            if self.train_on_inputs && is_less {
                return Err(format!(
                    "message {} says that it is not to be learned, or not all of it, and `train_on_inputs` that everything is: remove one of them",
                    index + 1
                ));
            }
        }
        if answers == 0 {
            match mask.roles.as_ref().is_some_and(Vec::is_empty) {
                true => notes.push(Note::NothingLearned),
                false => return Err(no_turn(messages, mask)),
            }
        }
        if mask.last_only
            && let Some(last) = learned.iter().rposition(|learned| *learned)
        {
            learned[..last].fill(false);
        }
        Ok(learned)
    }

    /// The system message that a row has in a column of its own, if the job names that.
    fn system_of<'b>(&self, row: &'b Map<String, Json>) -> Result<Option<&'b str>, String> {
        let name = &self.spec.fields.system;
        match row.get(name).filter(|_| self.spec.has_system_column) {
            None | Some(Json::Null) => Ok(None),
            Some(Json::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
            Some(other) => Err(format!(
                "column `{name}` must be a string, not {}",
                kind_of(other)
            )),
        }
    }

    /// The tools that a conversation may call. Datasets keep them as JSON in a string too, since their schemas differ
    /// from row to row.
    fn tools(&self, row: &Map<String, Json>) -> Result<Option<Json>, String> {
        let name = &self.spec.fields.tools;
        let tools = match row.get(name) {
            None | Some(Json::Null) => return Ok(None),
            Some(Json::String(text)) if text.trim().is_empty() => return Ok(None),
            Some(Json::String(text)) => {
                json::parse_text(text).map_err(|reason| format!("column `{name}`: {reason}"))?
            }
            Some(tools) => tools.clone(),
        };
        if let Some(reason) = json::unreadable_number(&tools) {
            return Err(format!("column `{name}` holds {reason}"));
        }
        let items = match &tools {
            Json::Null => return Ok(None),
            Json::Array(items) => items,
            other => {
                return Err(format!(
                    "column `{name}` must be a list of tools, not {}",
                    kind_of(other)
                ));
            }
        };
        match items.iter().position(|tool| !tool.is_object()) {
            None => Ok(Some(tools)),
            Some(index) => Err(format!(
                "tool {} of column `{name}` is {}: write each tool as an object, its JSON schema",
                index + 1,
                kind_of(&items[index])
            )),
        }
    }

    pub(super) fn messages(
        &self,
        value: &Json,
        name: &str,
        notes: &mut Vec<Note>,
    ) -> Result<Vec<Message>, String> {
        let Json::Array(list) = value else {
            return Err(format!(
                "column `{name}` must be a list of messages, not {}",
                kind_of(value)
            ));
        };
        if list.is_empty() {
            return Err(format!("column `{name}` has no messages"));
        }
        let reader = MessageReader {
            names: &self.spec.fields,
            roles: &self.spec.roles,
            mask: &self.spec.mask,
            accepts_role: self.accepts_role,
        };
        list.iter()
            .enumerate()
            .map(|(index, message)| {
                self.met.look_at_message(message, &self.spec.fields.role);
                reader
                    .read(message, notes)
                    .map_err(|reason| format!("message {} of `{name}`: {reason}", index + 1))
            })
            .collect()
    }
}

/// Why a conversation has nothing to learn, with those of its roles that may be meant.
fn no_turn(messages: &[Message], mask: &MaskSpec) -> String {
    let roles = messages
        .iter()
        .filter_map(|said| said.json["role"].as_str());
    let mut unknown: Vec<&str> = roles
        .filter(|role| !message::ROLES.contains(role))
        .collect();
    unknown.sort_unstable();
    unknown.dedup();
    let wanted = mask
        .roles
        .as_ref()
        .map_or("assistant".to_owned(), |roles| roles.join(" or "));
    let problem = format!("no {wanted} turn: nothing to learn from");
    match unknown.first() {
        None => problem,
        Some(first) => format!(
            "{problem}; unknown roles: `{}`: say which role they are with `roles`, as in {{assistant: [{first}]}}",
            unknown.join("`, `")
        ),
    }
}
