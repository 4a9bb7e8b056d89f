//! The job with the tokens that it adds: which rows of the embedding and the output layer are trained for them.

use common::job::{JobSpec, Method, NewToken};
use common::model::ModelConfig;
use common::text::count;

/// Most tokens that are named one by one.
const NAMED: usize = 5;

/// The job once its tokenizer has been read: `new` are the tokens that were added, with their ids. Adds lines for the user.
pub(super) fn with_tokens(
    mut job: JobSpec,
    new: Vec<NewToken>,
    config: &ModelConfig,
    notices: &mut Vec<String>,
) -> Result<JobSpec, String> {
    let known: Vec<&str> = job
        .tokens
        .iter()
        .map(|token| token.text.as_str())
        .filter(|text| !new.iter().any(|token| token.text == *text))
        .filter(|text| job.eos_token.as_deref() != Some(*text))
        .collect();
    if !known.is_empty() {
        notices.push(format!(
            "the tokenizer has {} already: nothing is added for {}",
            listed(&known),
            if known.len() == 1 { "it" } else { "them" }
        ));
    }
    let ids: Vec<u32> = new.iter().filter_map(|token| token.id).collect();
    job.tokens = new;
    if let Method::Lora(lora) = &mut job.method {
        let mut trained = std::mem::take(&mut lora.tokens);
        // A list is of the embedding, and of an output layer that is the same.
        if config.tied && trained.head.is_none() {
            trained.head = trained.embedding.clone();
        }
        trained.embedding.add(&ids);
        trained.head.add(&ids);
        lora.tokens = trained.of_model(config.tied).ok_or(
            "trainable_token_indices names other tokens for lm_head than for embed_tokens, and the model's output layer is its embedding: \
             name the same for both",
        )?;
    }
    if let (Some(first), Some(last)) = (ids.first(), ids.last()) {
        let texts: Vec<&str> = job.tokens.iter().map(|token| token.text.as_str()).collect();
        let place = match (first == last, *last as usize >= config.vocab_size) {
            (true, _) => format!("id {first}"),
            (false, _) => format!("ids {first} to {last}"),
        };
        let rows = match &job.method {
            Method::Full => "learned with all other weights",
            Method::Lora(_) => "trained and saved beside the adapter",
        };
        notices.push(format!(
            "{} added: {} ({place}); the rows of the embedding and the output layer are {rows}",
            count(ids.len() as u64, "token"),
            listed(&texts)
        ));
    }
    Ok(job)
}

fn listed(texts: &[&str]) -> String {
    match texts.len() > NAMED {
        true => format!(
            "{} and {} more",
            texts[..NAMED].join(", "),
            texts.len() - NAMED
        ),
        false => texts.join(", "),
    }
}

/// Refuses rows of tokens that neither the model nor the job has.
pub(super) fn check_ids(job: &JobSpec, config: &ModelConfig) -> Result<(), String> {
    let Method::Lora(lora) = &job.method else {
        return Ok(());
    };
    let new = job.tokens.iter().filter_map(|token| token.id);
    let new = new.max().map_or(0, |id| id as usize + 1);
    let rows = config.vocab_size.max(new);
    let bound = lora.tokens.id_bound();
    // An adapter that goes on brings its rows with it.
    if bound > rows && lora.model_dir.is_none() {
        return Err(format!(
            "trainable_token_indices has the id {}, and the model has rows for ids below {rows}",
            bound - 1
        ));
    }
    Ok(())
}
