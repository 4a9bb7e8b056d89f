//! Where a model's chat templates are, and what Jinja makes of their source.
//!
//! Enters: a model folder. Leaves: named sources, one of them the default.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::super::tokenize::read_json;
use super::{DEFAULT, TOOL_USE, TemplateError};

/// Longest template source, in bytes.
const MAX_SOURCE_BYTES: u64 = 4 << 20;

/// A template and the file it is in.
pub(super) struct NamedSource {
    pub name: String,
    pub text: String,
    pub path: PathBuf,
}

/// All templates of a model, as Transformers finds them. One is named [`DEFAULT`].
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
        let named = |name: &str, text: &str| NamedSource {
            name: name.to_owned(),
            text: text.to_owned(),
            path: path.clone(),
        };
        let sources = match found {
            Some(Json::String(text)) => vec![named(DEFAULT, text)],
            Some(Json::Array(list)) => list
                .iter()
                .filter_map(|entry| {
                    Some(named(entry["name"].as_str()?, entry["template"].as_str()?))
                })
                .collect(),
            _ => Vec::new(),
        };
        if sources.iter().any(|source| source.name == DEFAULT) {
            return Ok(sources);
        }
        if !sources.is_empty() {
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
        write("chat_template.jinja", "e\r\n");
        assert_eq!(found(), one("e\r\n"));
    }
}
