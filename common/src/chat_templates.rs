//! Chat templates by name, for models that have none or speak another one.
//!
//! Enters: a name, as Axolotl or LLaMA-Factory has it. Leaves: the template's text, in Jinja. Each text is our own and
//! renders what the template of that name renders there (`common/tests/named_templates/`).

macro_rules! templates {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("chat_templates/", $name, ".jinja")))),*]
    };
}

const TEMPLATES: &[(&str, &str)] = templates![
    "alpaca",
    "chatml",
    "cohere",
    "command_a",
    "command_a_rag",
    "command_a_tool_use",
    "deepseek_v2",
    "deepseek_v3",
    "exaone",
    "exaone4",
    "falcon",
    "falcon_h1",
    "gemma",
    "gemma3",
    "gemma3n",
    "gemma4",
    "granite",
    "jamba",
    "llama2",
    "llama3",
    "llama3_2_vision",
    "llama4",
    "llava",
    "metharme",
    "mistral_v1",
    "mistral_v2v3",
    "mistral_v3_tekken",
    "mistral_v7_tekken",
    "nemotron_h",
    "olmo",
    "phi_3",
    "phi_35",
    "phi_4",
    "pixtral",
    "qwen2_vl",
    "qwen3",
    "qwen3_5",
    "qwen_25",
    "smollm",
    "vicuna",
    "zephyr",
];

/// Texts of LLaMA-Factory's names that write conversations otherwise than the template of that name does elsewhere.
const OF_LLAMA_FACTORY: &[(&str, &str)] = templates![
    "llamafactory/alpaca",
    "llamafactory/deepseek",
    "llamafactory/deepseekr1",
    "llamafactory/default",
    "llamafactory/falcon",
    "llamafactory/gemma2",
    "llamafactory/granite4",
    "llamafactory/llama2",
    "llamafactory/mimo",
    "llamafactory/ministral",
    "llamafactory/mistral",
    "llamafactory/mistral_small",
    "llamafactory/olmo",
    "llamafactory/phi4",
    "llamafactory/qwen3",
    "llamafactory/smollm2",
    "llamafactory/vicuna",
    "llamafactory/zephyr",
];

/// Other names of the same texts.
const ALIASES: &[(&str, &str)] = &[("aya", "cohere"), ("gemma4_unified", "gemma4")];

/// LLaMA-Factory's names of templates (`template.py`, 0.9.5), and ours of the text that writes the same.
const LLAMA_FACTORY: &[(&str, &str)] = &[
    ("alpaca", "llamafactory/alpaca"),
    ("chatml", "chatml"),
    ("cohere", "cohere"),
    ("deepseek", "llamafactory/deepseek"),
    ("deepseek3", "deepseek_v3"),
    ("deepseekr1", "llamafactory/deepseekr1"),
    ("default", "llamafactory/default"),
    ("falcon", "llamafactory/falcon"),
    ("falcon_h1", "falcon_h1"),
    ("gemma", "gemma3"),
    ("gemma2", "llamafactory/gemma2"),
    ("gemma3", "gemma3"),
    ("gemma3n", "gemma3n"),
    ("granite3", "granite"),
    ("granite4", "llamafactory/granite4"),
    ("llama2", "llamafactory/llama2"),
    ("llama3", "llama3"),
    ("llama4", "llama4"),
    ("mimo", "llamafactory/mimo"),
    ("ministral", "llamafactory/ministral"),
    ("mistral", "llamafactory/mistral"),
    ("mistral_small", "llamafactory/mistral_small"),
    ("mllama", "llama3"),
    ("olmo", "llamafactory/olmo"),
    ("phi", "phi_35"),
    ("phi4", "llamafactory/phi4"),
    ("qwen", "qwen_25"),
    ("qwen2_audio", "qwen2_vl"),
    ("qwen2_omni", "qwen2_vl"),
    ("qwen2_vl", "qwen2_vl"),
    ("qwen3", "llamafactory/qwen3"),
    ("qwen3_5", "llamafactory/qwen3"),
    ("qwen3_5_nothink", "chatml"),
    ("qwen3_6", "llamafactory/qwen3"),
    ("qwen3_nothink", "chatml"),
    ("qwen3_omni", "llamafactory/qwen3"),
    ("qwen3_omni_nothink", "chatml"),
    ("qwen3_vl", "llamafactory/qwen3"),
    ("qwen3_vl_nothink", "chatml"),
    ("smollm", "chatml"),
    ("smollm2", "llamafactory/smollm2"),
    ("vicuna", "llamafactory/vicuna"),
    ("yi", "chatml"),
    ("zephyr", "llamafactory/zephyr"),
];

/// The text of the template with this name.
pub fn find(name: &str) -> Option<&'static str> {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name);
    let name = alias.map_or(name, |(_, name)| name);
    let mut all = TEMPLATES.iter().chain(OF_LLAMA_FACTORY);
    all.find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// The names that a job may give, without aliases.
pub fn names() -> impl Iterator<Item = &'static str> {
    TEMPLATES.iter().map(|(name, _)| *name)
}

/// Our name of a template that LLaMA-Factory calls so.
pub fn of_llama_factory(name: &str) -> Option<&'static str> {
    let found = LLAMA_FACTORY.iter().find(|(theirs, _)| *theirs == name);
    found.map(|(_, ours)| *ours)
}

/// LLaMA-Factory's names that are known.
pub fn names_of_llama_factory() -> impl Iterator<Item = &'static str> {
    LLAMA_FACTORY.iter().map(|(theirs, _)| *theirs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_text() {
        let theirs = names_of_llama_factory().filter_map(of_llama_factory);
        let aliases = ALIASES.iter().map(|(_, name)| *name);
        for name in names().chain(aliases).chain(theirs) {
            assert!(find(name).is_some(), "{name}");
        }
    }
}
