//! Which tokenizer Transformers makes of a `tokenizer.model`, by the class that the files name and the kind of model
//! (`AutoTokenizer.from_pretrained`, `TOKENIZER_MAPPING_NAMES` in `tokenization_auto.py`).

use super::beside::{Beside, CONVERT};
use super::model::Model;

/// The class that takes every part of a tokenizer from its `tokenizer.json`, by the name that all versions know.
pub(super) const ANY_CLASS: &str = "PreTrainedTokenizerFast";

/// How the parts of a tokenizer are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Make {
    Llama,
    Gemma,
    /// By what the model itself says.
    Generic,
}

/// Kinds of models whose tokenizers are generic, whatever class is named.
const GENERIC: [&str; 8] = [
    "glm", "glm4", "granite", "mistral", "olmo2", "olmo3", "phi3", "qwen2",
];

/// Kinds of models whose tokenizers are Gemma's where no class is named.
const GEMMA: [&str; 2] = ["gemma2", "gemma3_text"];

/// Classes of Transformers that make something else of their models, without `Tokenizer` at the end.
const OTHERS: [&str; 25] = [
    "Albert",
    "Barthez",
    "BertGeneration",
    "BigBird",
    "Camembert",
    "CodeLlama",
    "Cpm",
    "DebertaV2",
    "FNet",
    "GPTSw3",
    "M2M100",
    "MBart",
    "MBart50",
    "MLuke",
    "Marian",
    "Nllb",
    "Pegasus",
    "Reformer",
    "RemBert",
    "SeamlessM4T",
    "Siglip",
    "T5",
    "XGLM",
    "XLMRoberta",
    "XLNet",
];

impl Make {
    pub fn of(model: &Model, beside: &Beside) -> Result<Self, String> {
        let named = [&beside.tokenizer_config, &beside.config]
            .into_iter()
            .find_map(|file| file["tokenizer_class"].as_str());
        let class = named.map(|class| class.strip_suffix("Fast").unwrap_or(class));
        let kind = beside.config["model_type"].as_str().unwrap_or_default();
        let make = match class {
            _ if GENERIC.contains(&kind) => Self::Generic,
            None if GEMMA.contains(&kind) => Self::Gemma,
            Some("LlamaTokenizer") => Self::Llama,
            Some("GemmaTokenizer") => Self::Gemma,
            Some(class) if is_other(class) => {
                return Err(format!(
                    "belongs to a {class}, which is not made of it here: {CONVERT}"
                ));
            }
            _ => Self::Generic,
        };
        // Those classes are of BPE that knows every byte. Of another model they would make one whose tokens its weights were
        // not trained with, and leave characters out.
        let is_theirs = !model.is_unigram && model.has_all_bytes();
        Ok(if is_theirs { make } else { Self::Generic })
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaTokenizer",
            Self::Gemma => "GemmaTokenizer",
            Self::Generic => "generic converter",
        }
    }
}

fn is_other(class: &str) -> bool {
    let base = class.strip_suffix("Tokenizer");
    base.is_some_and(|base| OTHERS.contains(&base))
}

/// The special token that `LlamaTokenizer` has where no file says otherwise.
pub(super) fn llama_default(name: &str) -> Option<&'static str> {
    match name {
        "bos_token" => Some("<s>"),
        "eos_token" => Some("</s>"),
        "unk_token" => Some("<unk>"),
        _ => None,
    }
}

/// The special token that `GemmaTokenizer` has where no file says otherwise.
pub(super) fn gemma_default(name: &str) -> Option<&'static str> {
    match name {
        "bos_token" => Some("<bos>"),
        "eos_token" => Some("<eos>"),
        "unk_token" => Some("<unk>"),
        "pad_token" => Some("<pad>"),
        "mask_token" => Some("<mask>"),
        _ => None,
    }
}
