//! Gives added tokens other texts: those that a tokenizer has in reserve become what a job needs.

use std::collections::BTreeMap;

use tokenizers::AddedToken;

use super::{Tokenizer, TokenizerError};
use crate::files::model::rename_tokens;

impl Tokenizer {
    /// Gives added tokens other texts, by their ids. Those that have theirs already stay as they are.
    pub fn rename_tokens(&mut self, texts: &BTreeMap<u32, String>) -> Result<(), TokenizerError> {
        let added = self.inner.get_added_tokens_decoder();
        let added: BTreeMap<u32, AddedToken> = added.into_iter().collect();
        let has_text = |id: &u32, text: &String| added.get(id).is_some_and(|t| t.content == *text);
        let mut texts = texts.clone();
        texts.retain(|id, text| !has_text(id, text));
        if texts.is_empty() {
            return Ok(());
        }
        self.check_renaming(&added, &texts)
            .map_err(TokenizerError::NotRenamed)?;
        let failed = |error: String| {
            TokenizerError::NotRenamed(format!(
                "the tokenizer cannot do without the texts as they were: {error}"
            ))
        };
        let text = self.inner.to_string(false);
        let text = text.map_err(|error| failed(error.to_string()))?;
        let json = serde_json::from_str(&text);
        let mut json: serde_json::Value = json.map_err(|error| failed(error.to_string()))?;
        rename_tokens(&mut json, &texts);
        let inner = tokenizers::Tokenizer::from_bytes(json.to_string());
        self.inner = inner.map_err(|error| failed(error.to_string()))?;
        let renamed = texts.into_iter().filter_map(|(id, content)| {
            let token = added.get(&id)?.clone();
            Some(AddedToken { content, ..token })
        });
        self.added.extend(renamed);
        self.follow_tokens()
    }

    fn check_renaming(
        &self,
        added: &BTreeMap<u32, AddedToken>,
        texts: &BTreeMap<u32, String>,
    ) -> Result<(), String> {
        let mut ids = BTreeMap::new();
        for (id, text) in texts {
            let Some(token) = added.get(id) else {
                return Err(format!(
                    "{id} is the id of no added token: take one of those that tokenizer.json lists under added_tokens"
                ));
            };
            let mut named = self.special.named();
            if let Some((name, _)) = named.find(|(_, named)| *named == token.content) {
                return Err(format!(
                    "{id} is the {name} of this tokenizer, {:?}: take one that it has in reserve",
                    token.content
                ));
            }
            let other = self.inner.token_to_id(text).filter(|other| other != id);
            if let Some(other) = other.or(ids.insert(text, *id)) {
                return Err(format!(
                    "{id} cannot be {text:?}, which is the token {other}: use that one"
                ));
            }
        }
        Ok(())
    }

    /// Whether another tokenizer has other texts for some of the added tokens that are here.
    pub fn is_renamed_in(&self, other: &Self) -> bool {
        let others = other.inner.get_added_tokens_decoder();
        let own = self.inner.get_added_tokens_decoder().into_iter();
        let mut pairs = own.filter_map(|(id, token)| Some((others.get(&id)?, token)));
        pairs.any(|(other, own)| other.content != own.content)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-qwen3")
    }

    /// The tokenizer with two tokens in reserve; the id of the first.
    fn tokenizer() -> (Tokenizer, u32) {
        let mut tokenizer = Tokenizer::load(&folder()).unwrap();
        let reserve = ["<|reserved_0|>", "<|reserved_1|>"].map(|text| crate::job::NewToken {
            text: text.to_owned(),
            is_special: true,
            id: None,
        });
        let added = tokenizer.add_tokens(&reserve).unwrap();
        (tokenizer, added[0].id.unwrap())
    }

    #[test]
    fn a_renamed_token_is_that_text_and_no_longer_the_other() {
        let (mut tokenizer, id) = tokenizer();
        let (before, digest) = (
            tokenizer.encode("hello hello", false).unwrap(),
            tokenizer.digest(),
        );
        let texts = BTreeMap::from([(id, "<step>".to_owned())]);
        tokenizer.rename_tokens(&texts).unwrap();
        assert_eq!(tokenizer.encode("<step>", false).unwrap().ids, [id]);
        assert!(tokenizer.encode("<|reserved_0|>", false).unwrap().ids.len() > 1);
        assert_eq!(
            tokenizer.encode("<|reserved_1|>", false).unwrap().ids,
            [id + 1]
        );
        assert_eq!(tokenizer.decode(&[id]).unwrap(), "<step>");
        assert_eq!(tokenizer.encode("hello hello", false).unwrap(), before);
        assert!(tokenizer.special_ids().contains(&id));
        let renamed = tokenizer.digest();
        assert_ne!(renamed, digest);
        tokenizer.rename_tokens(&texts).unwrap();
        assert_eq!(tokenizer.digest(), renamed);
        assert!(self::tokenizer().0.is_renamed_in(&tokenizer));
        assert!(!tokenizer.is_renamed_in(&tokenizer));
    }

    #[test]
    fn what_cannot_be_renamed_is_refused() {
        let (mut tokenizer, id) = tokenizer();
        let eos = tokenizer.eos_id().unwrap();
        let text = |text: &str| text.to_owned();
        for (texts, words) in [
            (
                vec![(1_000_000, text("<a>"))],
                "1000000 is the id of no added token",
            ),
            (vec![(9, text("<a>"))], "9 is the id of no added token"),
            (
                vec![(eos, text("<a>"))],
                "is the eos_token of this tokenizer",
            ),
            (vec![(id, text("<|im_end|>"))], "which is the token"),
            (
                vec![(id, text("<a>")), (id + 1, text("<a>"))],
                "which is the token",
            ),
        ] {
            let error = tokenizer.rename_tokens(&texts.into_iter().collect());
            let error = error.unwrap_err().to_string();
            assert!(error.starts_with("added_tokens_overrides: "), "{error}");
            assert!(error.contains(words), "{error}");
        }
    }
}
