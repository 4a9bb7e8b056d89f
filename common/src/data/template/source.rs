//! Finds a model's chat templates.
//!
//! Enters: a model folder. Leaves: named sources, one of them the default.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::super::tokenize::read_json;
use super::TemplateError;

/// Name of the template that is used where nothing asks for another.
pub(super) const DEFAULT: &str = "default";
/// Name of the template for conversations with tools.
pub(super) const TOOL_USE: &str = "tool_use";

/// Longest template source, in bytes.
const MAX_SOURCE_BYTES: u64 = 4 << 20;

/// A template and the file it is in.
pub(super) struct NamedSource {
    pub name: String,
    pub text: String,
    pub path: PathBuf,
}

/// The templates of a model that conversations are rendered with, as Transformers finds them: one named [`DEFAULT`], and
/// maybe one named [`TOOL_USE`]. Others have to be asked for by name, which no job does.
pub(super) fn find_sources(model_dir: &Path) -> Result<Vec<NamedSource>, TemplateError> {
    let jinja = model_dir.join("chat_template.jinja");
    if jinja.is_file() {
        let mut sources = vec![NamedSource {
            name: DEFAULT.to_owned(),
            text: read_source(&jinja)?,
            path: jinja,
        }];
        let tool_use = model_dir.join("additional_chat_templates/tool_use.jinja");
        if tool_use.is_file() {
            sources.push(NamedSource {
                name: TOOL_USE.to_owned(),
                text: read_source(&tool_use)?,
                path: tool_use,
            });
        }
        return Ok(sources);
    }
    for file in ["tokenizer_config.json", "chat_template.json"] {
        let path = model_dir.join(file);
        let config = read_json(&path).map_err(|reason| TemplateError::Unreadable {
            path: path.clone(),
            reason,
        })?;
        let found = config
            .as_ref()
            .and_then(|config| config.get("chat_template"));
        let named = named_templates(found).map_err(|reason| TemplateError::Unreadable {
            path: path.clone(),
            reason,
        })?;
        let has_any = !named.is_empty();
        let sources: Vec<NamedSource> = named
            .into_iter()
            .filter(|(name, _)| name == DEFAULT || name == TOOL_USE)
            .map(|(name, text)| NamedSource {
                name,
                text,
                path: path.clone(),
            })
            .collect();
        if sources.iter().any(|source| source.name == DEFAULT) {
            return Ok(sources);
        }
        if has_any {
            return Err(TemplateError::Unreadable {
                path,
                reason: "none of the chat templates is named `default`".to_owned(),
            });
        }
    }
    Err(TemplateError::Missing {
        dir: model_dir.to_owned(),
    })
}

/// Names and texts of the templates in a `chat_template`: one template, a list of named ones, or an object of them.
fn named_templates(found: Option<&Json>) -> Result<Vec<(String, String)>, String> {
    match found {
        None | Some(Json::Null) => Ok(Vec::new()),
        Some(Json::String(text)) => Ok(vec![(DEFAULT.to_owned(), text.clone())]),
        Some(Json::Array(list)) => {
            let entries = list.iter().zip(1..);
            let named = entries.map(|(entry, number)| {
                match (entry["name"].as_str(), entry["template"].as_str()) {
                    (Some(name), Some(text)) => Ok((name.to_owned(), text.to_owned())),
                    _ => Err(format!(
                        "entry {number} of `chat_template` has no `name` and `template` that are text"
                    )),
                }
            });
            named.collect()
        }
        Some(Json::Object(templates)) => {
            let named = templates.iter().map(|(name, text)| match text.as_str() {
                Some(text) => Ok((name.clone(), text.to_owned())),
                None => Err(format!("`{name}` of `chat_template` is no text")),
            });
            named.collect()
        }
        Some(_) => Err("`chat_template` is neither text nor a list of named templates".to_owned()),
    }
}

fn read_source(path: &Path) -> Result<String, TemplateError> {
    let unreadable = |reason: String| TemplateError::Unreadable {
        path: path.to_owned(),
        reason,
    };
    let size = std::fs::metadata(path)
        .map_err(|error| unreadable(error.to_string()))?
        .len();
    if size > MAX_SOURCE_BYTES {
        return Err(unreadable(format!(
            "{size} bytes is too long for a chat template"
        )));
    }
    std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_found_where_transformers_looks_for_them() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let found = || -> Vec<(String, String)> {
            let sources = find_sources(dir.path()).unwrap();
            sources.into_iter().map(|s| (s.name, s.text)).collect()
        };
        let one = |text: &str| vec![(DEFAULT.to_owned(), text.to_owned())];
        let missing = find_sources(dir.path());
        assert!(matches!(missing, Err(TemplateError::Missing { .. })));
        write("chat_template.json", r#"{"chat_template": "a"}"#);
        assert_eq!(found(), one("a"));
        write("tokenizer_config.json", r#"{"chat_template": "b"}"#);
        assert_eq!(found(), one("b"));
        write(
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "default", "template": "c"}, {"name": "tool_use", "template": "d"}]}"#,
        );
        assert_eq!(found()[1], (TOOL_USE.to_owned(), "d".to_owned()));
        write(
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "rag", "template": "c"}]}"#,
        );
        assert!(find_sources(dir.path()).is_err());
        for broken in ["5", r#"[{"name": "default"}]"#, r#"{"default": 5}"#] {
            write(
                "tokenizer_config.json",
                &format!(r#"{{"chat_template": {broken}}}"#),
            );
            assert!(matches!(
                find_sources(dir.path()),
                Err(TemplateError::Unreadable { .. })
            ));
        }
        write(
            "tokenizer_config.json",
            r#"{"chat_template": {"rag": "{% broken", "default": "d"}}"#,
        );
        assert_eq!(found(), one("d"));
        write("chat_template.jinja", "e\r\n");
        assert_eq!(found(), one("e\r\n"));
    }
}
