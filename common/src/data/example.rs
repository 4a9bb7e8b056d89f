//! A record becomes examples: tokens, and which of them are learned.
//!
//! Enters: one record. Leaves: usually one example; several where the template shows an answer differently once the
//! conversation goes on (as Qwen3 does, which removes earlier thinking). Never leaves an answer out, or a part of a row
//! that the template does not show, without a word.

mod answer;
mod conversation;
mod ends;
mod marks;
mod masked;
mod parts;
mod places;
mod shown;
mod templated;

use std::ops::Range;

use super::notes::Note;
use super::record::{Chat, Ends, Record, Segments};
use super::template::ChatTemplate;
use super::tokenize::{Earlier, Encoded, Tokenizer};
use answer::{Answer, Learned};
use conversation::{Conversation, Draft};
use parts::Parts;
use shown::{check_answers, note_hidden, unread_keys};

/// One tokenised text with its loss mask. `offsets` are the bytes of `text` that each token covers; rows that are tokens
/// already have neither.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Example {
    pub text: String,
    pub ids: Vec<u32>,
    /// The loss mask: whether each token is learned.
    pub trained: Vec<bool>,
    pub offsets: Vec<Range<usize>>,
    /// Whether EOS was added to what is learned, because the text had no end token of its own.
    pub added_eos: bool,
    /// Whether the text comes from a chat template.
    pub templated: bool,
    /// Whether it is the row's first example.
    pub starts_row: bool,
    /// Whether it is not the row's last example: an answer in it is not shown like this by the conversation as a whole.
    pub is_apart: bool,
    /// Index of the dataset in the job that the row is from, and of the file in that; `line` is its line there.
    pub dataset: usize,
    pub file: usize,
    pub line: u64,
}

impl Example {
    /// Its text as one that was tokenised before, if all of its tokens are of that.
    fn as_earlier(&self) -> Option<Earlier<'_>> {
        (!self.added_eos).then_some(Earlier {
            text: &self.text,
            ids: &self.ids,
            offsets: &self.offsets,
        })
    }

    /// Adds EOS behind the text, to be learned.
    fn push_eos(&mut self, eos: u32) {
        let end = self.text.len();
        self.ids.push(eos);
        self.offsets.push(end..end);
        self.trained.push(true);
        self.added_eos = true;
    }

    /// The example with its first token not learned: nothing comes before it that could predict it.
    fn without_first(mut self) -> Self {
        if let Some(first) = self.trained.first_mut() {
            *first = false;
        }
        self
    }
}

/// Error of rows of messages where the model has no chat template: it is told once, not for each row.
pub const NO_TEMPLATE: &str = "the model has no chat template, which rows of messages need: use a chat model, or data with `text` or `prompt` and `completion`";

/// Makes examples of records.
pub struct ExampleMaker<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    pub train_on_inputs: bool,
}

impl ExampleMaker<'_> {
    /// The examples of a row. Notes what of it the template does not show.
    pub fn examples(&self, record: &Record, notes: &mut Vec<Note>) -> Result<Vec<Example>, String> {
        let mut examples = match record {
            Record::Text(text) => vec![self.plain(text.clone(), 0)?],
            Record::Completion { prompt, completion } => {
                if completion.trim().is_empty() {
                    notes.push(Note::EmptyAnswer);
                }
                let start = if self.train_on_inputs {
                    0
                } else {
                    prompt.len()
                };
                vec![self.plain(format!("{prompt}{completion}"), start)?]
            }
            Record::Segments(segments) => vec![self.segments(segments)?],
            Record::Tokens { ids, learned } => vec![tokens(ids, learned)],
            Record::Conversation(chat) => {
                let drafts = self.drafts(chat, notes)?;
                let mut examples: Vec<Example> = Vec::with_capacity(drafts.len());
                for draft in drafts {
                    // The texts of a conversation begin alike.
                    let example = self.templated(draft, examples.last())?;
                    examples.push(example);
                }
                notes.extend(examples.iter().find_map(|example| self.other_end(example)));
                examples
            }
        };
        let is_learned = |example: &Example| example.trained.contains(&true);
        let says_itself = matches!(record, Record::Segments(_) | Record::Tokens { .. });
        if says_itself && !examples.iter().any(is_learned) {
            notes.push(Note::NothingLearned);
        }
        if let Some(first) = examples.first_mut() {
            first.starts_row = true;
        }
        if let Some((_, earlier)) = examples.split_last_mut() {
            earlier
                .iter_mut()
                .for_each(|example| example.is_apart = true);
        }
        Ok(examples)
    }

    /// The example of a text without a template: everything from byte `start` on is learned, and EOS after it.
    fn plain(&self, text: String, start: usize) -> Result<Example, String> {
        let Encoded { ids, offsets } = self.encode(&text, true)?;
        // A token that reaches over the start counts as learned; what comes after the text too.
        let first = offsets
            .iter()
            .position(|covered| covered.end > start || covered.start >= text.len())
            .unwrap_or(ids.len());
        let mut example = Example {
            trained: (0..ids.len()).map(|token| token >= first).collect(),
            text,
            ids,
            offsets,
            ..Example::default()
        };
        if let Some(eos) = self.tokenizer.eos_id()
            && example.ids.last() != Some(&eos)
        {
            example.push_eos(eos);
        }
        Ok(example.without_first())
    }

    /// The example of texts that are tokenised one by one, with special tokens before the first and EOS after the last where
    /// they have those.
    fn segments(&self, segments: &Segments) -> Result<Example, String> {
        let mut example = Example::default();
        for (index, segment) in segments.list.iter().enumerate() {
            if segment.text.is_empty() {
                continue;
            }
            let start = example.text.len();
            let Encoded { ids, offsets } =
                self.encode(&segment.text, segments.begins_special && index == 0)?;
            let learned = segment.learned || self.train_on_inputs;
            example.trained.extend(ids.iter().map(|_| learned));
            example.ids.extend(ids);
            example.offsets.extend(
                offsets
                    .into_iter()
                    .map(|at| at.start + start..at.end + start),
            );
            example.text.push_str(&segment.text);
        }
        let is_answered = segments
            .list
            .last()
            .is_some_and(|last| !last.text.is_empty());
        if let Some(eos) = self.tokenizer.eos_id()
            && is_answered
        {
            // Where the text ends with one itself, there is one less to add.
            let has_own = usize::from(example.ids.last() == Some(&eos));
            (has_own..segments.end_tokens).for_each(|_| example.push_eos(eos));
        }
        Ok(example.without_first())
    }

    /// Renders the texts of a conversation, with the bytes of each that are learned.
    fn drafts(&self, chat: &Chat, notes: &mut Vec<Note>) -> Result<Vec<Draft>, String> {
        let template = self.template.ok_or(NO_TEMPLATE)?;
        let conversation = Conversation::new(template, chat);
        let text = conversation.text()?;
        let parts = conversation.parts(&text);
        notes.extend(unread_keys(chat, template));
        let turns = (0..chat.messages.len()).filter(|index| chat.learned[*index]);
        let turns: Vec<usize> = turns.collect();
        if self.train_on_inputs {
            note_hidden(chat, &parts, &[], notes);
            check_answers(chat, &parts, &turns, &[], notes)?;
            let learned = Learned::answer(0..text.len(), text.len());
            return Ok(vec![Draft {
                text,
                learned: vec![learned],
                ends: Ends::default(),
                has_last: true,
                is_exact: false,
            }]);
        }
        let (turns, messages): (Vec<usize>, Vec<usize>) = turns
            .into_iter()
            .partition(|turn| chat.messages[*turn]["role"] == "assistant");
        let answers = conversation.answers(&text, &parts, &turns)?;
        let apart: Vec<(usize, &str)> = turns
            .iter()
            .zip(&answers)
            .filter_map(|(turn, answer)| match answer {
                Answer::Whole(_) => None,
                Answer::Apart { text, start } => Some((*turn, &text[*start..])),
            })
            .collect();
        note_hidden(chat, &parts, &apart, notes);
        check_answers(chat, &parts, &turns, &apart, notes)?;
        check_answers(chat, &parts, &messages, &[], notes)?;
        let answers = turns.iter().copied().zip(answers);
        if masked::is_special(chat) {
            return masked::drafts(&conversation, chat, text, &parts, answers, &messages, notes);
        }
        assemble(&conversation, text, &parts, answers.collect(), notes)
    }

    /// A note where the last answer ends with a special token that nothing names as an end: who was trained so never stops.
    fn other_end(&self, example: &Example) -> Option<Note> {
        let last = example.trained.iter().rposition(|trained| *trained)?;
        let id = example.ids[last];
        let is_special = self.tokenizer.special_ids().contains(&id);
        let is_end = self.tokenizer.eos_ids().contains(&id);
        let text = self.tokenizer.token_text(id)?;
        (is_special && !is_end && !self.train_on_inputs).then_some(Note::OtherEnd(text))
    }

    fn ends_a_turn(&self, id: u32) -> bool {
        self.tokenizer.special_ids().contains(&id) || self.tokenizer.eos_ids().contains(&id)
    }

    fn encode(&self, text: &str, add_special: bool) -> Result<Encoded, String> {
        self.tokenizer
            .encode(text, add_special)
            .map_err(|error| error.to_string())
    }
}

/// The example of a row of tokens. Its text is left to whoever shows it.
fn tokens(ids: &[u32], learned: &[bool]) -> Example {
    let mut trained = learned.to_vec();
    if let Some(first) = trained.first_mut() {
        *first = false;
    }
    Example {
        ids: ids.to_vec(),
        trained,
        ..Example::default()
    }
}

/// The answers to learn as texts with the bytes that are learned.
fn assemble(
    conversation: &Conversation,
    text: String,
    parts: &Parts,
    answers: Vec<(usize, Answer)>,
    notes: &mut Vec<Note>,
) -> Result<Vec<Draft>, String> {
    let has_answers = !answers.is_empty();
    let mut drafts = Vec::new();
    let mut whole = Vec::new();
    for (turn, answer) in answers {
        let (text, start) = match answer {
            Answer::Whole(learned) => {
                whole.push((turn, learned));
                continue;
            }
            Answer::Apart { text, start } => (text, start),
        };
        let generated = conversation.generated(turn + 1, &text)?;
        let learned = Learned::answer(start..text.len(), text.len());
        drafts.push(match generated {
            None => Draft {
                text,
                learned: vec![learned],
                ends: Ends::default(),
                has_last: true,
                is_exact: false,
            },
            Some(marked) => Draft {
                learned: marks::learned_last(&marked, start),
                text,
                ends: Ends::default(),
                has_last: true,
                is_exact: true,
            },
        });
    }
    if whole.is_empty() && !drafts.is_empty() {
        return Ok(drafts);
    }
    let generated = conversation.generated(conversation.len(), &text)?;
    let is_exact = generated.is_some();
    let learned = match generated {
        None => whole.into_iter().map(|(_, learned)| learned).collect(),
        Some(marked) => {
            notes.push(Note::GenerationMarks);
            marks::learned(&marked, parts, whole)?
        }
    };
    drafts.push(Draft {
        text,
        learned,
        ends: Ends::default(),
        has_last: true,
        is_exact,
    });
    if is_exact && has_answers && drafts.iter().all(|draft| draft.learned.is_empty()) {
        return Err(
            "the chat template's generation marks leave every answer out: nothing to learn"
                .to_owned(),
        );
    }
    Ok(drafts)
}

fn is_blank(text: &str, span: Range<usize>) -> bool {
    text.get(span).is_none_or(|text| text.trim().is_empty())
}
