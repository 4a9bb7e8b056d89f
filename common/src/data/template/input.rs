//! What a template is rendered with.

use super::jinja::Value;
use super::variables::Variables;

/// The variables that a template is rendered with.
#[derive(Clone, Copy)]
pub struct RenderInput<'a> {
    /// The messages, as [`message_value`](super::message_value) makes them.
    pub messages: &'a [Value],
    pub tools: Option<&'a Value>,
    pub variables: &'a Variables,
    /// Whether to add what comes before an answer.
    pub add_generation_prompt: bool,
}
