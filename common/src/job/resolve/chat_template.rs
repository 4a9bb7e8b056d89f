//! The chat template that a job asks for, what it gives that template, and the tokens that end a turn.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value as Json};

use super::super::did_you_mean::did_you_mean;
use super::super::limits::{MAX_TEMPLATE_BYTES, MAX_TEMPLATE_VARIABLES};
use super::super::quote::shorten;
use super::super::read::Reader;
use super::super::spec::TemplateChoice;
use crate::chat_templates;

/// Axolotl's names for the model's own template, and for Jinja text that stands elsewhere.
const OWN: &str = "tokenizer_default";
const OWN_OR: &str = "tokenizer_default_fallback_";
const JINJA: &str = "jinja";

/// Most tokens that a job may name as ends of turns.
const MAX_END_TOKENS: usize = 100;

/// Reads which chat template conversations are written with. `datasets` are the names of the entries, such as `datasets.0`.
pub(super) fn chat_template(reader: &mut Reader<'_>, datasets: &[String]) -> TemplateChoice {
    let of_job =
        choice(reader, "chat_template", "chat_template_jinja").or_else(|| llama_factory(reader));
    let mut chosen = of_job;
    let mut without = 0;
    for (index, dataset) in datasets.iter().enumerate() {
        let name = format!("{dataset}.chat_template");
        let text = format!("{dataset}.chat_template_jinja");
        let Some(of_dataset) = choice(reader, &name, &text) else {
            without += 1;
            continue;
        };
        match &chosen {
            None if index == 0 => chosen = Some(of_dataset),
            Some(chosen) if *chosen == of_dataset => {}
            _ => {
                let given = reader.given(&name).or_else(|| reader.given(&text));
                if let Some(given) = given {
                    let message = "is another template than that of the job or of the datasets before: all datasets are written with one; \
                                   give it once, as chat_template of the job";
                    reader.problem(given, message.to_owned());
                }
            }
        }
    }
    if without > 0
        && without < datasets.len()
        && reader.given("chat_template").is_none()
        && chosen.is_some()
    {
        let notice = "chat_template of a dataset is that of all of them: conversations of the others are written with it, too";
        reader.notices.push(notice.to_owned());
    }
    chosen.unwrap_or_default()
}

/// Reads LLaMA-Factory's name of a template.
fn llama_factory(reader: &mut Reader<'_>) -> Option<TemplateChoice> {
    let written = reader.text("template")?;
    let given = reader.given("template")?;
    if reader.given("chat_template").is_some() || reader.given("chat_template_jinja").is_some() {
        let message = "and `chat_template` both say what the template is; remove one";
        reader.problem(given, message.to_owned());
        return None;
    }
    match chat_templates::of_llama_factory(written.trim()) {
        Some(name) => Some(TemplateChoice::Named(name.to_owned())),
        None => {
            let hint = did_you_mean(written.trim(), chat_templates::names_of_llama_factory());
            let message = format!(
                "is LLaMA-Factory's name of a template that Muster does not have: `{}`{hint}; leave it out for the model's own, or name one with chat_template",
                shorten(&written)
            );
            reader.problem(given, message);
            None
        }
    }
}

/// Reads a template's name, or its text. None where neither is given.
fn choice(reader: &mut Reader<'_>, name: &str, text: &str) -> Option<TemplateChoice> {
    let written = reader.text(name).map(|written| written.trim().to_owned());
    if written.is_none() && reader.given(name).is_some() {
        // Reported; what else is given is not judged by it.
        return None;
    }
    let source = template_text(reader, text);
    match (written.as_deref(), source) {
        (None, None) => None,
        (None | Some(JINJA), Some(source)) => Some(TemplateChoice::Text(source)),
        (Some(JINJA), None) => {
            if let Some(given) = reader.given(name)
                && reader.given(text).is_none()
            {
                let message = "is jinja, which asks for chat_template_jinja: the template's text, or its file";
                reader.problem(given, message.to_owned());
            }
            None
        }
        (Some(written), Some(_)) => {
            if let Some(given) = reader.given(text) {
                let message = format!(
                    "and `chat_template: {}` both say what the template is; remove one",
                    shorten(written)
                );
                reader.problem(given, message);
            }
            None
        }
        (Some(OWN), None) => Some(TemplateChoice::Model),
        (Some(written), None) => match written.strip_prefix(OWN_OR) {
            Some(fallback) => known(reader, name, fallback).map(TemplateChoice::ModelOrNamed),
            None => known(reader, name, written).map(TemplateChoice::Named),
        },
    }
}

/// The name of one of our templates; others are reported.
fn known(reader: &mut Reader<'_>, field: &str, written: &str) -> Option<String> {
    let name = written.to_ascii_lowercase().replace('-', "_");
    if chat_templates::find(&name).is_some() {
        return Some(name);
    }
    let hint = did_you_mean(&name, chat_templates::names());
    if let Some(given) = reader.given(field) {
        let all: Vec<&str> = chat_templates::names().collect();
        let message = format!(
            "names no chat template that is known: `{}`{hint} (known: {OWN}, {OWN_OR}NAME, {}; or give the template's text as chat_template_jinja)",
            shorten(written),
            all.join(", ")
        );
        reader.problem(given, message);
    }
    None
}

/// Reads the text of a template, which may stand in a file of its own.
fn template_text(reader: &mut Reader<'_>, field: &str) -> Option<String> {
    let written = reader.text(field)?;
    // A template has white space or braces; a path that is mistyped must not become one.
    let is_path = !written.contains(['{', '\n']);
    if !is_path {
        return Some(written);
    }
    let path = reader.input_path(field)?;
    match read_template(&path) {
        Ok(text) => Some(text),
        Err(reason) => {
            if let Some(given) = reader.given(field) {
                reader.problem(
                    given,
                    format!(
                        "names the file {}, which cannot be read: {reason}",
                        path.display()
                    ),
                );
            }
            None
        }
    }
}

fn read_template(path: &Path) -> Result<String, String> {
    // Transformers' own name for the file, where a folder is given as TRL does.
    let path = match path.is_dir() {
        true => path.join("chat_template.jinja"),
        false => path.to_owned(),
    };
    let mut bytes = Vec::new();
    File::open(&path)
        .and_then(|file| {
            file.take(MAX_TEMPLATE_BYTES as u64 + 1)
                .read_to_end(&mut bytes)
        })
        .map_err(|error| error.to_string())?;
    if bytes.len() > MAX_TEMPLATE_BYTES {
        return Err(format!("it is longer than {MAX_TEMPLATE_BYTES} bytes"));
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8 text".to_owned())
}

/// Reads the variables that every conversation gives the template.
pub(super) fn chat_template_kwargs(reader: &mut Reader<'_>) -> Map<String, Json> {
    let mut variables = Map::new();
    if let Some(given) = reader.given("chat_template_kwargs") {
        match given.node.to_json() {
            Some(Json::Object(fields)) if fields.len() <= MAX_TEMPLATE_VARIABLES => {
                variables = fields;
            }
            Some(Json::Object(_)) => reader.problem(
                given,
                format!("has more than {MAX_TEMPLATE_VARIABLES} entries"),
            ),
            // What a flag or variable gives is text.
            Some(Json::String(text)) => match serde_json::from_str(&text) {
                Ok(Json::Object(fields)) => variables = fields,
                _ => reader.wrong(given, "a mapping, as in {enable_thinking: false}"),
            },
            _ => reader.wrong(given, "a mapping, as in {enable_thinking: false}"),
        }
    }
    if let Some(thinking) = reader.switch("enable_thinking") {
        let known = variables.insert("enable_thinking".to_owned(), thinking.into());
        if known.is_some_and(|known| known != Json::Bool(thinking))
            && let Some(given) = reader.given("enable_thinking")
        {
            let message = "and `chat_template_kwargs` say different things of it; remove one";
            reader.problem(given, message.to_owned());
        }
    }
    variables
}

/// Reads the tokens that end a turn, of the job and of its datasets together.
pub(super) fn eot_tokens(reader: &mut Reader<'_>, datasets: &[String]) -> Vec<String> {
    let of_datasets = datasets
        .iter()
        .map(|dataset| format!("{dataset}.eot_tokens"));
    let names = std::iter::once("eot_tokens".to_owned()).chain(of_datasets);
    let mut tokens: Vec<String> = Vec::new();
    for name in names.collect::<Vec<_>>() {
        for token in reader.texts(&name, None).unwrap_or_default() {
            if !tokens.contains(&token) {
                tokens.push(token);
            }
        }
        if tokens.len() > MAX_END_TOKENS
            && let Some(given) = reader.given(&name)
        {
            reader.problem(given, format!("names more than {MAX_END_TOKENS} tokens"));
            tokens.truncate(MAX_END_TOKENS);
        }
    }
    tokens
}
