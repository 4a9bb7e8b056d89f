//! Tokens that the files beside `tokenizer.json` add to it or describe otherwise, taken as Transformers' AutoTokenizer
//! takes them (`tokenization_utils_base.py`, `tokenization_utils_tokenizers.py`): what they say wins, and new tokens get the
//! ids that follow.
//!
//! In: a tokenizer and its folder. Out: the tokenizer with those tokens, or an error where an id that a file gives is not
//! the one that the token has.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::Value as Json;
use tokenizers::{AddedToken, Tokenizer};

use super::tokenize::{SpecialTokens, TokenizerError, read_json};

const CONFIG: &str = "tokenizer_config.json";
const LEGACY: &str = "added_tokens.json";

/// Adds the tokens of the files beside `tokenizer.json`. Returns what changed, for the tokenizer's digest; empty where
/// `tokenizer.json` has all of them as they are.
pub(super) fn extend(
    tokenizer: &mut Tokenizer,
    model_dir: &Path,
    special: &SpecialTokens,
) -> Result<Vec<AddedToken>, TokenizerError> {
    let path = model_dir.join(CONFIG);
    let config = read(&path)?.unwrap_or_default();
    let (file, declared) = match &config["added_tokens_decoder"] {
        Json::Null => (
            model_dir.join(LEGACY),
            legacy(model_dir, tokenizer, special, &config)?,
        ),
        decoder => (path.clone(), decoder_tokens(&path, decoder)?),
    };
    let mut known: HashMap<String, AddedToken> = by_text(tokenizer);
    let mut tokens = Vec::new();
    let implied = named(tokenizer, special)
        .into_iter()
        .chain(extra(&path, &config)?);
    let implied = implied.map(|text| AddedToken::from(text, true));
    for (token, is_declared) in (declared.values().cloned().map(|token| (token, true)))
        .chain(implied.map(|token| (token, false)))
    {
        let changes = match known.get(&token.content) {
            Some(known) => is_declared && *known != token,
            None => true,
        };
        if changes {
            known.insert(token.content.clone(), token.clone());
            tokens.push(token);
        }
    }
    let failed = |error: tokenizers::Error| TokenizerError::Failed(error.to_string());
    tokenizer.add_tokens(tokens.clone()).map_err(failed)?;
    for (id, token) in &declared {
        if let Some(found) = tokenizer.token_to_id(&token.content)
            && found != *id
        {
            let reason = format!(
                "gives the token {:?} the id {id}, but by tokenizer.json it has {found}; one of the two files is of another tokenizer",
                token.content
            );
            return Err(TokenizerError::Unreadable { path: file, reason });
        }
    }
    Ok(tokens)
}

fn by_text(tokenizer: &Tokenizer) -> HashMap<String, AddedToken> {
    let known = tokenizer.get_added_tokens_decoder().into_values();
    known.map(|token| (token.content.clone(), token)).collect()
}

/// Tokens of `added_tokens_decoder`, by id.
fn decoder_tokens(
    path: &Path,
    decoder: &Json,
) -> Result<BTreeMap<u32, AddedToken>, TokenizerError> {
    let wrong = |reason: String| unreadable(path, format!("added_tokens_decoder {reason}"));
    let Some(entries) = decoder.as_object() else {
        return Err(wrong("is not an object".to_owned()));
    };
    let mut tokens = BTreeMap::new();
    for (id, token) in entries {
        let parsed = id.parse::<u32>().ok().zip(token_of(token));
        let Some((number, token)) = parsed else {
            return Err(wrong(format!(
                "has an entry {id:?} that is no id with a token"
            )));
        };
        tokens.insert(number, token);
    }
    Ok(tokens)
}

fn token_of(token: &Json) -> Option<AddedToken> {
    let flag = |name: &str| match &token[name] {
        Json::Null => Some(None),
        Json::Bool(set) => Some(Some(*set)),
        _ => None,
    };
    let content = token["content"].as_str().filter(|text| !text.is_empty())?;
    let special = flag("special")?.unwrap_or(false);
    let plain = AddedToken::from(content, special);
    let normalized = flag("normalized")?.unwrap_or(plain.normalized);
    Some(
        plain
            .single_word(flag("single_word")?.unwrap_or(false))
            .lstrip(flag("lstrip")?.unwrap_or(false))
            .rstrip(flag("rstrip")?.unwrap_or(false))
            .normalized(normalized),
    )
}

/// Tokens of `added_tokens.json` (text to id), which counts where the config has no list. What `tokenizer.json` says of a token
/// wins.
fn legacy(
    model_dir: &Path,
    tokenizer: &Tokenizer,
    special: &SpecialTokens,
    config: &Json,
) -> Result<BTreeMap<u32, AddedToken>, TokenizerError> {
    let path = model_dir.join(LEGACY);
    let Some(found) = read(&path)? else {
        return Ok(BTreeMap::new());
    };
    let Some(entries) = found.as_object() else {
        return Err(unreadable(&path, "is not an object".to_owned()));
    };
    let extra = extra(&model_dir.join(CONFIG), config)?;
    let known = by_text(tokenizer);
    let mut tokens = BTreeMap::new();
    for (text, id) in entries {
        let Some(id) = id.as_u64().and_then(|id| u32::try_from(id).ok()) else {
            return Err(unreadable(&path, format!("gives {text:?} no id")));
        };
        let is_special = special.named().any(|(_, named)| named == text) || extra.contains(text);
        let token = known.get(text).cloned();
        let token = token.unwrap_or_else(|| AddedToken::from(text.as_str(), is_special));
        tokens.insert(id, token);
    }
    Ok(tokens)
}

/// The named special tokens that the vocabulary has. Others are missed where they are needed.
fn named(tokenizer: &Tokenizer, special: &SpecialTokens) -> Vec<String> {
    let texts = special.named().map(|(_, text)| text);
    let in_vocabulary = texts.filter(|text| tokenizer.token_to_id(text).is_some());
    in_vocabulary.map(str::to_owned).collect()
}

/// Texts of `additional_special_tokens`, which Transformers 5 calls `extra_special_tokens`.
fn extra(path: &Path, config: &Json) -> Result<Vec<String>, TokenizerError> {
    let mut texts = Vec::new();
    for field in ["additional_special_tokens", "extra_special_tokens"] {
        let tokens: Vec<&Json> = match &config[field] {
            Json::Null => Vec::new(),
            Json::Array(tokens) => tokens.iter().collect(),
            Json::Object(tokens) => tokens.values().collect(),
            other => {
                return Err(unreadable(
                    path,
                    format!("{field} is {other}, not a list of tokens"),
                ));
            }
        };
        for token in tokens {
            match token.as_str().or(token["content"].as_str()) {
                Some(text) => texts.push(text.to_owned()),
                None => {
                    return Err(unreadable(
                        path,
                        format!("{field} has {token}, which is no token"),
                    ));
                }
            }
        }
    }
    texts.retain(|text| !text.is_empty());
    Ok(texts)
}

fn read(path: &Path) -> Result<Option<Json>, TokenizerError> {
    read_json(path).map_err(|reason| unreadable(path, reason))
}

fn unreadable(path: &Path, reason: String) -> TokenizerError {
    TokenizerError::Unreadable {
        path: path.to_owned(),
        reason,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::super::tokenize::Tokenizer as ModelTokenizer;
    use super::*;

    /// Six letters, and `<s>`; ids 0 to 6.
    fn folder(files: &[(&str, Json)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let letters = ["<", "n", ">", "a", " ", "s", "<s>"];
        let vocab: serde_json::Map<String, Json> = letters
            .iter()
            .enumerate()
            .map(|(id, letter)| (letter.to_string(), id.into()))
            .collect();
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}
        });
        let all = [("tokenizer.json", tokenizer)];
        for (name, content) in all.iter().chain(files) {
            std::fs::write(dir.path().join(name), content.to_string()).unwrap();
        }
        dir
    }

    fn load(files: &[(&str, Json)]) -> Result<ModelTokenizer, String> {
        ModelTokenizer::load(folder(files).path()).map_err(|error| error.to_string())
    }

    fn ids(files: &[(&str, Json)], text: &str) -> Vec<u32> {
        load(files).unwrap().encode(text, false).unwrap().ids
    }

    fn declared(id: &str, content: &str, special: bool) -> (&'static str, Json) {
        let token = json!({"content": content, "special": special});
        (CONFIG, json!({"added_tokens_decoder": {id: token}}))
    }

    #[test]
    fn a_token_that_only_the_config_has_is_one_token() {
        assert_eq!(ids(&[], "a <n>"), [3, 4, 0, 1, 2]);
        let files = [declared("7", "<n>", true)];
        assert_eq!(ids(&files, "a <n>"), [3, 4, 7]);
        let tokenizer = load(&files).unwrap();
        assert!(tokenizer.special_ids().contains(&7));
        assert_eq!(tokenizer.id_bound(), 8);
        let plain = load(&[declared("7", "<n>", false)]).unwrap();
        assert!(!plain.special_ids().contains(&7));
        assert_ne!(tokenizer.digest(), plain.digest());
    }

    #[test]
    fn what_adds_nothing_leaves_the_digest_as_it_was() {
        let files = [(CONFIG, json!({"added_tokens_decoder": {}}))];
        assert_eq!(load(&files).unwrap().digest(), load(&[]).unwrap().digest());
    }

    #[test]
    fn a_token_of_the_vocabulary_may_become_a_special_one() {
        assert_eq!(ids(&[], "<s>"), [0, 5, 2]);
        assert_eq!(ids(&[declared("6", "<s>", true)], "<s>"), [6]);
        assert_eq!(ids(&[(CONFIG, json!({"bos_token": "<s>"}))], "<s>"), [6]);
    }

    #[test]
    fn special_tokens_without_ids_follow_the_vocabulary() {
        for field in ["additional_special_tokens", "extra_special_tokens"] {
            let files = [(CONFIG, json!({field: ["<n>", {"content": "<a>"}]}))];
            assert_eq!(ids(&files, "<a><n>"), [8, 7]);
        }
    }

    #[test]
    fn the_older_file_counts_where_the_config_has_no_list() {
        let files = [(LEGACY, json!({"<n>": 7}))];
        assert_eq!(ids(&files, "a<n>"), [3, 7]);
        let both = [(LEGACY, json!({"<n>": 7})), declared("7", "<a>", true)];
        assert_eq!(ids(&both, "<n><a>"), [0, 1, 2, 7]);
    }

    #[test]
    fn an_id_that_the_token_does_not_get_is_refused() {
        for (files, words) in [
            ([declared("9", "<n>", true)], ["\"<n>\"", "id 9", "has 7"]),
            ([declared("2", "<s>", true)], ["\"<s>\"", "id 2", "has 6"]),
            (
                [(LEGACY, json!({"<n>": 3}))],
                ["\"<n>\"", "id 3", "added_tokens.json"],
            ),
            (
                [declared("x", "<n>", true)],
                ["added_tokens_decoder", "\"x\"", CONFIG],
            ),
            (
                [(CONFIG, json!({"added_tokens_decoder": {"7": "<n>"}}))],
                ["added_tokens_decoder", "\"7\"", CONFIG],
            ),
            (
                [(CONFIG, json!({"extra_special_tokens": 3}))],
                ["extra_special_tokens", "3", CONFIG],
            ),
        ] {
            let message = load(&files).unwrap_err();
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        }
    }
}
