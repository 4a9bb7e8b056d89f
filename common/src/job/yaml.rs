//! Parses YAML text to a small tree whose every node knows its place. Types are left to the reader of each field.
//!
//! The text is not trusted: its size, depth, nodes and what aliases expand to are bounded, and nothing recurses.

use std::collections::HashMap;

use granit_parser::{Event, Parser, ScalarStyle, Tag};
use serde_json::{Number, Value as Json};

use super::error::Origin;
use super::number::parse_number;
use super::quote::shorten;
use super::yaml_hint::hint;

/// Largest job file: it is a page of text, and a mistyped path to a dataset should fail at once.
pub(super) const MAX_FILE_BYTES: usize = 1 << 20;
const MAX_DEPTH: usize = 16;
/// Most nodes of a tree; aliases count with all that they stand for.
const MAX_NODES: usize = 10_000;
/// Most bytes of text of all nodes; aliases count with all that they stand for.
const MAX_TEXT_BYTES: usize = 4 << 20;

/// A value of the tree, and where it was given.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub value: Value,
    pub origin: Origin,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Scalar { text: String, quoted: bool },
    Sequence(Vec<Node>),
    Mapping(Vec<(Key, Node)>),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Key {
    pub text: String,
    pub origin: Origin,
}

/// Why the text is not a tree, and on which line (1-based).
#[derive(Clone, Debug, PartialEq)]
pub(super) struct YamlError {
    pub line: usize,
    pub message: String,
}

impl Node {
    pub fn scalar(text: &str, quoted: bool, origin: &Origin) -> Self {
        Self {
            value: Value::Scalar {
                text: text.to_owned(),
                quoted,
            },
            origin: origin.clone(),
        }
    }

    /// Whether the value is null (`key:`, `~` or `null`), which means "not given".
    /// Whether it is this one word.
    pub fn is_text(&self, word: &str) -> bool {
        matches!(&self.value, Value::Scalar { text, .. } if text.trim() == word)
    }

    pub fn is_null(&self) -> bool {
        match &self.value {
            Value::Scalar { text, quoted } => {
                !quoted && matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL")
            }
            _ => false,
        }
    }

    /// Whether two values mean the same to whatever reads them. One text is a list of one.
    // The recursion is as deep as the trees, at most `MAX_DEPTH`.
    pub fn says_the_same(&self, other: &Self) -> bool {
        let all_same = |one: &[Self], other: &[Self]| {
            let mut pairs = one.iter().zip(other);
            one.len() == other.len() && pairs.all(|(one, other)| one.says_the_same(other))
        };
        match (&self.value, &other.value) {
            (Value::Scalar { text: one, .. }, Value::Scalar { text: other, .. }) => {
                let (one, other) = (one.trim(), other.trim());
                let number = |text: &str| text.parse::<f64>().ok().filter(|n| n.is_finite());
                let is_same_number = number(one).is_some() && number(one) == number(other);
                let is_same_switch = matches!(one, "true" | "True" | "false" | "False")
                    && one.eq_ignore_ascii_case(other);
                one == other || is_same_number || is_same_switch
            }
            (Value::Sequence(one), Value::Sequence(other)) => all_same(one, other),
            (Value::Sequence(one), Value::Scalar { .. }) => {
                all_same(one, std::slice::from_ref(other))
            }
            (Value::Scalar { .. }, Value::Sequence(_)) => other.says_the_same(self),
            (Value::Mapping(one), Value::Mapping(other)) => {
                let mut pairs = one.iter().zip(other);
                one.len() == other.len()
                    && pairs.all(|(one, other)| {
                        one.0.text == other.0.text && one.1.says_the_same(&other.1)
                    })
            }
            _ => false,
        }
    }

    /// The value as JSON, plain scalars by YAML's core schema. None for a number that is not finite.
    // The recursion is as deep as the tree, at most `MAX_DEPTH`.
    pub fn to_json(&self) -> Option<Json> {
        Some(match &self.value {
            _ if self.is_null() => Json::Null,
            Value::Scalar { text, quoted: true } => Json::String(text.clone()),
            Value::Scalar { text, .. } => match text.as_str() {
                "true" | "True" | "TRUE" => Json::Bool(true),
                "false" | "False" | "FALSE" => Json::Bool(false),
                text => match (text.parse::<i64>(), parse_number(text)) {
                    (Ok(whole), _) => whole.into(),
                    (_, Some(number)) => Json::Number(Number::from_f64(number)?),
                    _ => Json::String(text.to_owned()),
                },
            },
            Value::Sequence(items) => items.iter().map(Self::to_json).collect::<Option<_>>()?,
            Value::Mapping(entries) => {
                let pairs = entries
                    .iter()
                    .map(|(key, node)| Some((key.text.clone(), node.to_json()?)));
                Json::Object(pairs.collect::<Option<_>>()?)
            }
        })
    }

    /// What kind of thing this is, for messages.
    pub fn describe(&self) -> String {
        match &self.value {
            _ if self.is_null() => "nothing".to_owned(),
            Value::Scalar { text, .. } => format!("`{}`", shorten(text)),
            Value::Sequence(_) => "a list".to_owned(),
            Value::Mapping(_) => "a mapping".to_owned(),
        }
    }

    fn cost(&self) -> (usize, usize) {
        match &self.value {
            Value::Scalar { text, .. } => (1, text.len()),
            Value::Sequence(items) => sum_costs(items.iter(), 0),
            Value::Mapping(entries) => {
                let keys = entries.iter().map(|(key, _)| key.text.len()).sum();
                sum_costs(entries.iter().map(|(_, node)| node), keys)
            }
        }
    }
}

// The recursion is as deep as the tree, at most `MAX_DEPTH`.
fn sum_costs<'a>(nodes: impl Iterator<Item = &'a Node>, keys: usize) -> (usize, usize) {
    nodes
        .map(Node::cost)
        .fold((1, keys), |(n, b), (nodes, bytes)| (n + nodes, b + bytes))
}

/// Parses one document. `None` where the text holds nothing but comments.
pub(super) fn parse(
    text: &str,
    origin_of_line: &dyn Fn(usize) -> Origin,
) -> Result<Option<Node>, YamlError> {
    if text.len() > MAX_FILE_BYTES {
        let message = format!(
            "{} bytes are too many for a job file (at most {MAX_FILE_BYTES})",
            text.len()
        );
        return Err(YamlError { line: 1, message });
    }
    let mut builder = Builder::new(origin_of_line);
    for event in Parser::new_from_str(text.trim_start_matches('\u{feff}')) {
        let (event, span) = event.map_err(|error| YamlError {
            line: error.marker().line().max(1),
            message: format!(
                "not valid YAML: {}{}",
                error.info(),
                hint(text, error.marker().line())
            ),
        })?;
        let line = span.start.line().max(1);
        builder
            .take(event, line)
            .map_err(|message| YamlError { line, message })?;
    }
    Ok(builder.root)
}

/// A collection whose end has not been seen.
enum Open {
    Sequence(Vec<Node>),
    Mapping(Vec<(Key, Node)>, Option<Key>),
}

struct Frame {
    open: Open,
    line: usize,
    anchor: usize,
}

struct Builder<'a> {
    origin_of_line: &'a dyn Fn(usize) -> Origin,
    stack: Vec<Frame>,
    root: Option<Node>,
    documents: usize,
    anchors: HashMap<usize, Node>,
    nodes: usize,
    text_bytes: usize,
}

impl<'a> Builder<'a> {
    fn new(origin_of_line: &'a dyn Fn(usize) -> Origin) -> Self {
        Self {
            origin_of_line,
            stack: Vec::new(),
            root: None,
            documents: 0,
            anchors: HashMap::new(),
            nodes: 0,
            text_bytes: 0,
        }
    }

    fn take(&mut self, event: Event<'_>, line: usize) -> Result<(), String> {
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err("a job file holds one document; remove this `---`".to_owned());
                }
                Ok(())
            }
            Event::Scalar(text, style, anchor, tag) => {
                let quoted = scalar_is_text(style, tag.as_deref())?;
                let node = Node::scalar(&text, quoted, &(self.origin_of_line)(line));
                self.place(node, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                refuse_custom_tag(tag.as_deref())?;
                self.open(Open::Sequence(Vec::new()), line, anchor)
            }
            Event::MappingStart(_, anchor, tag) => {
                refuse_custom_tag(tag.as_deref())?;
                self.open(Open::Mapping(Vec::new(), None), line, anchor)
            }
            Event::SequenceEnd | Event::MappingEnd => self.close(),
            Event::Alias(id) => {
                let Some(node) = self.anchors.get(&id) else {
                    return Err("this alias names an anchor that contains it".to_owned());
                };
                self.spend(node.cost())?;
                let mut node = self.anchors[&id].clone();
                node.origin = (self.origin_of_line)(line);
                self.attach(node)
            }
            _ => Ok(()),
        }
    }

    fn open(&mut self, open: Open, line: usize, anchor: usize) -> Result<(), String> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(format!("nested more than {MAX_DEPTH} deep"));
        }
        self.stack.push(Frame { open, line, anchor });
        Ok(())
    }

    fn close(&mut self) -> Result<(), String> {
        let Some(frame) = self.stack.pop() else {
            return Err("a collection ends that never began".to_owned());
        };
        let value = match frame.open {
            Open::Sequence(items) => Value::Sequence(items),
            Open::Mapping(entries, _) => Value::Mapping(entries),
        };
        let origin = (self.origin_of_line)(frame.line);
        self.spend((1, 0))?;
        self.keep_anchor(frame.anchor, &value, &origin)?;
        self.attach(Node { value, origin })
    }

    fn place(&mut self, node: Node, anchor: usize) -> Result<(), String> {
        self.spend(node.cost())?;
        self.keep_anchor(anchor, &node.value, &node.origin)?;
        self.attach(node)
    }

    fn keep_anchor(&mut self, anchor: usize, value: &Value, origin: &Origin) -> Result<(), String> {
        if anchor != 0 {
            let node = Node {
                value: value.clone(),
                origin: origin.clone(),
            };
            self.spend(node.cost())?;
            self.anchors.insert(anchor, node);
        }
        Ok(())
    }

    fn attach(&mut self, node: Node) -> Result<(), String> {
        let Some(frame) = self.stack.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut frame.open {
            Open::Sequence(items) => items.push(node),
            Open::Mapping(_, key @ None) => {
                let Value::Scalar { text, .. } = node.value else {
                    return Err("a key must be a plain name".to_owned());
                };
                *key = Some(Key {
                    text,
                    origin: node.origin,
                });
            }
            Open::Mapping(entries, key @ Some(_)) => {
                if let Some(key) = key.take() {
                    entries.push((key, node));
                }
            }
        }
        Ok(())
    }

    fn spend(&mut self, (nodes, bytes): (usize, usize)) -> Result<(), String> {
        self.nodes += nodes;
        self.text_bytes += bytes;
        if self.nodes > MAX_NODES || self.text_bytes > MAX_TEXT_BYTES {
            return Err(format!(
                "too much for a job file once its aliases are followed (at most {MAX_NODES} values and {MAX_TEXT_BYTES} bytes)"
            ));
        }
        Ok(())
    }
}

fn scalar_is_text(style: ScalarStyle, tag: Option<&Tag>) -> Result<bool, String> {
    refuse_custom_tag(tag)?;
    let tagged = tag.and_then(Tag::core_suffix) == Some("str");
    Ok(tagged || style != ScalarStyle::Plain)
}

fn refuse_custom_tag(tag: Option<&Tag>) -> Result<(), String> {
    match tag {
        Some(tag) if tag.core_suffix().is_none() => Err(format!(
            "the tag `{}` means nothing here",
            shorten(&tag.original())
        )),
        _ => Ok(()),
    }
}
