//! Text from a model: the prompt as one chat message, the answer token by token.
//!
//! In: a model folder (perhaps with an adapter) and a prompt. Out: the answer, streamed in whole characters. Equal
//! inputs and seeds give equal answers.

use std::path::{Path, PathBuf};

use common::data::template::{
    ChatTemplate, RenderInput, TemplateError, Value, Variables, message_value,
};
use common::data::tokenize::{Tokenizer, TokenizerError};
use common::files::model::has_tokenizer;
use common::job::JobSpec;
use common::rng::CounterRng;
use serde_json::{Value as Json, json};
use thiserror::Error;

use crate::engine::inference::decoder::InferenceModel;
use crate::engine::inference::error::{InferenceError, check_folder};
use crate::engine::inference::merged_weights::FourBits;

/// Stream of the counter-based generator from which tokens are drawn.
const STREAM_SAMPLE: u64 = 0x67656e;

/// What to answer, with which model, and how tokens are chosen.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    pub model_dir: PathBuf,
    /// Folder of a PEFT adapter for that model.
    pub adapter_dir: Option<PathBuf>,
    pub prompt: String,
    /// How the base model is quantised, if it is.
    pub four_bits: Option<FourBits>,
    pub max_new_tokens: usize,
    /// Temperature of sampling; 0 takes the most likely token each time.
    pub temperature: f64,
    pub seed: u64,
}

/// Why a prompt was not answered.
#[derive(Debug, Error)]
pub enum GenerateError {
    #[error(transparent)]
    Model(#[from] InferenceError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("the prompt has {tokens} tokens, and the model takes at most {limit} with the answer")]
    PromptTooLong { tokens: usize, limit: usize },
}

/// Answers one prompt. `on_text` is given the answer piece by piece as it comes.
pub fn generate_text(
    options: &GenerateOptions,
    on_text: &mut dyn FnMut(&str),
) -> Result<String, GenerateError> {
    let adapter_dir = options.adapter_dir.as_deref();
    let mut generator = Generator::load(&options.model_dir, adapter_dir, options.four_bits, None)?;
    let sampling = Sampling {
        max_new_tokens: options.max_new_tokens,
        temperature: options.temperature,
        seed: options.seed,
    };
    generator.answer(&options.prompt, &sampling, on_text)
}

/// The folder of the tokenizer: the adapter's where that has one, because it may have tokens of its own.
fn tokenizer_dir<'a>(model_dir: &'a Path, adapter_dir: Option<&'a Path>) -> &'a Path {
    adapter_dir
        .filter(|dir| has_tokenizer(dir))
        .unwrap_or(model_dir)
}

/// How tokens are chosen, and how many.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    pub max_new_tokens: usize,
    /// Temperature of sampling; 0 takes the most likely token each time.
    pub temperature: f64,
    pub seed: u64,
}

/// A loaded model that answers any number of prompts.
pub struct Generator {
    model: InferenceModel,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    /// What the template sees beside the messages.
    variables: Variables,
    /// Message before the prompt.
    system: Option<String>,
}

impl Generator {
    /// Loads a model with its tokenizer, and an adapter if there is one; the model is quantised where that is asked for. A
    /// `job` may add tokens to the tokenizer and rename some.
    pub fn load(
        model_dir: &Path,
        adapter_dir: Option<&Path>,
        four_bits: Option<FourBits>,
        job: Option<&JobSpec>,
    ) -> Result<Self, GenerateError> {
        for folder in [Some(model_dir), adapter_dir].into_iter().flatten() {
            check_folder(folder)?;
        }
        // The weights come last: what is wrong with the small files shows at once.
        let mut tokenizer = Tokenizer::load(tokenizer_dir(model_dir, adapter_dir))?;
        let new = match job {
            Some(job) => {
                tokenizer.rename_tokens(&job.added_tokens_overrides)?;
                tokenizer.add_tokens(&job.tokens)?
            }
            None => Vec::new(),
        };
        let vocabulary = new.iter().filter_map(|token| token.id).max();
        let vocabulary = vocabulary.map_or(0, |id| id as usize + 1);
        if let Some(dir) = adapter_dir {
            tokenizer.add_end_tokens_of(dir)?;
        }
        // The adapter's is the one that it was trained with.
        let template = match adapter_dir.map(ChatTemplate::load_optional).transpose()? {
            Some(Some(template)) => Some(template),
            _ => ChatTemplate::load_optional(model_dir)?,
        };
        Ok(Self {
            model: InferenceModel::load_with(model_dir, adapter_dir, four_bits, vocabulary)?,
            tokenizer,
            template,
            variables: Variables::default(),
            system: None,
        })
    }

    /// Asks in the way in which this job's conversations are written: its template, what it gives that, its system message.
    pub fn ask_as_in(&mut self, job: &JobSpec) -> Result<(), GenerateError> {
        self.template = ChatTemplate::chosen_for(job)?;
        // One that is no token was refused when the data was prepared.
        if let Some(eos) = &job.eos_token {
            self.tokenizer.end_texts_with(eos);
        }
        // Those that are no tokens end nothing.
        self.tokenizer.add_end_tokens(&job.eot_tokens);
        // What is wrong with them was told when the data was prepared.
        let variables = Json::Object(job.chat_template_kwargs.clone());
        self.variables = Variables::from_json(&variables).unwrap_or_default();
        self.system.clone_from(&job.default_system_message);
        Ok(())
    }

    /// Answers one prompt, as one user message; a model without a chat template continues it as it stands.
    pub fn answer(
        &mut self,
        prompt: &str,
        sampling: &Sampling,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<String, GenerateError> {
        let prompt_ids = self.prompt_ids(prompt)?;
        let limit = self.model.positions();
        if prompt_ids.len() >= limit {
            return Err(GenerateError::PromptTooLong {
                tokens: prompt_ids.len(),
                limit,
            });
        }
        let max_new_tokens = sampling.max_new_tokens.min(limit - prompt_ids.len());
        self.model.reset()?;
        let mut text = TextStream::new(&self.tokenizer);
        let mut input = prompt_ids;
        for index in 0..max_new_tokens {
            let logits = self.model.append(&input)?;
            let token = sampling.choose(&logits, index);
            if self.tokenizer.eos_ids().contains(&token) {
                break;
            }
            text.push(token, on_text)?;
            input = vec![token];
        }
        text.finish(on_text)
    }

    fn prompt_ids(&self, prompt: &str) -> Result<Vec<u32>, GenerateError> {
        let encoded = match &self.template {
            Some(template) => {
                let system = self.system.iter();
                let system = system.map(|text| json!({"role": "system", "content": text}));
                let user = json!({"role": "user", "content": prompt});
                let messages: Vec<Value> = system
                    .chain([user])
                    .map(|message| message_value(&message))
                    .collect();
                let text = template.render_input(RenderInput {
                    messages: &messages,
                    tools: None,
                    variables: &self.variables,
                    add_generation_prompt: true,
                })?;
                self.tokenizer.encode(&text, false)?
            }
            None => self.tokenizer.encode(prompt, true)?,
        };
        if encoded.ids.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        Ok(encoded.ids)
    }
}

impl Sampling {
    /// Chooses the `index`-th token of the answer by its logits, which are finite and not empty.
    pub fn choose(&self, logits: &[f32], index: usize) -> u32 {
        let (best, highest) = logits.iter().enumerate().fold(
            (0, f32::NEG_INFINITY),
            |(best, highest), (token, &logit)| {
                if logit > highest {
                    (token, logit)
                } else {
                    (best, highest)
                }
            },
        );
        // A NaN fails the comparison.
        let draws = self.temperature > 0.0;
        if !draws {
            return best as u32;
        }
        let weight = |logit: &f32| (f64::from(logit - highest) / self.temperature).exp();
        let total: f64 = logits.iter().map(weight).sum();
        let mut rest = CounterRng::new(self.seed, &[STREAM_SAMPLE, index as u64]).uniform() * total;
        for (token, logit) in logits.iter().enumerate() {
            rest -= weight(logit);
            if rest < 0.0 {
                return token as u32;
            }
        }
        // Rounding may leave a little over.
        best as u32
    }
}

/// Turns tokens into text, given out as soon as no later token can change it.
struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<u32>,
    /// Index of the first token in the context in which the next ones are decoded.
    context: usize,
    /// Number of tokens whose text is given out.
    given: usize,
    text: String,
}

impl<'a> TextStream<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            tokens: Vec::new(),
            context: 0,
            given: 0,
            text: String::new(),
        }
    }

    fn push(&mut self, token: u32, on_text: &mut dyn FnMut(&str)) -> Result<(), GenerateError> {
        self.tokens.push(token);
        let piece = self.pending()?;
        // Half of a character is decoded as a replacement character.
        if !piece.is_empty() && !piece.ends_with('\u{fffd}') {
            self.give(&piece, on_text);
        }
        Ok(())
    }

    fn finish(mut self, on_text: &mut dyn FnMut(&str)) -> Result<String, GenerateError> {
        let piece = self.pending()?;
        if !piece.is_empty() {
            self.give(&piece, on_text);
        }
        Ok(self.text)
    }

    /// The text of the tokens that are not given out yet.
    ///
    /// Some tokenizers write a token differently at the start of a text, so they are decoded together with those before them.
    fn pending(&self) -> Result<String, GenerateError> {
        let before = self
            .tokenizer
            .decode_with(&self.tokens[self.context..self.given], true)?;
        let all = self
            .tokenizer
            .decode_with(&self.tokens[self.context..], true)?;
        Ok(all[common_prefix(&before, &all)..].to_owned())
    }

    fn give(&mut self, piece: &str, on_text: &mut dyn FnMut(&str)) {
        on_text(piece);
        self.text.push_str(piece);
        self.context = self.given;
        self.given = self.tokens.len();
    }
}

/// Bytes that two texts begin with alike, up to a whole character. What was given out stays, also where more tokens would have
/// made it another text: bytes that are no characters together.
fn common_prefix(a: &str, b: &str) -> usize {
    let mut pairs = a.char_indices().zip(b.chars());
    let differing = pairs.find(|((_, a), b)| a != b);
    differing.map_or(a.len().min(b.len()), |((at, _), _)| at)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn texts_go_on_behind_what_they_begin_with_alike() {
        assert_eq!(common_prefix("Sould#", "Sould#s"), 6);
        assert_eq!(common_prefix("Sould#", "Sould\u{fffd}\u{fffd} w"), 5);
        assert_eq!(common_prefix("é", "éa"), 2);
        assert_eq!(common_prefix("abc", "ab"), 2);
        assert_eq!(common_prefix("", "a"), 0);
    }

    fn sampling(temperature: f64, seed: u64) -> Sampling {
        Sampling {
            max_new_tokens: 1,
            temperature,
            seed,
        }
    }

    #[test]
    fn temperature_zero_takes_the_most_likely_token() {
        assert_eq!(sampling(0.0, 1).choose(&[0.0, 3.0, 3.0, -1.0], 0), 1);
    }

    #[test]
    fn samples_follow_the_probabilities_and_the_seed() {
        let logits = [0.0, (3.0f32).ln(), f32::MIN];
        let draws: Vec<u32> = (0..4000)
            .map(|index| sampling(1.0, 7).choose(&logits, index))
            .collect();
        let ones = draws.iter().filter(|token| **token == 1).count();
        assert!((2850..3150).contains(&ones), "{ones} of 4000");
        assert!(!draws.contains(&2));
        let again: Vec<u32> = (0..4000)
            .map(|index| sampling(1.0, 7).choose(&logits, index))
            .collect();
        let other: Vec<u32> = (0..4000)
            .map(|index| sampling(1.0, 8).choose(&logits, index))
            .collect();
        assert_eq!(draws, again);
        assert_ne!(draws, other);
    }

    #[test]
    fn text_is_given_out_in_whole_characters() {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-qwen3");
        let tokenizer = Tokenizer::load(&shipped).unwrap();
        let text = "Zwölf 🦀 zählen: 日本語.";
        let tokens = tokenizer.encode(text, false).unwrap().ids;
        let mut pieces: Vec<String> = Vec::new();
        let mut on_text = |piece: &str| pieces.push(piece.to_owned());
        let mut stream = TextStream::new(&tokenizer);
        for &token in &tokens {
            stream.push(token, &mut on_text).unwrap();
        }
        assert_eq!(stream.finish(&mut |_| {}).unwrap(), text);
        assert_eq!(pieces.concat(), text);
        assert!(pieces.len() > 10 && pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
    }
}
