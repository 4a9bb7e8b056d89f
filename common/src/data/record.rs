//! Rows of a dataset, as read.
//!
//! Enters: a JSON Lines file (or one JSON array) and the names of its columns. Leaves: records, or for each row that
//! cannot be used its file, line and reason. Never skips a row in silence.

mod problem;
mod reader;

use serde_json::{Map, Value as Json};

use crate::job::{DatasetKind, DatasetSpec, FieldNames};

pub use problem::{DataErrors, MAX_PROBLEMS, Problem};
pub use reader::{RawRow, RowReader};

/// A row that can be used.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A conversation. Only assistant turns from `trained_from` on are learned (those before belong to a prompt).
    Conversation {
        messages: Vec<Json>,
        trained_from: usize,
        tools: Option<Json>,
    },
    Completion {
        prompt: String,
        completion: String,
    },
    Text(String),
}

/// Reads rows of one dataset. `accepts_role` knows the roles beside system, user, assistant and tool.
pub struct RecordParser<'a> {
    pub spec: &'a DatasetSpec,
    pub accepts_role: &'a (dyn Fn(&str) -> bool + Sync),
}

impl RecordParser<'_> {
    /// The record, or its line and why it cannot be used.
    pub fn parse(&self, row: RawRow) -> Result<(u64, Record), (u64, String)> {
        let (line, json) = match row {
            RawRow::Unreadable(line, reason) => return Err((line, reason)),
            RawRow::Item(line, json) => (line, json),
            RawRow::Line(line, bytes) => match parse_line(&bytes) {
                Ok(json) => (line, json),
                Err(reason) => return Err((line, reason)),
            },
        };
        match json {
            Json::Object(row) => self
                .record(&row)
                .map(|record| (line, record))
                .map_err(|reason| (line, reason)),
            other => Err((
                line,
                format!("a row must be a JSON object, not {}", kind_of(&other)),
            )),
        }
    }

    fn record(&self, row: &Map<String, Json>) -> Result<Record, String> {
        let fields = &self.spec.fields;
        match self.kind(row)? {
            DatasetKind::Messages => {
                let messages = self.messages(column(row, &fields.messages)?, &fields.messages)?;
                self.conversation(messages, 0, row)
            }
            DatasetKind::PromptCompletion => self.prompt_completion(row),
            DatasetKind::Text | DatasetKind::Auto => match column(row, &fields.text)? {
                Json::String(text) if text.is_empty() => {
                    Err(format!("column `{}` is empty", fields.text))
                }
                Json::String(text) => Ok(Record::Text(text.clone())),
                other => Err(format!(
                    "column `{}` must be a string, not {}",
                    fields.text,
                    kind_of(other)
                )),
            },
        }
    }

    fn kind(&self, row: &Map<String, Json>) -> Result<DatasetKind, String> {
        let FieldNames {
            messages,
            prompt,
            completion,
            text,
            ..
        } = &self.spec.fields;
        if self.spec.kind != DatasetKind::Auto {
            return Ok(self.spec.kind);
        }
        let has = |name: &String| row.get(name).is_some_and(|value| !value.is_null());
        if has(messages) {
            Ok(DatasetKind::Messages)
        } else if has(completion) && has(text) {
            Err(format!(
                "has `{completion}` and `{text}`: say with `type: prompt_completion` or `type: text` which is trained"
            ))
        } else if has(prompt) || has(completion) {
            Ok(DatasetKind::PromptCompletion)
        } else if has(text) {
            Ok(DatasetKind::Text)
        } else {
            Err(format!(
                "no column `{messages}`, `{prompt}` and `{completion}`, or `{text}`; {}",
                columns_found(row, &[messages, prompt, completion, text])
            ))
        }
    }

    fn prompt_completion(&self, row: &Map<String, Json>) -> Result<Record, String> {
        let fields = &self.spec.fields;
        match (
            column(row, &fields.prompt)?,
            column(row, &fields.completion)?,
        ) {
            (Json::String(prompt), Json::String(completion)) => Ok(Record::Completion {
                prompt: prompt.clone(),
                completion: completion.clone(),
            }),
            (prompt @ Json::Array(_), completion @ Json::Array(_)) => {
                let mut messages = self.messages(prompt, &fields.prompt)?;
                let trained_from = messages.len();
                messages.extend(self.messages(completion, &fields.completion)?);
                self.conversation(messages, trained_from, row)
            }
            (prompt, completion) => Err(format!(
                "`{}` and `{}` must both be strings or both lists of messages, not {} and {}",
                fields.prompt,
                fields.completion,
                kind_of(prompt),
                kind_of(completion)
            )),
        }
    }

    fn conversation(
        &self,
        messages: Vec<Json>,
        trained_from: usize,
        row: &Map<String, Json>,
    ) -> Result<Record, String> {
        if !messages[trained_from..]
            .iter()
            .any(|message| message["role"] == "assistant")
        {
            return Err("no assistant turn: nothing to learn from".to_owned());
        }
        let name = &self.spec.fields.tools;
        let tools = match row.get(name) {
            None | Some(Json::Null) => None,
            // Datasets keep tools as JSON in a string, since their schemas differ from row to row.
            Some(Json::String(text)) => Some(
                serde_json::from_str(text)
                    .map_err(|error| format!("column `{name}`: {}", broken_json(&error)))?,
            ),
            Some(tools) => Some(tools.clone()),
        };
        match tools {
            None | Some(Json::Array(_)) => Ok(Record::Conversation {
                messages,
                trained_from,
                tools,
            }),
            Some(other) => Err(format!(
                "column `{name}` must be a list of tools, not {}",
                kind_of(&other)
            )),
        }
    }

    fn messages(&self, value: &Json, name: &str) -> Result<Vec<Json>, String> {
        let Json::Array(list) = value else {
            return Err(format!(
                "column `{name}` must be a list of messages, not {}",
                kind_of(value)
            ));
        };
        if list.is_empty() {
            return Err(format!("column `{name}` has no messages"));
        }
        list.iter()
            .enumerate()
            .map(|(index, message)| {
                self.message(message)
                    .map_err(|reason| format!("message {} of `{name}`: {reason}", index + 1))
            })
            .collect()
    }

    /// The message with the template's own names for role and content.
    fn message(&self, message: &Json) -> Result<Json, String> {
        let Json::Object(fields) = message else {
            return Err(format!(
                "must be an object with role and content, not {}",
                kind_of(message)
            ));
        };
        let names = &self.spec.fields;
        let role = match fields.get(&names.role) {
            Some(Json::String(role)) => role,
            Some(other) => {
                return Err(format!(
                    "`{}` must be a string, not {}",
                    names.role,
                    kind_of(other)
                ));
            }
            None => {
                return Err(format!(
                    "no `{}`; {}",
                    names.role,
                    columns_found(fields, &[&names.role])
                ));
            }
        };
        self.check_role(role)?;
        if !fields.contains_key(&names.content)
            && !["tool_calls", "reasoning_content", "thinking", "reasoning"]
                .iter()
                .any(|name| fields.contains_key(*name))
        {
            return Err(format!(
                "no `{}`; {}",
                names.content,
                columns_found(fields, &[&names.content])
            ));
        }
        if let Some(content) = fields.get(&names.content)
            && !matches!(content, Json::String(_) | Json::Array(_) | Json::Null)
        {
            return Err(format!(
                "`{}` must be a string or a list of parts, not {}",
                names.content,
                kind_of(content)
            ));
        }
        let renamed = fields
            .iter()
            .map(|(name, value)| {
                let name = match name {
                    name if *name == names.role => "role",
                    name if *name == names.content => "content",
                    name => name,
                };
                (name.to_owned(), value.clone())
            })
            .collect();
        Ok(Json::Object(renamed))
    }

    fn check_role(&self, role: &str) -> Result<(), String> {
        const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];
        if ROLES.contains(&role) || (self.accepts_role)(role) {
            return Ok(());
        }
        let meant = match role.to_lowercase().as_str() {
            "human" | "prompter" => Some("user"),
            "gpt" | "bot" | "ai" | "model" => Some("assistant"),
            "function" | "observation" | "ipython" => Some("tool"),
            lower => nearest(lower, &ROLES),
        };
        Err(match meant {
            Some(meant) => format!("unknown role `{role}` (did you mean `{meant}`?)"),
            None => format!("unknown role `{role}` (known: {})", ROLES.join(", ")),
        })
    }
}

fn column<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a Json, String> {
    row.get(name)
        .ok_or_else(|| format!("no column `{name}`; {}", columns_found(row, &[name])))
}

/// What the row has instead, and which of it was probably meant.
fn columns_found(row: &Map<String, Json>, wanted: &[&str]) -> String {
    let names: Vec<&str> = row.keys().map(String::as_str).collect();
    if names.is_empty() {
        return "the row is empty".to_owned();
    }
    let listed: Vec<String> = names
        .iter()
        .take(12)
        .map(|name| format!("`{name}`"))
        .collect();
    let more = if names.len() > 12 { ", ..." } else { "" };
    let meant = names
        .iter()
        .find(|name| nearest(&name.to_lowercase(), wanted).is_some())
        .map(|name| format!(" (did you mean `{name}`?)"))
        .unwrap_or_default();
    format!("found {}{more}{meant}", listed.join(", "))
}

fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|name| (strsim::damerau_levenshtein(word, name), *name))
        .filter(|(distance, name)| *distance <= name.len().max(word.len()).div_ceil(3))
        .min()
        .map(|(_, name)| name)
}

fn kind_of(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

fn parse_line(bytes: &[u8]) -> Result<Json, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let byte = error.valid_up_to() + 1;
        format!("not UTF-8 (byte {byte} of the line): save the file as UTF-8")
    })?;
    serde_json::from_str(text.trim_ascii()).map_err(|error| broken_json(&error))
}

/// serde_json's reason with the column; its line number is always 1 here.
fn broken_json(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let reason = text.split(" at line ").next().unwrap_or(&text);
    format!("broken JSON: {reason} (column {})", error.column())
}
