//! Resolves how big a step is, how many there are, and the warm-up of the learning rate.

use crate::job::limits::{MAX_BATCH, MAX_MICRO_BATCH, MAX_SLOTS, MAX_STEPS};
use crate::job::number::parse_number;
use crate::job::read::Reader;
use crate::job::{DEFAULT_BATCH_SIZE, LrScheduler, Warmup};

/// (global, micro), in blocks.
pub(super) fn batch(reader: &mut Reader<'_>) -> (usize, usize) {
    let (global, micro) = sizes(reader);
    let slots = global.div_ceil(micro);
    if slots > MAX_SLOTS {
        let names = ["global_batch_size", "gradient_accumulation_steps"];
        let given = names.into_iter().find_map(|name| reader.given(name));
        if let Some(given) = given {
            let message = format!(
                "makes {slots} slots of {micro} blocks in a step, more than {MAX_SLOTS}: raise `micro_batch_size`"
            );
            reader.problem(given, message);
        }
    }
    (global, micro)
}

fn sizes(reader: &mut Reader<'_>) -> (usize, usize) {
    let micro = reader.size("micro_batch_size", 1..=MAX_MICRO_BATCH as u64);
    let global = reader.size("global_batch_size", 1..=MAX_BATCH as u64);
    let accumulation = reader.size("gradient_accumulation_steps", 1..=MAX_BATCH as u64);
    let micro_size = micro.unwrap_or(1);
    let default_global = DEFAULT_BATCH_SIZE.next_multiple_of(micro_size);
    let product = accumulation.map(|steps| steps * micro_size);
    if let (Some(global), Some(product)) = (global, product) {
        if global == product {
            return (global, micro_size);
        }
        let names = ["global_batch_size", "gradient_accumulation_steps"];
        return match reader.one_of(&names, "the number of blocks in a step") {
            Some("global_batch_size") => (global, micro_size),
            _ => (product, micro_size),
        };
    }
    if let Some(product) = product {
        return (product, micro_size);
    }
    if let Some(global) = global
        && global % micro_size != 0
    {
        let message = format!("({micro_size}) does not divide `global_batch_size` ({global})");
        let name = match reader.layer("micro_batch_size") >= reader.layer("global_batch_size") {
            true => "micro_batch_size",
            false => "global_batch_size",
        };
        if let Some(given) = reader.given(name) {
            let message = match name {
                "micro_batch_size" => message,
                _ => format!("({global}) is no multiple of `micro_batch_size` ({micro_size})"),
            };
            reader.problem(given, message);
        }
    }
    (global.unwrap_or(default_global), micro_size)
}

pub(super) fn max_steps(reader: &mut Reader<'_>) -> Option<u64> {
    // Transformers' way to say "by epochs".
    if reader.scalar("max_steps", "a whole number")?.1 == "-1" {
        return None;
    }
    reader.whole("max_steps", 1..=MAX_STEPS)
}

pub(super) fn warmup(
    reader: &mut Reader<'_>,
    scheduler: LrScheduler,
    max_steps: Option<u64>,
) -> Warmup {
    let ratio = reader
        .number("warmup_ratio", "a number from 0 to 1", |n| {
            (0.0..=1.0).contains(&n)
        })
        .map(Warmup::Ratio);
    let steps = warmup_steps(reader);
    let decided_by = reader.one_of(&["warmup_steps", "warmup_ratio"], "the warm-up");
    let warmup = match decided_by {
        Some("warmup_steps") => steps,
        Some(_) => ratio,
        None => None,
    };
    let given = decided_by.and_then(|name| reader.given(name));
    if !scheduler.has_warmup() {
        let is_zero =
            matches!(warmup, None | Some(Warmup::Steps(0))) || warmup == Some(Warmup::Ratio(0.0));
        if let Some(given) = given
            && !is_zero
            && Some(given.layer) >= reader.layer("lr_scheduler")
        {
            // As in the programs that these names are from: those of well-known jobs have both.
            let with = match scheduler {
                LrScheduler::Constant => {
                    "lr_scheduler: constant, as in Transformers (constant_with_warmup warms up)"
                }
                _ => "pct_start in lr_scheduler_kwargs, which decides the warm-up",
            };
            let notice = format!("{}: changes nothing with {with}", given.written);
            reader.notices.push(notice);
        }
        return Warmup::Steps(0);
    }
    if let (Some(Warmup::Steps(steps)), Some(max_steps), Some(given)) = (warmup, max_steps, given)
        && steps > max_steps
        && Some(given.layer) == reader.layer("max_steps")
    {
        reader.problem(
            given,
            format!("({steps}) is more than `max_steps` ({max_steps})"),
        );
    }
    warmup.unwrap_or(Warmup::Ratio(0.03))
}

/// Reads `warmup_steps`, which may be a fraction of the run too, as Transformers takes it.
fn warmup_steps(reader: &mut Reader<'_>) -> Option<Warmup> {
    let (_, text) = reader.scalar("warmup_steps", "a whole number")?;
    match parse_number(text) {
        Some(fraction) if fraction > 0.0 && fraction < 1.0 => Some(Warmup::Ratio(fraction)),
        _ => reader
            .whole("warmup_steps", 0..=MAX_STEPS)
            .map(Warmup::Steps),
    }
}
