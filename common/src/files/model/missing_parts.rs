//! Families that are refused although many ask for them, and what they have that is missing here.

/// What is missing of a family, by what the name of its class begins with.
const MISSING: [(&str, &str); 3] = [
    (
        "Llama4",
        "attention within chunks, norms of heads without weights, and experts chosen by a sigmoid",
    ),
    (
        "Deepseek",
        "latent attention, and experts chosen in groups by a sigmoid",
    ),
    (
        "GraniteMoeHybrid",
        "layers of a state space model (Mamba 2)",
    ),
];

/// A class that is refused, with what is missing where that is known.
pub(super) fn explained(class: &str) -> String {
    let missing = MISSING.iter().find(|(family, _)| class.starts_with(family));
    match missing {
        Some((_, parts)) => format!("{class} (missing here: {parts})"),
        None => class.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use crate::files::model::Architecture;

    #[test]
    fn what_is_missing_of_a_family_is_said() {
        let refused = |class: &str| {
            let config = json!({"architectures": [class]});
            let refused = Architecture::of_config(Path::new("config.json"), &config);
            refused.map_or_else(|error| error.to_string(), |_| String::new())
        };
        for class in ["Llama4ForCausalLM", "Llama4ForConditionalGeneration"] {
            let message = refused(class);
            let words = [class, "attention within chunks", "Gemma3ForCausalLM"];
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        }
        assert!(!refused("GPT2LMHeadModel").contains("missing"));
    }
}
