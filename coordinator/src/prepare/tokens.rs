//! The job with the tokens that it adds: which rows of the embedding and the output layer are trained for them.

use common::data::template::ChatTemplate;
use common::data::tokenize::Tokenizer;
use common::files::model::has_tokenizer;
use common::job::{JobSpec, Method, NewToken, TrainedRows};
use common::model::ModelConfig;
use common::text::count;

/// Most tokens that are named one by one.
const NAMED: usize = 5;

/// Adds the job's tokens to the tokenizer, after those of the adapter that it goes on from: they keep their ids. Returns all that
/// were added.
pub(super) fn add_to(tokenizer: &mut Tokenizer, job: &JobSpec) -> Result<Vec<NewToken>, String> {
    let said = |error: common::data::tokenize::TokenizerError| error.to_string();
    let mut all = Vec::new();
    if let Method::Lora(lora) = &job.method
        && let Some(dir) = &lora.model_dir
        && !lora.tokens.is_none()
        && has_tokenizer(dir)
    {
        let own = Tokenizer::load(dir).map_err(said)?.added_after(tokenizer);
        let added = tokenizer.add_tokens(&own).map_err(said)?;
        if added != own {
            return Err(format!(
                "lora_model_dir: the tokens that {} adds do not follow those of base_model: it is the adapter of another model",
                dir.display()
            ));
        }
        all = added;
    }
    all.extend(tokenizer.add_tokens(&job.tokens).map_err(said)?);
    Ok(all)
}

/// Gives the tokenizer's tokens the texts that the job has for them. Returns lines for the user where it has any.
pub(super) fn rename(
    tokenizer: &mut Tokenizer,
    job: &JobSpec,
    template: Option<&ChatTemplate>,
) -> Result<Vec<String>, String> {
    let texts = &job.added_tokens_overrides;
    let old = texts.keys().filter_map(|id| tokenizer.token_text(*id));
    let old: Vec<String> = old.collect();
    tokenizer
        .rename_tokens(texts)
        .map_err(|error| error.to_string())?;
    let (Some((first, _)), number) = (texts.first_key_value(), texts.len()) else {
        return Ok(Vec::new());
    };
    let names: Vec<&str> = texts.values().map(String::as_str).collect();
    let place = match number {
        1 => format!("id {first}"),
        _ => format!("ids from {first}"),
    };
    let rows = match &job.method {
        Method::Full => "learned with all other weights",
        Method::Lora(_) => {
            "as they are in the model, but for those that trainable_token_indices names"
        }
    };
    let mut notices = vec![format!(
        "{} renamed: {} ({place}); the rows are {rows}",
        count(number as u64, "token"),
        listed(&names)
    )];
    let is_gone = |text: &&String| !texts.values().any(|new| new == *text);
    let source = template.map_or("", ChatTemplate::source);
    let written = old.iter().filter(|text| source.contains(text.as_str()));
    let written: Vec<&str> = written.filter(is_gone).map(String::as_str).collect();
    if !written.is_empty() {
        notices.push(format!(
            "added_tokens_overrides: the chat template writes {}, which is no token any more and is spelt out: rename others, or give a chat_template that writes the new names",
            listed(&written)
        ));
    }
    Ok(notices)
}

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
        let has_row = |token: &&NewToken| {
            let id = token.id.unwrap_or_default();
            trained.embedding == TrainedRows::All || trained.embedding.listed().contains(&id)
        };
        if lora.model_dir.is_some()
            && let Some(token) = job.tokens.iter().find(|token| !has_row(token))
        {
            return Err(format!(
                "tokens: the adapter of lora_model_dir has no row for {:?}, and gets no more: remove it, or merge that adapter (worker \
                 merge) and begin another on what comes out",
                token.text
            ));
        }
        // A list is of the embedding, and of an output layer that is the same.
        if config.tied && trained.head.is_none() && !trained.unties() {
            trained.head = trained.embedding.clone();
        }
        trained.embedding.add(&ids);
        trained.head.add(&ids);
        let whole = trained.unties();
        lora.tokens = trained.of_model(config.tied).ok_or(match whole {
            true => "the model's output layer is its embedding: lora_modules_to_save makes two of it, of which both or neither have to be \
                     named where tokens are added or trainable_token_indices given",
            false => "the model's output layer is its embedding: trainable_token_indices has to name the same tokens for embed_tokens and \
                      lm_head, in the same order",
        })?;
        if config.tied && whole {
            notices.push(
                "lora_modules_to_save: the model's output layer is its embedding, and is a matrix of its own from now on, as in PEFT"
                    .to_owned(),
            );
        }
    }
    if let (Some(first), Some(last)) = (ids.first(), ids.last()) {
        let texts: Vec<&str> = job.tokens.iter().map(|token| token.text.as_str()).collect();
        let place = match first == last {
            true => format!("id {first}"),
            false => format!("ids {first} to {last}"),
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

/// The first of them, as they are in one line.
fn listed(texts: &[&str]) -> String {
    /// Most characters that are shown of a text.
    const SHOWN: usize = 40;
    let shown = |text: &&str| {
        let short: String = text.chars().take(SHOWN).collect();
        let is_plain = !short.contains([',', '"', ' ']) && !short.chars().any(char::is_control);
        let more = if short.len() < text.len() { "..." } else { "" };
        match is_plain {
            true => format!("{short}{more}"),
            false => format!("{short:?}{more}"),
        }
    };
    let first: Vec<String> = texts.iter().take(NAMED).map(shown).collect();
    match texts.len() > NAMED {
        true => format!("{} and {} more", first.join(", "), texts.len() - NAMED),
        false => first.join(", "),
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
