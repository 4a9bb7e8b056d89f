//! Chat templates: messages become text exactly as Transformers' `apply_chat_template(tokenize=False)` writes it.
//!
//! Enters: the template in the model folder, and messages. Leaves: text, or what the template complained about. Never
//! runs without bounds: work and output are limited, since a template is code of somebody else's making.

mod convert;
mod date;
mod error;
mod explain;
mod input;
mod jinja;
mod marks;
mod source;
mod variables;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value as Json;

use super::tokenize::SpecialTokens;
use crate::chat_templates;
use crate::job::{JobSpec, TemplateChoice};
pub use convert::{message_value, to_value};
pub use error::{STOPPED, TemplateError};
use explain::explain;
pub use input::RenderInput;
pub use jinja::Value;
use jinja::{Failure, Reason, Setting, Template};
use marks::Marks;
pub use marks::Rendered;
use source::{DEFAULT, NamedSource, TOOL_USE, find_sources};
pub use variables::Variables;

const EOS: &str = "eos_token";

/// A parsed chat template with the special tokens it may print.
pub struct ChatTemplate {
    templates: Vec<(String, Template)>,
    special_tokens: Vec<(String, String)>,
    unix_seconds: i64,
    source: String,
    /// Whether it is the one that came with the model.
    is_own: bool,
    missing: Vec<&'static str>,
    /// Whether rendering one conversation had no end or became too long, so that no other is tried.
    gave_up: AtomicBool,
    /// What it writes without messages, tools and further variables.
    nothing: OnceLock<Option<String>>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Reads the template where Transformers does: `chat_template.jinja`, else `chat_template` in
    /// `tokenizer_config.json` (one, or a list of named ones), else `chat_template.json`.
    ///
    /// The date that a template may print is that of this call (UTC; `SOURCE_DATE_EPOCH` overrides it).
    pub fn load(model_dir: &Path) -> Result<Self, TemplateError> {
        let sources = find_sources(model_dir)?;
        let special_tokens = special_tokens(model_dir)?;
        let own = Self::new(&sources, &special_tokens, now())?;
        Ok(Self {
            is_own: true,
            ..own
        })
    }

    /// [`ChatTemplate::load`], but a model without a template is no error.
    pub fn load_optional(model_dir: &Path) -> Result<Option<Self>, TemplateError> {
        match Self::load(model_dir) {
            Ok(template) => Ok(Some(template)),
            Err(TemplateError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The template that a job asks for. None where it is the model's own and the model has none.
    pub fn chosen_for(job: &JobSpec) -> Result<Option<Self>, TemplateError> {
        let mut chosen = Self::chosen(&job.base_model, &job.chat_template)?;
        if let (Some(template), Some(eos)) = (&mut chosen, &job.eos_token) {
            template.special_tokens.retain(|(name, _)| name != EOS);
            template.special_tokens.push((EOS.to_owned(), eos.clone()));
        }
        Ok(chosen)
    }

    /// A model's template, or another one for it.
    pub fn chosen(
        model_dir: &Path,
        choice: &TemplateChoice,
    ) -> Result<Option<Self>, TemplateError> {
        let of_text = |text: &str| {
            let special_tokens = special_tokens(model_dir)?;
            Self::from_source(text, &special_tokens, now()).map(Some)
        };
        let named = |name: &str| match chat_templates::find(name) {
            Some(text) => {
                let missing = missing_tokens(text, &special_tokens(model_dir)?);
                let template = of_text(&without_tokens(text, &missing))?;
                Ok(template.map(|template| Self {
                    missing,
                    ..template
                }))
            }
            None => Err(TemplateError::Unreadable {
                path: PathBuf::from("chat_template"),
                reason: format!("there is no template named `{name}`"),
            }),
        };
        match choice {
            TemplateChoice::Model => Self::load_optional(model_dir),
            TemplateChoice::Named(name) => named(name),
            TemplateChoice::ModelOrNamed(name) => match Self::load_optional(model_dir)? {
                Some(template) => Ok(Some(template)),
                None => named(name),
            },
            TemplateChoice::Text(text) => of_text(text),
        }
    }

    /// Names of special tokens that the template would write, and the tokenizer has not.
    pub fn missing_tokens(&self) -> &[&'static str] {
        &self.missing
    }

    fn new(
        sources: &[NamedSource],
        special_tokens: &SpecialTokens,
        unix_seconds: i64,
    ) -> Result<Self, TemplateError> {
        let mut templates = Vec::new();
        for source in sources {
            let template = Template::parse(&source.text)
                .map_err(|failure| TemplateError::syntax(source.path.clone(), &failure))?;
            templates.push((source.name.clone(), template));
        }
        Ok(Self {
            templates,
            special_tokens: special_tokens
                .named()
                .map(|(name, text)| (name.to_owned(), text.to_owned()))
                .collect(),
            unix_seconds,
            source: sources
                .iter()
                .map(|source| source.text.as_str())
                .collect::<Vec<_>>()
                .join("\n"),
            is_own: false,
            missing: Vec::new(),
            gave_up: AtomicBool::new(false),
            nothing: OnceLock::new(),
        })
    }

    /// A template from its text. `unix_seconds` is the time that it is told.
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

    /// The source of all templates together.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a template that did not come with the model, so that what is trained with it has to bring it along.
    pub fn brought(&self) -> Option<&str> {
        (!self.is_own).then_some(&*self.source)
    }

    /// Whether the text depends on the day it is rendered.
    pub fn uses_the_date(&self) -> bool {
        self.source.contains("strftime_now")
    }

    /// Whether the template itself names this role as a string.
    pub fn mentions_role(&self, role: &str) -> bool {
        [format!("'{role}'"), format!("\"{role}\"")]
            .iter()
            .any(|quoted| self.source.contains(quoted))
    }

    /// Renders a conversation as the model sees it. `add_generation_prompt` adds what comes before an answer.
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

    /// Renders one conversation with all that its row gives the template.
    pub fn render_input(&self, input: RenderInput) -> Result<String, TemplateError> {
        self.render_with_marks(input, None)
    }

    /// What the template writes without any message; None where it fails.
    pub fn render_nothing(&self, tools: Option<&Value>, variables: &Variables) -> Option<String> {
        let render = || {
            let input = RenderInput {
                messages: &[],
                tools,
                variables,
                add_generation_prompt: false,
            };
            self.render_input(input).ok()
        };
        match tools.is_none() && variables.is_empty() {
            true => self.nothing.get_or_init(render).clone(),
            false => render(),
        }
    }

    /// Whether the template that these tools are shown with says itself, with `{% generation %}`, what is learned.
    pub fn has_generation_marks(&self, tools: Option<&Value>) -> bool {
        self.template(tools)
            .is_some_and(Template::has_generation_marks)
    }

    /// Whether rendering a conversation had no end or became too long: all that is rendered since fails as
    /// [`TemplateError::Stopped`].
    pub fn gave_up(&self) -> bool {
        self.gave_up.load(Ordering::Relaxed)
    }

    /// Which bytes of `text`, what [`ChatTemplate::render_input`] made of this, are from inside `{% generation %}` blocks.
    pub fn render_marked(&self, input: RenderInput, text: &str) -> Result<Rendered, TemplateError> {
        let marks = Marks::absent_from(text);
        let with_marks = self.render_with_marks(input, Some(&marks))?;
        let rendered = marks
            .take_out(&with_marks)
            .filter(|rendered| rendered.text == text);
        rendered.ok_or(TemplateError::UnclearMarks)
    }

    fn template(&self, tools: Option<&Value>) -> Option<&Template> {
        let named = |wanted: &str| {
            let mut templates = self.templates.iter();
            templates
                .find(|(name, _)| name == wanted)
                .map(|(_, template)| template)
        };
        let for_tools = tools.and_then(|_| named(TOOL_USE));
        for_tools.or_else(|| named(DEFAULT))
    }

    fn render_with_marks(
        &self,
        input: RenderInput,
        marks: Option<&Marks>,
    ) -> Result<String, TemplateError> {
        if self.gave_up() {
            return Err(TemplateError::Stopped);
        }
        let result = self.run(input, marks).or_else(|failure| {
            let parsed = match &failure.reason {
                Reason::Failed(_) => convert::with_parsed_arguments(input.messages),
                _ => None,
            };
            let again = parsed.map(|messages| {
                let messages = messages.as_slice();
                self.run(RenderInput { messages, ..input }, marks)
            });
            match again {
                Some(Ok(text)) => Ok(text),
                _ => Err(explain(failure, &input)),
            }
        });
        result.map_err(|failure| {
            let error = TemplateError::of(&failure);
            if matches!(error, TemplateError::Endless | TemplateError::TooLong) {
                self.gave_up.store(true, Ordering::Relaxed);
            }
            error
        })
    }

    fn run(&self, input: RenderInput, marks: Option<&Marks>) -> Result<String, Box<Failure>> {
        let template = self.template(input.tools);
        let template = template.ok_or_else(|| {
            let reason = format!("there is no template named `{DEFAULT}`");
            Failure::new(Reason::Failed(reason))
        })?;
        let messages = Value::list(input.messages.to_vec())?;
        let tools = input.tools.cloned().unwrap_or(Value::None);
        let variables = |name: &str| {
            input.variables.get(name).cloned().or_else(|| match name {
                "messages" => Some(messages.clone()),
                "tools" => Some(tools.clone()),
                "documents" => Some(Value::None),
                "add_generation_prompt" => Some(Value::Bool(input.add_generation_prompt)),
                name => {
                    let mut tokens = self.special_tokens.iter();
                    tokens
                        .find(|(known, _)| known == name)
                        .map(|(_, text)| Value::text(text.as_str()))
                }
            })
        };
        let setting = Setting {
            unix_seconds: self.unix_seconds,
            marks: marks.map(|marks| marks.pair()),
        };
        template.render(&variables, setting, text_bytes(input.messages))
    }
}

/// Bytes of the texts that messages have, or nearly so.
fn text_bytes(messages: &[Value]) -> usize {
    let texts = messages.iter().filter_map(|message| match message {
        Value::Dict(fields) => Some(fields.values().filter_map(Value::as_str)),
        _ => None,
    });
    texts.flatten().map(str::len).sum()
}

/// Names of special tokens that a text of ours would write, and the tokenizer has not.
fn missing_tokens(text: &str, special_tokens: &SpecialTokens) -> Vec<&'static str> {
    let names = ["bos_token", "eos_token"].into_iter();
    names
        .filter(|name| text.contains(name) && special_tokens.get(name).is_none())
        .collect()
}

/// The text with these tokens as nothing: whatever renders it elsewhere would fail on them.
fn without_tokens(text: &str, missing: &[&str]) -> String {
    let set = |name: &&str| format!("{{%- set {name} = '' -%}}\n");
    missing.iter().map(set).collect::<String>() + text
}

fn special_tokens(model_dir: &Path) -> Result<SpecialTokens, TemplateError> {
    SpecialTokens::load(model_dir).map_err(|error| TemplateError::Unreadable {
        path: model_dir.to_owned(),
        reason: error.to_string(),
    })
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
