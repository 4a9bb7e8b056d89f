//! The added tokens of a tokenizer: those that the model itself keeps from being divided, and those of the files beside it
//! (`TokenizersBackend.__init__` in `tokenization_utils_tokenizers.py`). What a file says of a token comes before what the
//! model says.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::SentencePiece;
use super::added_token::AddedToken;
use super::beside::SPECIAL_NAMES;
use super::declared::{DECODER, declared, extra};
use super::make::Make;
use super::model::Kind;

impl SentencePiece {
    /// The added tokens of a tokenizer, by rising ids.
    pub(super) fn added_tokens(&self) -> Result<Vec<(u32, AddedToken)>, String> {
        let mut all = Found::of(self);
        for (id, token) in declared(&self.beside)? {
            let token = match self.make {
                // Each part between them begins as a text does then.
                Make::Generic if self.model.add_dummy_prefix => token.in_raw_text(),
                _ => token,
            };
            all.declare(id, token)?;
        }
        for token in SPECIAL_NAMES.iter().filter_map(|name| self.special(name)) {
            // One that the vocabulary does not have is missed where it is needed.
            if self.ids.contains_key(&token.text) {
                all.add(token);
            }
        }
        let extra = extra(&self.beside)?;
        extra.tokens.into_iter().for_each(|token| all.add(token));
        if !extra.is_list {
            of_model(self).for_each(|token| all.add(token));
        }
        Ok(all.by_id.into_iter().collect())
    }
}

/// Added tokens by their ids.
struct Found<'a> {
    vocabulary: &'a HashMap<String, u32>,
    by_id: BTreeMap<u32, AddedToken>,
    texts: HashSet<String>,
}

impl<'a> Found<'a> {
    fn of(tokenizer: &'a SentencePiece) -> Self {
        Self {
            vocabulary: &tokenizer.ids,
            by_id: BTreeMap::new(),
            texts: HashSet::new(),
        }
    }

    /// The id that the vocabulary has for a text, or the one that follows.
    fn id_of(&self, text: &str) -> u32 {
        let next = || {
            let last = self.by_id.keys().next_back().map_or(0, |id| id + 1);
            last.max(self.vocabulary.len() as u32)
        };
        self.vocabulary.get(text).copied().unwrap_or_else(next)
    }

    fn declare(&mut self, id: u32, token: AddedToken) -> Result<(), String> {
        let found = self.id_of(&token.text);
        if found != id {
            return Err(format!(
                "gives the token {:?} the id {found}, but by {DECODER} or added_tokens.json beside it it has {id}; one of the files is of another tokenizer",
                token.text
            ));
        }
        self.add(token);
        Ok(())
    }

    fn add(&mut self, token: AddedToken) {
        if self.texts.insert(token.text.clone()) {
            let id = self.id_of(&token.text);
            self.by_id.insert(id, token);
        }
    }
}

/// The pieces that the model keeps whole.
fn of_model(tokenizer: &SentencePiece) -> impl Iterator<Item = AddedToken> {
    // The generic make keeps those of users whole while it divides a text.
    let is_added = |kind: Kind| match kind {
        Kind::Control => true,
        Kind::UserDefined => tokenizer.make != Make::Generic,
        _ => false,
    };
    let pieces = tokenizer.names.iter().zip(&tokenizer.model.pieces);
    let added = pieces.filter(move |(_, piece)| is_added(piece.kind));
    added.map(|(name, piece)| AddedToken::plain(name, piece.kind == Kind::Control).in_raw_text())
}
