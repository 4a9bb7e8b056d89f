//! The parts of a `tokenizer.json` around its model: what is done to text before and after it, as each make has it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::SentencePiece;
use super::make::Make;

/// What stands for a space in a piece.
const SPACE: &str = "\u{2581}";

impl SentencePiece {
    pub(super) fn normalizer(&self) -> Value {
        match self.make {
            Make::Llama => Value::Null,
            Make::Gemma => replace(json!({"String": " "}), SPACE),
            Make::Generic => json!({"type": "Sequence", "normalizers": self.normalizers()}),
        }
    }

    /// SentencePiece's own steps, in its order.
    fn normalizers(&self) -> Vec<Value> {
        let model = &self.model;
        let mut steps = Vec::new();
        if !model.charsmap.is_empty() {
            let charsmap = STANDARD.encode(&model.charsmap);
            steps.push(json!({"type": "Precompiled", "precompiled_charsmap": charsmap}));
        }
        if model.remove_extra_whitespaces {
            steps.push(replace(json!({"Regex": r"\A +| +\z"}), ""));
            steps.push(replace(json!({"Regex": " {2,}"}), " "));
        }
        if model.escape_whitespaces {
            steps.push(replace(json!({"String": " "}), SPACE));
        }
        if model.add_dummy_prefix && self.is_legacy() {
            // Metaspace puts none before a text that begins with one, and SentencePiece does.
            let begin = json!({"Regex": format!("\\A{SPACE}")});
            steps.push(replace(begin, &SPACE.repeat(2)));
        }
        steps
    }

    pub(super) fn pre_tokenizer(&self) -> Value {
        match self.make {
            Make::Llama => {
                let prefix = self.adds_prefix_space();
                metaspace(match (prefix, self.is_legacy()) {
                    (false, _) => "never",
                    (true, true) => "always",
                    (true, false) => "first",
                })
            }
            Make::Gemma => json!({
                "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false
            }),
            Make::Generic => self.generic_pre_tokenizer(),
        }
    }

    fn generic_pre_tokenizer(&self) -> Value {
        let mut steps = Vec::new();
        if self.model.add_dummy_prefix {
            let always = self.is_legacy();
            steps.push(metaspace(if always { "always" } else { "first" }));
        }
        let mut whole: Vec<&str> = self.user_defined().collect();
        // The longest first, where one begins as another does.
        whole.sort_by_key(|text| std::cmp::Reverse(text.chars().count()));
        if !whole.is_empty() {
            let pattern: Vec<String> = whole.into_iter().map(regex::escape).collect();
            steps.push(json!({
                "type": "Split", "pattern": {"Regex": pattern.join("|")}, "behavior": "Isolated", "invert": false
            }));
        }
        match steps.is_empty() {
            true => Value::Null,
            false => json!({"type": "Sequence", "pretokenizers": steps}),
        }
    }

    pub(super) fn decoder(&self) -> Value {
        let spaces = replace(json!({"String": SPACE}), " ");
        let [bytes, fuse] = ["ByteFallback", "Fuse"].map(|kind| json!({"type": kind}));
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let (has_bytes, has_prefix) = match self.make {
            Make::Llama => (true, self.adds_prefix_space()),
            Make::Gemma => (true, false),
            Make::Generic => (self.model.byte_fallback, self.model.add_dummy_prefix),
        };
        let mut steps = vec![spaces];
        if has_bytes {
            steps.push(bytes);
        }
        if has_bytes || has_prefix {
            steps.push(fuse);
        }
        if has_prefix {
            steps.push(strip);
        }
        json!({"type": "Sequence", "decoders": steps})
    }

    /// What is put around a text: the tokens for its beginning and its end, where the configuration asks for them.
    pub(super) fn post_processor(&self, id_of: &impl Fn(&str) -> Option<u32>) -> Value {
        let asked = |switch: &str, name: &str| {
            let token = self.special(name).filter(|_| self.switch(switch, false))?;
            Some((id_of(&token.text)?, token.text))
        };
        let begin = asked("add_bos_token", "bos_token");
        let end = asked("add_eos_token", "eos_token");
        let text = |sequence: &str, type_id: u32| {
            let special = |token: &Option<(u32, String)>| {
                let (_, text) = token.as_ref()?;
                Some(json!({"SpecialToken": {"id": text, "type_id": type_id}}))
            };
            let sequence = json!({"Sequence": {"id": sequence, "type_id": type_id}});
            [special(&begin), Some(sequence), special(&end)]
        };
        let single: Vec<Value> = text("A", 0).into_iter().flatten().collect();
        let pair: Vec<Value> = text("A", 0)
            .into_iter()
            .chain(text("B", 1))
            .flatten()
            .collect();
        let tokens: Map<String, Value> = [&begin, &end]
            .into_iter()
            .flatten()
            .map(|(id, text)| {
                let token = json!({"id": text, "ids": [id], "tokens": [text]});
                (text.clone(), token)
            })
            .collect();
        json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
    }

    /// Whether every part of a text between special tokens begins as a text does.
    fn is_legacy(&self) -> bool {
        self.switch("legacy", self.make == Make::Generic)
    }

    fn adds_prefix_space(&self) -> bool {
        self.beside.tokenizer_config["add_prefix_space"] != false
    }
}

fn replace(pattern: Value, content: &str) -> Value {
    json!({"type": "Replace", "pattern": pattern, "content": content})
}

fn metaspace(scheme: &str) -> Value {
    json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": false})
}
