//! Long texts in pieces, each tokenised alone: a tokenizer takes 150 bytes of memory for each byte that it is given.
//!
//! Enters: a text. Leaves: where it can be divided so that the tokens stay the same, or that it cannot. Only texts that a
//! pre-tokenizer divides into words are, since no token reaches over the end of a word.

use tokenizers::Tokenizer;

/// Longest text that is tokenised at once, in bytes. Shorter ones take at most some 80 MB.
const MAX_WHOLE_BYTES: usize = 512 << 10;

/// Size of a piece, in bytes.
const PIECE_BYTES: usize = 256 << 10;

/// Bytes around a place where a text may be divided that are tokenised to look at the tokens there.
const WINDOW_BYTES: usize = 1 << 10;

/// Most places that are looked at for one end of a piece.
const MAX_ATTEMPTS: usize = 64;

/// Longest text that is tokenised at once where it cannot be divided, in bytes: about a gigabyte of memory.
const MAX_UNDIVIDED_BYTES: usize = 8 << 20;

/// The text in pieces, in order. None where it need not or cannot be divided.
pub(super) fn divide<'a>(
    tokenizer: &Tokenizer,
    text: &'a str,
) -> Result<Option<Vec<&'a str>>, String> {
    if text.len() <= MAX_WHOLE_BYTES {
        return Ok(None);
    }
    let mut pieces = Vec::new();
    let mut rest = text;
    while rest.len() > MAX_WHOLE_BYTES {
        let Some(end) = end_of_piece(tokenizer, rest)? else {
            break;
        };
        let (piece, more) = rest.split_at(end);
        pieces.push(piece);
        rest = more;
    }
    if rest.len() > MAX_UNDIVIDED_BYTES {
        return Err(format!(
            "a text of {} bytes without a line end or a word's at which it could be divided is too long for this tokenizer: divide it into several rows",
            rest.len()
        ));
    }
    if pieces.is_empty() {
        return Ok(None);
    }
    pieces.push(rest);
    Ok(Some(pieces))
}

/// Where a piece may end: between a line end and a letter or digit, or before the space of a word, where the tokens of
/// both sides alone are those of both together.
fn end_of_piece(tokenizer: &Tokenizer, text: &str) -> Result<Option<usize>, String> {
    if tokenizer.get_pre_tokenizer().is_none() {
        return Ok(None);
    }
    let bytes = text.as_bytes();
    let is_word = |at: usize| bytes[at].is_ascii_alphanumeric();
    let places = (PIECE_BYTES / 2..PIECE_BYTES).rev();
    let after_line = |at: &usize| bytes[at - 1] == b'\n' && is_word(*at);
    let before_word = |at: &usize| bytes[*at] == b' ' && is_word(at - 1) && is_word(at + 1);
    let places = places
        .clone()
        .filter(after_line)
        .take(MAX_ATTEMPTS / 2)
        .chain(places.filter(before_word).take(MAX_ATTEMPTS / 2));
    for place in places {
        if is_safe(tokenizer, text, place)? {
            return Ok(Some(place));
        }
    }
    Ok(None)
}

/// Whether the tokens around this place do not depend on what is on its other side.
fn is_safe(tokenizer: &Tokenizer, text: &str, place: usize) -> Result<bool, String> {
    let (mut start, mut end) = (place - WINDOW_BYTES, place + WINDOW_BYTES);
    while !text.is_char_boundary(start) {
        start -= 1;
    }
    while !text.is_char_boundary(end) {
        end += 1;
    }
    let ids = |text: &str| {
        let encoded = tokenizer.encode(text, false);
        let ids = encoded.map(|encoded| encoded.get_ids().to_vec());
        ids.map_err(|error| error.to_string())
    };
    let apart = [ids(&text[start..place])?, ids(&text[place..end])?].concat();
    Ok(apart == ids(&text[start..end])?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tokenizer(path: &str) -> Tokenizer {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut tokenizer = Tokenizer::from_file(folder.join(path)).unwrap();
        tokenizer.with_truncation(None).unwrap();
        tokenizer.with_padding(None);
        tokenizer.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        tokenizer
    }

    #[test]
    fn a_text_in_pieces_has_the_tokens_of_the_whole() {
        let lines = "The river's 1234 bends\n\n  hello hello \u{e9}\u{1f980}\nok, 12 more.  \n";
        let words = "hello hellos don't 42 \u{65e5}\u{672c} ";
        for path in [
            "tests/templates/tokenizer.json",
            "../examples/tiny-qwen3/tokenizer.json",
        ] {
            let tokenizer = tokenizer(path);
            let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
            for part in [lines, words] {
                let text = part.repeat(MAX_WHOLE_BYTES / part.len() + 100);
                let pieces = divide(&tokenizer, &text).unwrap().unwrap();
                assert!(pieces.len() > 1);
                assert_eq!(pieces.concat(), text);
                let apart: Vec<u32> = pieces.iter().flat_map(|piece| ids(piece)).collect();
                assert!(apart == ids(&text), "{path}: {part}");
            }
            assert_eq!(divide(&tokenizer, lines), Ok(None));
        }
    }

    #[test]
    fn a_text_that_cannot_be_divided_has_a_bound() {
        let tokenizer = tokenizer("tests/templates/tokenizer.json");
        let text = "a".repeat(MAX_WHOLE_BYTES + 1);
        assert_eq!(divide(&tokenizer, &text), Ok(None));
        let text = "a".repeat(MAX_UNDIVIDED_BYTES + 1);
        let reason = divide(&tokenizer, &text).unwrap_err();
        assert!(reason.contains("divide it into several rows"), "{reason}");
    }
}
