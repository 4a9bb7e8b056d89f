//! Merges of BPE, which SentencePiece does not keep: every piece is made of two others wherever those are pieces, too.

use super::SentencePiece;
use super::model::Kind;

/// Two pieces that become one.
pub(super) type Merge<'a> = [&'a str; 2];

impl SentencePiece {
    /// Merges by rising ids of what they make (`generate_merges` in `tokenization_utils_base.py`).
    pub(super) fn merges_by_id(&self) -> Vec<Merge<'_>> {
        let all = self.names.iter();
        let is_piece = |text: &str| self.ids.contains_key(text);
        all.flat_map(|name| halves(name, &is_piece)).collect()
    }

    /// Merges by falling scores of what they make; only normal pieces take part (`build_tokenizer_from_spm_proto` in
    /// `convert_slow_self.py`).
    pub(super) fn merges_by_score(&self) -> Vec<Merge<'_>> {
        let pieces = &self.model.pieces;
        let is_normal = |text: &str| {
            let id = self.ids.get(text);
            id.is_some_and(|id| pieces[*id as usize].kind == Kind::Normal)
        };
        let mut made: Vec<(usize, &String)> = self.names.iter().enumerate().collect();
        made.retain(|(id, _)| pieces[*id].kind == Kind::Normal);
        // Equal scores stay in the order of their ids. Zeros of both signs are equal.
        made.sort_by(|(a, _), (b, _)| {
            let score = |id: usize| pieces[id].score + 0.0;
            score(*b).total_cmp(&score(*a))
        });
        let merges = made.into_iter().flat_map(|(_, name)| {
            let mut merges: Vec<Merge> = halves(name, &is_normal).collect();
            merges.sort_unstable();
            merges
        });
        merges.collect()
    }
}

/// The ways to make a text of two pieces, by rising lengths of the first.
fn halves<'a>(text: &'a str, is_piece: &impl Fn(&str) -> bool) -> impl Iterator<Item = Merge<'a>> {
    let places = text.char_indices().skip(1);
    let both = places.map(|(at, _)| <[&str; 2]>::from(text.split_at(at)));
    both.filter(|both| both.iter().all(|half| is_piece(half)))
}
