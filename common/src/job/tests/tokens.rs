//! Tokens that a job adds, and what it trains of the embedding and the output layer beside an adapter.

use super::*;
use crate::job::{NewToken, TrainedRows, TrainedTokens};

fn token(text: &str, is_special: bool) -> NewToken {
    NewToken {
        text: text.to_owned(),
        is_special,
        id: None,
    }
}

fn trained(text: &str) -> TrainedTokens {
    match job(&format!("adapter: lora\n{text}")).method {
        Method::Lora(lora) => lora.tokens,
        Method::Full => panic!("an adapter was asked for"),
    }
}

#[test]
fn tokens_are_added_in_the_order_of_axolotl_and_each_once() {
    let read = job(
        "tokens: [<a>, <c>, <a>]\nadd_special_tokens: <b>\nspecial_tokens:\n  eos_token: <end>\n  additional_special_tokens: [<c>, <d>]\n",
    );
    let expected = [
        token("<end>", true),
        token("<c>", true),
        token("<d>", true),
        token("<a>", false),
        token("<b>", true),
    ];
    assert_eq!(read.tokens, expected);
    assert_eq!(job("eos_token: <end>\n").tokens, []);
    for two in ["<a>,<b>", "'<a>,<b>'", "['<a>', ' ']"] {
        assert_eq!(
            job(&format!("add_tokens: {two}\n")).tokens.len(),
            2,
            "{two}"
        );
    }
}

#[test]
fn tokens_get_other_texts_by_their_ids() {
    let read = job("added_tokens_overrides: {128041: <a>, 7: '8'}\n");
    let expected = [(7, "8"), (128_041, "<a>")].map(|(id, text)| (id, text.to_owned()));
    assert_eq!(read.added_tokens_overrides, expected.into());
    assert_ne!(read.digest(), job("").digest());
    let again = job("added_tokens_overrides: {7: '9', 128041: <a>}\n");
    assert_ne!(read.digest(), again.digest());
}

#[test]
fn how_a_tokenizer_is_loaded_is_what_its_files_say() {
    let read =
        job("tokenizer_type: LlamaTokenizer\ntokenizer_use_fast: false\ntokenizer_legacy: false\n");
    let told = "tokenizer_legacy: tokenizer.json has it built in; one that is made from a tokenizer.model follows `legacy` of tokenizer_config.json";
    assert!(
        read.reading.notices.iter().any(|line| line == told),
        "{:?}",
        read.reading.notices
    );
}

#[test]
fn rows_are_trained_in_the_order_in_which_they_are_named() {
    let these = |ids: &[u32]| TrainedRows::These(ids.to_vec());
    let both = |embedding, head| TrainedTokens { embedding, head };
    let read = trained("trainable_token_indices: [7, 2, 7]\n");
    assert_eq!(read, both(these(&[7, 2]), these(&[])));
    let read = trained("peft_trainable_token_indices: {model.embed_tokens: [7], lm_head: [3]}\n");
    assert_eq!(read, both(these(&[7]), these(&[3])));
    let read = trained("lora_modules_to_save: [lm_head]\ntrainable_token_indices: 4, 5\n");
    assert_eq!(read, both(these(&[4, 5]), TrainedRows::All));
    assert!(trained("lora_modules_to_save: []\n").is_none());
}

#[test]
fn what_cannot_be_trained_so_is_refused() {
    for (text, expected) in [
        (
            "adapter: lora\nlora_modules_to_save: [norm]\n",
            "4: `lora_modules_to_save` names `norm`; what is trained as a whole beside adapters is embed_tokens or lm_head: remove it",
        ),
        (
            "adapter: lora\ntrainable_token_indices: {wte: [1]}\n",
            "4: `trainable_token_indices` has `wte`; rows are trained of embed_tokens and lm_head",
        ),
        (
            "adapter: lora\ntrainable_token_indices: [-1]\n",
            "4: `trainable_token_indices` has `-1`, which is no id of a token",
        ),
        (
            "trainable_token_indices: [1]\n",
            "3: `trainable_token_indices` has no effect without `adapter: lora`",
        ),
        (
            "tokens: {eos_token: </s>}\n",
            "3: `tokens` is a mapping, and names no tokens to add; bos_token, eos_token and their like belong under special_tokens",
        ),
        (
            "tokens: [<a>, '']\n",
            "3: `tokens` must be a list of texts, none of them empty, found a list",
        ),
        (
            "processor_type: AutoProcessor\n",
            "3: `processor_type` is not supported: a processor reads pictures or sound, and only text is trained; remove it",
        ),
        (
            "added_tokens_overrides: {x: <a>}\n",
            "3: `added_tokens_overrides` has an entry `x` that is no id of a token with a text",
        ),
        (
            "added_tokens_overrides: {7: ''}\n",
            "3: `added_tokens_overrides` has an entry `7` that is no id of a token with a text",
        ),
        (
            "added_tokens_overrides: [<a>]\n",
            "3: `added_tokens_overrides` must be a mapping of the ids of tokens to their texts, found a list",
        ),
    ] {
        assert_eq!(problems_of(text), [expected]);
    }
}
