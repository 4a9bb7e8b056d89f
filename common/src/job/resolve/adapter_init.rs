//! Resolves what a new adapter starts with.

use crate::job::adapter_init::MAX_ITERATIONS;
use crate::job::quote::shorten;
use crate::job::read::Reader;
use crate::job::switch::parse_switch;
use crate::job::{AdapterInit, LoraSpec};

/// Iterations that LLaMA-Factory takes where nothing is given (`finetuning_args.py`, 0.9.5).
const PISSA_ITERATIONS: u32 = 16;

/// What a new adapter starts with.
pub(super) fn adapter_init(reader: &mut Reader<'_>) -> AdapterInit {
    let named = named(reader);
    let pissa = pissa(reader);
    let decided_by = reader.one_of(
        &["init_lora_weights", "pissa_init"],
        "what an adapter starts with",
    );
    let chosen = match decided_by {
        Some("pissa_init") => pissa,
        _ => named,
    };
    chosen.unwrap_or_default()
}

fn named(reader: &mut Reader<'_>) -> Option<AdapterInit> {
    let wanted = "one of true, gaussian, orthogonal, pissa, pissa_niter_N, olora";
    let (given, text) = reader.scalar("init_lora_weights", wanted)?;
    let name = text.to_ascii_lowercase();
    match (parse_switch(text), AdapterInit::of_name(&name)) {
        (Some(true), _) => Some(AdapterInit::default()),
        (_, Some(init)) => Some(init),
        _ => {
            let message = format!(
                "must be {wanted}, with N from 1 to {MAX_ITERATIONS}, found `{}`",
                shorten(text)
            );
            reader.problem(given, message);
            None
        }
    }
}

/// LLaMA-Factory's switch, and its number.
fn pissa(reader: &mut Reader<'_>) -> Option<AdapterInit> {
    let is_on = reader.switch("pissa_init");
    let wanted = "a whole number from 1 to 64, or -1";
    let iterations = match reader.scalar("pissa_iter", wanted) {
        None => Some(PISSA_ITERATIONS),
        Some((_, "-1")) => None,
        Some((given, text)) => {
            let number = text.parse().ok();
            let number = number.filter(|number| (1..=MAX_ITERATIONS).contains(number));
            if number.is_none() {
                reader.wrong(given, wanted);
            }
            number
        }
    };
    is_on.map(|is_on| match is_on {
        true => AdapterInit::Pissa { iterations },
        false => AdapterInit::default(),
    })
}

/// Checks that adapters of these ranks and this dropout can start as the job asks for.
pub(super) fn check_start(reader: &mut Reader<'_>, spec: &LoraSpec) {
    let given = ["init_lora_weights", "pissa_init"];
    let Some(given) = given.into_iter().find_map(|name| reader.given(name)) else {
        return;
    };
    let ranks = spec.shape.ranks.iter().map(|(_, rank)| *rank);
    let mut ranks = [spec.r].into_iter().chain(ranks);
    if let Some(reason) = ranks.find_map(|rank| spec.init.refuses(rank)) {
        reader.problem(given, reason);
    }
    if spec.init.is_from_base() && spec.dropout > 0.0 {
        let message = format!(
            "is {}, which takes directions off the weights; inputs that are dropped would miss them: remove `lora_dropout`",
            spec.init
        );
        reader.problem(given, message);
    }
}
