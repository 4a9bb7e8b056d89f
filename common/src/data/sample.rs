//! An example as people see it: its text, and which of it is learned.

use serde::Serialize;

use super::example::Example;
use super::tokenize::Tokenizer;

/// An example as people and `check --json` see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sample {
    pub text: String,
    pub input_ids: Vec<u32>,
    /// For each token its id where it is learned, else -100.
    pub labels: Vec<i64>,
    #[serde(skip)]
    pub spans: Vec<TextSpan>,
}

/// A stretch of text that is learned, or is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextSpan {
    pub text: String,
    pub trained: bool,
}

/// An example as a sample, with the labels that its blocks will have, however it is cut.
pub(super) fn sample_of(example: &Example, tokenizer: &Tokenizer) -> Sample {
    let trained = &example.trained;
    let labels = example.ids.iter().zip(trained);
    let decoded;
    let example = match example.offsets.is_empty() {
        true => {
            decoded = decoded_example(example, tokenizer);
            &decoded
        }
        false => example,
    };
    let mut text = example.text.clone();
    if example.added_eos
        && let Some(eos) = tokenizer.eos_id().and_then(|id| tokenizer.token_text(id))
    {
        text.push_str(&eos);
    }
    Sample {
        spans: text_spans(&text, example, trained),
        labels: labels
            .map(|(id, trained)| if *trained { i64::from(*id) } else { -100 })
            .collect(),
        input_ids: example.ids.clone(),
        text,
    }
}

/// The example of a row of tokens, with their text: each stretch that is learned, or is not, by itself.
fn decoded_example(example: &Example, tokenizer: &Tokenizer) -> Example {
    let mut decoded = example.clone();
    let runs = example.trained.chunk_by(|one, other| one == other);
    let mut first = 0;
    for run in runs {
        let ids = &example.ids[first..first + run.len()];
        let start = decoded.text.len();
        decoded.text += &tokenizer.decode(ids).unwrap_or_default();
        let end = decoded.text.len();
        decoded.offsets.extend(ids.iter().map(|_| start..end));
        first += run.len();
    }
    decoded
}

/// The text of an example in stretches that are learned or not.
fn text_spans(text: &str, example: &Example, trained: &[bool]) -> Vec<TextSpan> {
    let mut spans: Vec<TextSpan> = Vec::new();
    let mut at = 0;
    for token in 1..=trained.len() {
        if token < trained.len() && trained[token] == trained[token - 1] {
            continue;
        }
        let mut end = example
            .offsets
            .get(token)
            .map_or(text.len(), |covered| covered.start);
        while !text.is_char_boundary(end) {
            end += 1;
        }
        if end > at {
            spans.push(TextSpan {
                text: text[at..end].to_owned(),
                trained: trained[token - 1],
            });
            at = end;
        }
    }
    spans
}
