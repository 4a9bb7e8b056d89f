//! The same tokens and offsets as the library's, for every pre-tokenizer that is known and texts of all kinds.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value as Json, json};
use tokenizers::Tokenizer;

use super::WordEncoder;
use crate::data::tokenize::Earlier;

const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

fn split(pattern: &str) -> Json {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn byte_level(use_regex: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn sequence(parts: &[Json]) -> Json {
    json!({"type": "Sequence", "pretokenizers": parts})
}

/// The pre-tokenizers of Qwen, Llama 3, GPT-4o, DeepSeek, GPT-2 and SmolLM.
fn known() -> Vec<Json> {
    let digits = json!({"type": "Digits", "individual_digits": true});
    let thirds = split(r"\p{N}{1,3}");
    let han = split("[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+");
    vec![
        sequence(&[split(QWEN), byte_level(false)]),
        sequence(&[split(LLAMA3), byte_level(false)]),
        sequence(&[split(O200K), byte_level(false)]),
        sequence(&[thirds, han, split(DEEPSEEK), byte_level(false)]),
        byte_level(true),
        sequence(&[digits, byte_level(true)]),
    ]
}

/// A tokenizer with English merges, and added tokens of all kinds that are known.
fn tokenizer(pre_tokenizer: &Json, change: impl FnOnce(&mut Json)) -> Tokenizer {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read(folder.join("tests/templates/tokenizer.json")).unwrap();
    let mut description: Json = serde_json::from_slice(&text).unwrap();
    description["pre_tokenizer"] = pre_tokenizer.clone();
    description["normalizer"] = json!({"type": "NFC"});
    description["post_processor"] = Json::Null;
    let added = |id: u32, content: &str, normalized: bool| {
        json!({"id": id, "content": content, "normalized": normalized, "special": !normalized,
               "single_word": false, "lstrip": false, "rstrip": false})
    };
    description["added_tokens"] = json!([
        added(0, "<|endoftext|>", false),
        added(90_001, "<think>", false),
        added(90_002, "<think>\n", false),
        added(90_003, "<t>", true),
        added(90_004, "  ", true),
    ]);
    change(&mut description);
    let mut tokenizer = Tokenizer::from_bytes(description.to_string()).unwrap();
    tokenizer.with_truncation(None).unwrap();
    tokenizer.with_padding(None);
    tokenizer
}

fn assert_same(tokenizer: &Tokenizer, encoder: &WordEncoder, text: &str) {
    let theirs = tokenizer.encode(text, false).unwrap();
    let Some(ours) = encoder.encode(tokenizer, text, None).unwrap() else {
        assert!(!super::is_nfc(text), "{text:?} was left to the library");
        return;
    };
    let offsets = theirs.get_offsets().iter().map(|(start, end)| *start..*end);
    assert_eq!(ours.ids, theirs.get_ids(), "{text:?}");
    assert_eq!(ours.offsets, offsets.collect::<Vec<_>>(), "{text:?}");
}

/// Pieces of text at which patterns decide, in any order.
const PIECES: [&str; 40] = [
    "a",
    "Z",
    "the",
    " the",
    "'s",
    "'LL",
    "'\u{17f}",
    "1",
    "42",
    " 7",
    "\u{b2}",
    "\u{664}",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\u{a0}",
    "\u{3000}",
    "\u{85}",
    "\u{200b}",
    "_",
    "!",
    "?!",
    " (",
    "\u{e9}",
    "e\u{301}",
    "\u{301}",
    "\u{65e5}\u{672c}",
    "\u{30ab}",
    "\u{1f980}",
    "\u{1f468}\u{200d}\u{1f469}",
    "\u{1c5}",
    "/",
    "<t>",
    "<think>",
    "<|endoftext|>",
    "\u{0}",
    "\u{ad}",
];

#[test]
fn the_words_of_known_pre_tokenizers_have_the_librarys_tokens() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(400)
    });
    let texts = proptest::collection::vec(0..PIECES.len(), 0..24);
    for pre_tokenizer in known() {
        let tokenizer = tokenizer(&pre_tokenizer, |_| {});
        let encoder = WordEncoder::of(&tokenizer).expect("a known tokenizer");
        let outcome = runner.run(&texts, |pieces| {
            let text: String = pieces.iter().map(|piece| PIECES[*piece]).collect();
            assert_same(&tokenizer, &encoder, &text);
            Ok(())
        });
        outcome.unwrap_or_else(|failure| panic!("{pre_tokenizer}: {failure}"));
    }
}

#[test]
fn any_text_has_the_librarys_tokens() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(300)
    });
    for pre_tokenizer in known() {
        let tokenizer = tokenizer(&pre_tokenizer, |_| {});
        let encoder = WordEncoder::of(&tokenizer).expect("a known tokenizer");
        let outcome = runner.run(&"\\PC{0,40}|[ \\t\\r\\na-c1.]{0,40}", |text| {
            assert_same(&tokenizer, &encoder, &text);
            Ok(())
        });
        outcome.unwrap_or_else(|failure| panic!("{pre_tokenizer}: {failure}"));
    }
}

#[test]
fn a_word_seen_again_after_the_memory_was_full_has_its_tokens() {
    let tokenizer = tokenizer(&known()[0], |_| {});
    let encoder = WordEncoder::of(&tokenizer).unwrap();
    let long = "x".repeat(200);
    for text in ["the river", &long, "the river", &long] {
        assert_same(&tokenizer, &encoder, text);
    }
    let many: String = (0..140_000)
        .map(|word| format!(" {}", letters(word)))
        .collect();
    let encoded = encoder.encode(&tokenizer, &many, None).unwrap().unwrap();
    assert_eq!(encoded.offsets.last().unwrap().end, many.len());
    assert_same(&tokenizer, &encoder, "the river");
}

fn letters(mut number: usize) -> String {
    let mut text = String::new();
    for _ in 0..5 {
        text.push(char::from(b'a' + (number % 26) as u8));
        number /= 26;
    }
    text
}

#[test]
fn tokenizers_with_other_parts_are_left_to_the_library() {
    let qwen = known().swap_remove(0);
    let is_known = |pre_tokenizer: &Json, change: &dyn Fn(&mut Json)| {
        WordEncoder::of(&tokenizer(pre_tokenizer, change)).is_some()
    };
    assert!(is_known(&qwen, &|_| {}));
    assert!(is_known(&qwen, &|it| it["normalizer"] = Json::Null));
    assert!(!is_known(&qwen, &|it| it["normalizer"] = json!({"type": "Lowercase"})));
    assert!(!is_known(&qwen, &|it| it["added_tokens"][1]["lstrip"] = json!(true)));
    assert!(!is_known(
        &qwen,
        &|it| it["added_tokens"][1]["single_word"] = json!(true)
    ));
    assert!(!is_known(&qwen, &|it| it["model"]["end_of_word_suffix"] =
        json!("</w>")));
    assert!(!is_known(&qwen, &|it| it["model"]["dropout"] = json!(0.5)));
    let others = [
        json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true}),
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        sequence(&[split(r"(?=x)y"), byte_level(false)]),
        sequence(&[split(r"\p{N}{1,3}+"), byte_level(false)]),
        sequence(&[
            json!({"type": "Punctuation", "behavior": "Isolated"}),
            byte_level(true),
        ]),
    ];
    for other in others {
        assert!(!is_known(&other, &|_| {}), "{other}");
    }
}

#[test]
fn a_text_that_begins_as_another_one_has_the_tokens_that_it_has_alone() {
    let tokenizer = tokenizer(&known()[0], |_| {});
    let encoder = WordEncoder::of(&tokenizer).unwrap();
    let alone = |text: &str| encoder.encode(&tokenizer, text, None).unwrap().unwrap();
    let long = "the river bends ".repeat(20);
    let texts = [
        format!("<|endoftext|>{long}<think>"),
        format!("<|endoftext|>{long}<think>\n{long}<|endoftext|>a"),
        format!("<|endoftext|>{long}<think>\n{long}<|endoftext|>ab"),
        format!("<|endoftext|>{long}<|endoftext|>{long}"),
        format!("{long}<t>{long}"),
        format!("{long}<t>{long}<t>\u{e9}\u{1f980}<t>"),
        format!("{long}<t>{long}<t>\u{e9}\u{1f981}<t>"),
        long.clone(),
        String::new(),
    ];
    let mut taken_over = 0;
    for earlier in &texts {
        let tokens = alone(earlier);
        // Tokens may have been taken off the end.
        for kept in [tokens.ids.len(), tokens.ids.len() / 2, 0] {
            let known = Earlier {
                text: earlier,
                ids: &tokens.ids[..kept],
                offsets: &tokens.offsets[..kept],
            };
            for text in &texts {
                let after = encoder.encode(&tokenizer, text, Some(known)).unwrap();
                assert_eq!(after, Some(alone(text)), "{earlier:?} {text:?}");
                let parts = encoder.added.divide(text);
                let mut encoded = crate::data::tokenize::Encoded::default();
                let known = encoder.known_parts(text, &parts, &known, &mut encoded);
                taken_over += usize::from(known.is_some_and(|known| known > 1));
            }
        }
    }
    assert!(taken_over > 10, "{taken_over}");
}

#[test]
fn words_are_told_apart_by_each_of_their_bytes_and_their_length() {
    let mut words: Vec<String> = (0..=18).map(|length| "a".repeat(length)).collect();
    for length in 1..=18 {
        for at in 0..length {
            let mut bytes = vec![b'a'; length];
            bytes[at] = b'b';
            words.push(String::from_utf8(bytes).unwrap());
        }
    }
    let mut remembered = super::cache::Words::default();
    for _ in 0..2 {
        for (id, word) in (0..).zip(&words) {
            let made = || Ok::<_, ()>(Some(vec![(id, word.len() as u32)]));
            let tokens = remembered.get(word, made).unwrap().unwrap();
            assert_eq!(tokens.iter().collect::<Vec<_>>(), [(id, word.len() as u32)]);
        }
    }
}
