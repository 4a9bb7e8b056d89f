//! Tokenises text with the model's own tokenizer.
//!
//! Enters: the tokenizer files of a model folder, and text. Leaves: token ids with the bytes each one covers. Never
//! truncates or pads, whatever the files say.

mod pieces;
mod rename;
mod source;
mod special;
mod words;

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use serde_json::Value as Json;
use tokenizers::{AddedToken, ModelWrapper, PostProcessor, PostProcessorWrapper};

use super::added_tokens;
use crate::job::NewToken;

use self::source::Source;
pub(super) use self::special::read_json;
pub use self::special::{SpecialTokens, TokenizerError};
use self::words::WordEncoder;

/// Token ids, and for each the bytes of the text it came from (empty for tokens that the tokenizer added itself).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    pub ids: Vec<u32>,
    pub offsets: Vec<Range<usize>>,
}

/// A text that was tokenised before, with its first tokens.
#[derive(Clone, Copy, Debug)]
pub struct Earlier<'a> {
    pub text: &'a str,
    pub ids: &'a [u32],
    /// The bytes of each token; none of them empty.
    pub offsets: &'a [Range<usize>],
}

/// The tokenizer of a model.
pub struct Tokenizer {
    // Without its post-processor: ByteLevel's trims white space off the offsets, and a token of white space alone would
    // cover nothing.
    inner: tokenizers::Tokenizer,
    post_processor: Option<PostProcessorWrapper>,
    /// Ids that are put before and behind a text, which do not depend on it.
    around: [Vec<u32>; 2],
    /// The same tokens sooner, where the tokenizer is of a known make.
    words: Option<WordEncoder>,
    special: SpecialTokens,
    special_ids: HashSet<u32>,
    eos_id: Option<u32>,
    eos_ids: Vec<u32>,
    pad_id: u32,
    id_bound: u32,
    /// Digest of `tokenizer.json`.
    digest: String,
    made_from: Option<String>,
    /// Tokens that other files add to it or describe otherwise.
    added: Vec<AddedToken>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("id_bound", &self.id_bound)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json`, else makes it of `tokenizer.model`, and the special tokens from the files beside it.
    pub fn load(model_dir: &Path) -> Result<Self, TokenizerError> {
        let source = Source::read(model_dir)?;
        let mut inner = source.parse()?;
        let failed = |error: tokenizers::Error| TokenizerError::Failed(error.to_string());
        inner.with_truncation(None).map_err(failed)?;
        inner.with_padding(None);
        if let ModelWrapper::BPE(model) = inner.get_model()
            && model.dropout.is_some()
        {
            // Merges left out at random would give other blocks each time.
            let mut model = model.clone();
            model.dropout = None;
            inner.with_model(model);
        }
        let post_processor = inner.get_post_processor().cloned();
        inner.with_post_processor(None::<PostProcessorWrapper>);
        let special = SpecialTokens::load(model_dir)?;
        let added = match source.made_from {
            // What is made has the tokens of the files beside it.
            Some(_) => Vec::new(),
            None => added_tokens::extend(&mut inner, model_dir, &special)?,
        };
        let id_of = |name: &str| -> Result<Option<u32>, TokenizerError> {
            let Some(text) = special.get(name) else {
                return Ok(None);
            };
            match inner.token_to_id(text) {
                Some(id) => Ok(Some(id)),
                None => Err(TokenizerError::UnknownSpecialToken {
                    dir: model_dir.to_owned(),
                    name: name.to_owned(),
                    text: text.to_owned(),
                }),
            }
        };
        let mut eos_ids: Vec<u32> = id_of("eos_token")?.into_iter().collect();
        for id in configured_ids(model_dir, "eos_token_id")? {
            if !eos_ids.contains(&id) {
                eos_ids.push(id);
            }
        }
        let eos_id = eos_ids.first().copied();
        let pad_id = id_of("pad_token").ok().flatten().or(eos_id).unwrap_or(0);
        let mut tokenizer = Self {
            around: [Vec::new(), Vec::new()],
            words: None,
            inner,
            post_processor,
            special,
            special_ids: HashSet::new(),
            eos_id,
            eos_ids,
            pad_id,
            id_bound: 0,
            digest: blake3::hash(&source.bytes).to_hex().to_string(),
            made_from: source.made_from,
            added,
        };
        tokenizer.follow_tokens()?;
        Ok(tokenizer)
    }

    /// Brings what follows from the tokens up to date.
    fn follow_tokens(&mut self) -> Result<(), TokenizerError> {
        let added = self.inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special);
        self.special_ids = special.map(|(id, _)| *id).collect();
        let vocabulary = self.inner.get_vocab(true);
        let largest = vocabulary.values().max();
        self.id_bound = largest.map_or(0, |id| id.saturating_add(1));
        self.words = WordEncoder::of(&self.inner);
        self.around = self.put_around()?;
        Ok(())
    }

    /// The added tokens whose ids follow those of another tokenizer, by rising ids.
    pub fn added_after(&self, other: &Self) -> Vec<NewToken> {
        let added = self.inner.get_added_tokens_decoder().into_iter();
        let mut after: Vec<NewToken> = added
            .filter(|(id, _)| *id >= other.id_bound)
            .map(|(id, token)| NewToken {
                text: token.content,
                is_special: token.special,
                id: Some(id),
            })
            .collect();
        after.sort_by_key(|token| token.id);
        after
    }

    /// Adds the tokens that are none here yet. Returns those, with the ids that they got: the ones that follow.
    pub fn add_tokens(&mut self, tokens: &[NewToken]) -> Result<Vec<NewToken>, TokenizerError> {
        let is_new = |token: &&NewToken| self.inner.token_to_id(&token.text).is_none();
        let mut new: Vec<NewToken> = tokens.iter().filter(is_new).cloned().collect();
        if new.is_empty() {
            return Ok(new);
        }
        let added: Vec<AddedToken> = new
            .iter()
            .map(|token| AddedToken::from(&token.text, token.is_special).normalized(false))
            .collect();
        let failed = |error: tokenizers::Error| TokenizerError::Failed(error.to_string());
        self.inner.add_tokens(added.clone()).map_err(failed)?;
        for token in &mut new {
            token.id = self.inner.token_to_id(&token.text);
        }
        self.added.extend(added);
        self.follow_tokens()?;
        Ok(new)
    }

    /// Lets another token end texts, as the job's `eos_token` says. False where it is no token here.
    pub fn end_texts_with(&mut self, text: &str) -> bool {
        let Some(id) = self.inner.token_to_id(text) else {
            return false;
        };
        self.special
            .0
            .insert("eos_token".to_owned(), text.to_owned());
        self.eos_id = Some(id);
        self.eos_ids.retain(|other| *other != id);
        self.eos_ids.insert(0, id);
        true
    }

    /// Lets these tokens end a turn, too, as the job's `eot_tokens` says. Returns those that are no token here.
    pub fn add_end_tokens(&mut self, tokens: &[String]) -> Vec<String> {
        let mut unknown = Vec::new();
        for token in tokens {
            match self.inner.token_to_id(token) {
                Some(id) if self.eos_ids.contains(&id) => {}
                Some(id) => self.eos_ids.push(id),
                None => unknown.push(token.clone()),
            }
        }
        unknown
    }

    /// Lets what another folder's configuration names end a text, too: an adapter's beside its model's.
    pub fn add_end_tokens_of(&mut self, dir: &Path) -> Result<(), TokenizerError> {
        for id in end_tokens_of(dir)? {
            if !self.eos_ids.contains(&id) {
                self.eos_ids.push(id);
            }
        }
        Ok(())
    }

    /// Tokenises a text. `add_special`: with what the tokenizer puts around a text of its own accord (a BOS, for some models).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Encoded, TokenizerError> {
        if let Some(plain) = self.by_words(text, None)? {
            return Ok(match add_special && self.post_processor.is_some() {
                true => self.with_special(plain, text.len()),
                false => plain,
            });
        }
        self.encode_in_pieces(text, add_special)
    }

    /// Tokenises a text that may begin as another one did, without what the tokenizer puts around it.
    pub fn encode_after(
        &self,
        text: &str,
        earlier: Option<Earlier>,
    ) -> Result<Encoded, TokenizerError> {
        match self.by_words(text, earlier)? {
            Some(plain) => Ok(plain),
            None => self.encode_in_pieces(text, false),
        }
    }

    fn by_words(
        &self,
        text: &str,
        earlier: Option<Earlier>,
    ) -> Result<Option<Encoded>, TokenizerError> {
        let Some(words) = &self.words else {
            return Ok(None);
        };
        let encoded = words.encode(&self.inner, text, earlier);
        encoded.map_err(TokenizerError::Failed)
    }

    fn encode_in_pieces(&self, text: &str, add_special: bool) -> Result<Encoded, TokenizerError> {
        let pieces = pieces::divide(&self.inner, text).map_err(TokenizerError::Failed)?;
        let Some(pieces) = pieces else {
            return self.encode_whole(text, add_special);
        };
        let mut all = Encoded::default();
        let mut at = 0;
        for piece in pieces {
            let encoded = self.encode_whole(piece, false)?;
            all.ids.extend(encoded.ids);
            let offsets = encoded.offsets.into_iter();
            all.offsets
                .extend(offsets.map(|range| range.start + at..range.end + at));
            at += piece.len();
        }
        Ok(match add_special {
            true => self.with_special(all, at),
            false => all,
        })
    }

    /// A text's tokens with what the tokenizer puts around it.
    fn with_special(&self, plain: Encoded, bytes: usize) -> Encoded {
        let [before, after] = &self.around;
        let mut all = Encoded {
            ids: before.clone(),
            offsets: vec![0..0; before.len()],
        };
        all.ids.extend(plain.ids);
        all.offsets.extend(plain.offsets);
        all.ids.extend(after);
        all.offsets.resize(all.ids.len(), bytes..bytes);
        all
    }

    /// What the tokenizer puts before and behind a text.
    fn put_around(&self) -> Result<[Vec<u32>; 2], TokenizerError> {
        let around = self.encode_whole("a", true)?;
        let is_added = |range: &Range<usize>| range.is_empty();
        let before = around
            .offsets
            .iter()
            .take_while(|range| is_added(range))
            .count();
        let after = around.offsets[before..].iter().position(is_added);
        let after = after.map_or(around.ids.len(), |after| before + after);
        Ok([around.ids[..before].to_vec(), around.ids[after..].to_vec()])
    }

    fn encode_whole(&self, text: &str, add_special: bool) -> Result<Encoded, TokenizerError> {
        let failed = |error: tokenizers::Error| TokenizerError::Failed(error.to_string());
        let plain = self.inner.encode(text, false).map_err(failed)?;
        let offsets: Vec<Range<usize>> = plain.get_offsets().iter().map(|(a, b)| *a..*b).collect();
        let (true, Some(processor)) = (add_special, &self.post_processor) else {
            return Ok(Encoded {
                ids: plain.get_ids().to_vec(),
                offsets,
            });
        };
        let with_special = processor.process(plain, None, true).map_err(failed)?;
        let mut from_text = offsets.into_iter();
        let mut at = 0;
        let offsets = with_special
            .get_special_tokens_mask()
            .iter()
            .map(|added| match added {
                0 => {
                    let range = from_text.next().unwrap_or(at..at);
                    at = range.end;
                    range
                }
                _ => at..at,
            })
            .collect();
        Ok(Encoded {
            ids: with_special.get_ids().to_vec(),
            offsets,
        })
    }

    /// The text of tokens, special ones included.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.decode_with(ids, false)
    }

    pub fn decode_with(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|error| TokenizerError::Failed(error.to_string()))
    }

    /// The token that ends a text: the tokenizer's, else the first that the model's config names.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// Every token that ends generation: the tokenizer's, then those of `generation_config.json` and `config.json`.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The token that padding is filled with; it is never seen by the model's loss or attention.
    pub fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// The tokens that ordinary text never becomes.
    pub fn special_ids(&self) -> &HashSet<u32> {
        &self.special_ids
    }

    /// Says of each special token that a job names whether it is another one than the tokenizer's own; a line each.
    pub fn differing_tokens(&self, named: &[(String, String)]) -> Vec<String> {
        let differing = named.iter().filter_map(|(name, text)| {
            let own = match self.special.get(name) {
                Some(own) if own == text => return None,
                // Without one no text becomes it, whatever it is called.
                None if name == "unk_token" => return None,
                Some(own) => format!("the tokenizer has {own}"),
                None => "the tokenizer has none".to_owned(),
            };
            Some(format!(
                "special_tokens.{name} is {text}, and {own}: no token is renamed; remove it, or change {name} in \
                 tokenizer_config.json of base_model"
            ))
        });
        differing.collect()
    }

    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// The text of one token as the vocabulary has it.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Digest of the files that decide what `encode` gives and how texts end, hex.
    pub fn digest(&self) -> String {
        let mut rest = serde_json::json!([self.digest, self.special.0, self.eos_ids, self.pad_id]);
        if let (Some(parts), false) = (rest.as_array_mut(), self.added.is_empty()) {
            parts.push(serde_json::json!(self.added));
        }
        blake3::hash(rest.to_string().as_bytes())
            .to_hex()
            .to_string()
    }

    /// What the tokenizer was made of, for people; None where the folder has its `tokenizer.json`.
    pub fn made_from(&self) -> Option<&str> {
        self.made_from.as_deref()
    }

    /// One more than the largest id.
    pub fn id_bound(&self) -> u32 {
        self.id_bound
    }
}

/// The ids that a folder's configuration names as ends of texts.
pub fn end_tokens_of(dir: &Path) -> Result<Vec<u32>, TokenizerError> {
    configured_ids(dir, "eos_token_id")
}

/// Token ids of a field, a number or a list of numbers, in `generation_config.json` and `config.json`.
fn configured_ids(model_dir: &Path, field: &str) -> Result<Vec<u32>, TokenizerError> {
    let mut ids = Vec::new();
    for file in ["generation_config.json", "config.json"] {
        let path = model_dir.join(file);
        let config =
            read_json(&path).map_err(|reason| TokenizerError::Unreadable { path, reason })?;
        let found = config.as_ref().and_then(|config| config.get(field));
        let found = match found {
            Some(Json::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
            None => &[],
        };
        for id in found.iter().filter(|id| !id.is_null()) {
            match id.as_i64().map(u32::try_from) {
                Some(Ok(id)) => ids.push(id),
                // An old way to say that there is none.
                Some(Err(_)) if id.as_i64() == Some(-1) => {}
                _ => {
                    let path = model_dir.join(file);
                    let reason = format!("{field} is {id}, not the id of a token");
                    return Err(TokenizerError::Unreadable { path, reason });
                }
            }
        }
    }
    Ok(ids)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_are_strings_or_objects_and_the_tokenizer_config_wins() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            "special_tokens_map.json",
            r#"{"eos_token": "<old>", "pad_token": {"content": "<pad>"}}"#,
        );
        write(
            "tokenizer_config.json",
            r#"{"eos_token": {"content": "</s>", "lstrip": false}, "bos_token": null}"#,
        );
        let special = SpecialTokens::load(dir.path()).unwrap();
        assert_eq!(special.get("eos_token"), Some("</s>"));
        assert_eq!(special.get("pad_token"), Some("<pad>"));
        assert_eq!(special.get("bos_token"), None);
        write("config.json", r#"{"eos_token_id": 7}"#);
        write(
            "generation_config.json",
            r#"{"eos_token_id": [5, 7, -1, null]}"#,
        );
        assert_eq!(
            configured_ids(dir.path(), "eos_token_id").unwrap(),
            [5, 7, 7]
        );
        for id in ["\"x\"", "-2", "1.5", "4294967296", "[[1]]"] {
            let text = format!(r#"{{"eos_token_id": {id}}}"#);
            write("generation_config.json", &text);
            let error = configured_ids(dir.path(), "eos_token_id").unwrap_err();
            assert!(error.to_string().contains("eos_token_id is"), "{error}");
        }
    }

    #[test]
    fn files_that_are_not_what_they_should_be_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("has no tokenizer.json"), "{error}");
        std::fs::write(dir.path().join("tokenizer.json"), "{\"version\": 1").unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json: not a tokenizer"), "{error}");
        std::fs::write(dir.path().join("tokenizer_config.json"), "nothing").unwrap();
        let error = SpecialTokens::load(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("tokenizer_config.json: not valid JSON"),
            "{error}"
        );
    }
}
