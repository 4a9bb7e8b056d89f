//! Chat templates: messages become text exactly as Transformers' `apply_chat_template(tokenize=False)` writes it.
//!
//! Enters: the template in the model folder, and messages. Leaves: text, or what the template complained about. Never
//! runs without bounds: work and output are limited, since a template is code of somebody else's making.

mod date;
mod marks;
mod python;
mod source;
mod variables;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
pub use minijinja::value::Value;
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde_json::Value as Json;
use thiserror::Error;

use super::tokenize::SpecialTokens;
pub use marks::Rendered;
use marks::{Marks, mark_generation};
use source::{NamedSource, find_sources, prepare_source};
pub use variables::Variables;

/// Longest text a template may write for one conversation, in bytes.
const MAX_OUTPUT_BYTES: usize = 256 << 20;

/// Instructions a template may execute for one conversation (a long one takes about a million).
const MAX_FUEL: u64 = 50_000_000;

#[derive(Debug, Error)]
pub enum TemplateError {
    #[error(
        "{dir} has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja): use a chat model, or data with `text` or `prompt` and `completion`", dir = .dir.display()
    )]
    Missing { dir: PathBuf },
    #[error("{path}: {reason}", path = .path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{path}: the chat template does not parse: {reason}", path = .path.display())]
    Syntax { path: PathBuf, reason: String },
    #[error("the chat template raises: {0}")]
    Raised(String),
    #[error("the chat template fails: {0}")]
    Failed(String),
    #[error("the chat template writes more than {MAX_OUTPUT_BYTES} bytes")]
    TooLong,
    #[error("the chat template does not come to an end")]
    Endless,
    #[error(
        "the chat template changes the text inside its generation marks, so that what is learned cannot be told: remove the marks ({{% generation %}}) from the template"
    )]
    UnclearMarks,
}

/// What a template is rendered with.
#[derive(Clone, Copy)]
pub struct RenderInput<'a> {
    /// As [`message_value`] makes them.
    pub messages: &'a [Value],
    pub tools: Option<&'a Value>,
    pub variables: &'a Variables,
    /// Adds what comes before an answer.
    pub add_generation_prompt: bool,
}

/// A compiled chat template with the special tokens it may print.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, Value)>,
    source: String,
    has_tool_template: bool,
    /// Names of the templates that have generation marks.
    marked: Vec<String>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").finish_non_exhaustive()
    }
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// Reads the template where Transformers does: `chat_template.jinja`, else `chat_template` in
    /// `tokenizer_config.json` (one, or a list of named ones), else `chat_template.json`.
    ///
    /// The date that a template may print is that of this call (UTC; `SOURCE_DATE_EPOCH` overrides it).
    pub fn load(model_dir: &Path) -> Result<Self, TemplateError> {
        let sources = find_sources(model_dir)?;
        let special_tokens =
            SpecialTokens::load(model_dir).map_err(|error| TemplateError::Unreadable {
                path: model_dir.to_owned(),
                reason: error.to_string(),
            })?;
        Self::new(&sources, &special_tokens, now())
    }

    /// [`ChatTemplate::load`], but a model without a template is no error.
    pub fn load_optional(model_dir: &Path) -> Result<Option<Self>, TemplateError> {
        match Self::load(model_dir) {
            Ok(template) => Ok(Some(template)),
            Err(TemplateError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn new(
        sources: &[NamedSource],
        special_tokens: &SpecialTokens,
        unix_seconds: i64,
    ) -> Result<Self, TemplateError> {
        let mut environment = environment(unix_seconds);
        let mut marked = Vec::new();
        for source in sources {
            let prepared = prepare_source(&source.text);
            if prepared.has_generation_marks {
                marked.push(source.name.clone());
            }
            environment
                .add_template_owned(source.name.clone(), prepared.text)
                .map_err(|error| TemplateError::Syntax {
                    path: source.path.clone(),
                    reason: describe(&error),
                })?;
        }
        Ok(Self {
            environment,
            special_tokens: special_tokens
                .named()
                .map(|(name, text)| (name.to_owned(), Value::from(text)))
                .collect(),
            source: sources
                .iter()
                .map(|source| source.text.as_str())
                .collect::<Vec<_>>()
                .join("\n"),
            has_tool_template: sources.iter().any(|source| source.name == TOOL_USE),
            marked,
        })
    }

    /// A template that comes from no folder, and thinks that it is then.
    pub fn from_source(
        text: &str,
        special_tokens: &SpecialTokens,
        unix_seconds: i64,
    ) -> Result<Self, TemplateError> {
        let source = NamedSource {
            name: DEFAULT.to_owned(),
            text: text.to_owned(),
            path: PathBuf::from("chat template"),
        };
        Self::new(&[source], special_tokens, unix_seconds)
    }

    /// The text of all templates, for digests.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text depends on the day it is rendered.
    pub fn uses_the_date(&self) -> bool {
        self.source.contains("strftime_now")
    }

    /// The template itself names this role as a string.
    pub fn mentions_role(&self, role: &str) -> bool {
        [format!("'{role}'"), format!("\"{role}\"")]
            .iter()
            .any(|quoted| self.source.contains(quoted))
    }

    /// The conversation as the model sees it. `add_generation_prompt` adds what comes before an answer.
    pub fn render(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let messages: Vec<Value> = messages.iter().map(message_value).collect();
        self.render_values(&messages, tools.map(to_value), add_generation_prompt)
    }

    /// [`ChatTemplate::render`] on messages converted once with [`message_value`].
    pub fn render_values(
        &self,
        messages: &[Value],
        tools: Option<Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        self.render_input(RenderInput {
            messages,
            tools: tools.as_ref(),
            variables: &Variables::default(),
            add_generation_prompt,
        })
    }

    /// The text for one conversation with all that its row gives the template.
    pub fn render_input(&self, input: RenderInput) -> Result<String, TemplateError> {
        self.render_with_marks(input, None)
    }

    /// The template that these tools are shown with says itself, with `{% generation %}`, what is learned.
    pub fn has_generation_marks(&self, tools: Option<&Value>) -> bool {
        let name = self.template_name(tools);
        self.marked.iter().any(|marked| marked == name)
    }

    /// [`ChatTemplate::render_input`], and which bytes of the text are from inside `{% generation %}` blocks.
    pub fn render_marked(&self, input: RenderInput) -> Result<Rendered, TemplateError> {
        let text = self.render_input(input)?;
        let marks = Marks::absent_from(&text);
        let with_marks = self.render_with_marks(input, Some(&marks))?;
        let rendered = marks
            .take_out(&with_marks)
            .filter(|rendered| rendered.text == text);
        rendered.ok_or(TemplateError::UnclearMarks)
    }

    fn template_name(&self, tools: Option<&Value>) -> &'static str {
        if tools.is_some() && self.has_tool_template {
            TOOL_USE
        } else {
            DEFAULT
        }
    }

    fn render_with_marks(
        &self,
        input: RenderInput,
        marks: Option<&Marks>,
    ) -> Result<String, TemplateError> {
        let template = self
            .environment
            .get_template(self.template_name(input.tools))
            .map_err(|error| TemplateError::Failed(describe(&error)))?;
        let variables = [
            ("messages", Value::from(input.messages.to_vec())),
            (
                "tools",
                input.tools.cloned().unwrap_or_else(|| Value::from(())),
            ),
            ("documents", Value::from(())),
            (
                "add_generation_prompt",
                Value::from(input.add_generation_prompt),
            ),
        ];
        let special_tokens = self.special_tokens.iter();
        let context = Value::from_pairs(
            special_tokens
                .map(|(name, value)| (name.as_str(), value.clone()))
                .chain(variables)
                .chain(input.variables.iter())
                .chain(marks.map(|marks| (marks::VARIABLE, marks.to_value()))),
        );
        let mut output = BoundedOutput::default();
        let result = template.render_captured_to(context, &mut output).map(drop);
        if output.exceeded {
            return Err(TemplateError::TooLong);
        }
        result.map_err(|error| render_error(&error))?;
        String::from_utf8(output.bytes).map_err(|error| TemplateError::Failed(error.to_string()))
    }
}

#[derive(Default)]
struct BoundedOutput {
    bytes: Vec<u8>,
    exceeded: bool,
}

impl io::Write for &mut BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT_BYTES {
            self.exceeded = true;
            return Err(io::Error::other("too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What `raise_exception` was called with.
#[derive(Debug, Error)]
#[error("{0}")]
struct RaisedByTemplate(String);

fn render_error(error: &Error) -> TemplateError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = source {
        if let Some(raised) = current.downcast_ref::<RaisedByTemplate>() {
            return TemplateError::Raised(raised.0.clone());
        }
        if let Some(inner) = current.downcast_ref::<Error>()
            && inner.kind() == ErrorKind::OutOfFuel
        {
            return TemplateError::Endless;
        }
        source = current.source();
    }
    TemplateError::Failed(describe(error))
}

/// One line: the kind, the detail, the line of the template.
fn describe(error: &Error) -> String {
    let text = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    let text = match error.line() {
        Some(line) => format!("{text} (line {line} of the template)"),
        None => text,
    };
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Jinja as `transformers/utils/chat_template_utils.py` sets it up.
fn environment(unix_seconds: i64) -> Environment<'static> {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .keep_trailing_newline(false)
        .build()
        .expect("the delimiters are Jinja's own");
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_syntax(syntax);
    environment.set_debug(false);
    environment.set_fuel(Some(MAX_FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, _state, value| {
        let written = match value.as_str() {
            Some(text) => out.write_str(text),
            None => out.write_str(&python::to_str(value)?),
        };
        written.map_err(|_| Error::new(ErrorKind::WriteFailure, "output"))
    });
    environment.add_filter("tojson", |value: &Value, kwargs| {
        python::to_json(value, kwargs)
    });
    environment.add_filter("string", |value: &Value| python::to_str(value));
    // Python's tests ask what a value can do, and a string can do what a list can.
    environment.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined
        )
    });
    environment.add_test("iterable", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::String
                | ValueKind::Seq
                | ValueKind::Iterable
                | ValueKind::Map
                | ValueKind::Undefined
        )
    });
    environment.add_function("raise_exception", |message: &Value| {
        let text = python::to_str(message)?;
        Err::<Value, _>(
            Error::new(ErrorKind::InvalidOperation, "raised").with_source(RaisedByTemplate(text)),
        )
    });
    environment.add_function(marks::FUNCTION, mark_generation);
    environment.add_function("strftime_now", move |format: &str| {
        date::strftime(format, unix_seconds)
    });
    environment
}

fn now() -> i64 {
    let given = std::env::var("SOURCE_DATE_EPOCH")
        .ok()
        .and_then(|text| text.parse().ok());
    given.unwrap_or_else(|| {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs() as i64)
    })
}

/// A message as templates see it: keys whose value is null are left out, and reasoning is there under every name that
/// templates read it by (`_alias_reasoning_fields` in Transformers).
pub fn message_value(message: &Json) -> Value {
    let Json::Object(fields) = message else {
        return to_value(message);
    };
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|name| fields.get(*name).filter(|value| !value.is_null()));
    let mut pairs: Vec<(&str, Value)> = Vec::with_capacity(fields.len() + 2);
    if let Some(reasoning) = reasoning {
        for name in ["thinking", "reasoning_content"] {
            if fields.get(name).is_none_or(Json::is_null) {
                pairs.push((name, to_value(reasoning)));
            }
        }
    }
    pairs.extend(
        fields
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(name, value)| (name.as_str(), to_value(value))),
    );
    Value::from_pairs(pairs)
}

/// JSON as a template value.
pub fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::from(value),
            (None, Some(value)) => Value::from(value),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect::<Vec<_>>().into(),
        Json::Object(fields) => Value::from_pairs(
            fields
                .iter()
                .map(|(key, value)| (key.as_str(), to_value(value))),
        ),
    }
}
