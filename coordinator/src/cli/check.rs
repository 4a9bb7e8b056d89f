//! `coordinator check`: everything that can be known before training.
//!
//! Enters: a job. Leaves: a table for people or one JSON document, on the given writer. Starts nothing; the block file
//! goes into the output folder only if that is there already, else it is thrown away.

use std::io::{self, Write};

use common::data::{DataCounts, DataErrors, Sample, SetCounts, samples};
use common::host::available_bytes;
use common::job::{JobSpec, Method};
use common::progress::Progress;
use common::text::{count, visible};
use serde::Serialize;
use thiserror::Error;

use crate::prepare::{
    Estimate, MethodNeed, Need, PreflightError, Prepared, Scratch, advice, methods, prepare_in,
    told,
};
use crate::report::terminal::{
    GPUS, adapter_kind, adapter_start, bits, block_count, bytes, full_fine_tuning, grouped,
    parameter_count, set_lines,
};
use crate::store::layout::WORK_FOLDER;

/// How `check` reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckOptions {
    /// Rendered examples to show.
    pub show: usize,
    /// One JSON document instead of a table.
    pub json: bool,
}

#[derive(Debug, Error)]
pub enum CheckError {
    /// Exit code 3.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    #[error("cannot write the report: {0}")]
    Output(#[from] io::Error),
}

/// Checks the job and writes the report. Ends soon with an error once `progress` is cancelled, and leaves nothing behind then.
pub fn run(
    job: &JobSpec,
    options: &CheckOptions,
    progress: &Progress,
    out: &mut dyn Write,
) -> Result<(), CheckError> {
    let kept = job.output_dir.join(WORK_FOLDER);
    let scratch = if kept.is_dir() {
        None
    } else {
        Some(Scratch::new()?)
    };
    let blocks_dir = scratch.as_ref().map_or(kept.as_path(), Scratch::path);
    let prepared = prepare_in(job, blocks_dir, false, progress)?;
    let samples = samples(
        &prepared.job,
        &prepared.tokenizer,
        prepared.template.as_ref(),
        options.show,
    )
    .map_err(|errors: DataErrors| PreflightError::from(errors))?;
    if options.json {
        serde_json::to_writer(&mut *out, &document(&prepared, &samples))
            .map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        write_table(out, &prepared)?;
        for (index, sample) in samples.iter().enumerate() {
            write_sample(out, index + 1, sample)?;
        }
    }
    out.flush()?;
    Ok(())
}

#[derive(Serialize)]
struct Document<'a> {
    job: &'a JobSpec,
    dataset: DatasetCounts<'a>,
    plan: PlanCounts,
    /// Bytes that a worker needs.
    memory: Memory,
    /// What the user should know, a line each.
    notices: Vec<String>,
    samples: &'a [Sample],
}

#[derive(Serialize)]
struct DatasetCounts<'a> {
    rows: u64,
    examples: u64,
    blocks: u64,
    tokens: u64,
    trained_tokens: u64,
    /// What each gives to an epoch, where there are several.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    sets: &'a [SetCounts],
}

#[derive(Serialize)]
struct PlanCounts {
    steps: u64,
    slots_per_step: usize,
}

#[derive(Serialize)]
struct Memory {
    processor: Need,
    gpu: Need,
    /// What each method needs on a processor.
    methods: Vec<MethodNeed>,
}

fn document<'a>(prepared: &'a Prepared, samples: &'a [Sample]) -> Document<'a> {
    let counts = &prepared.data.counts;
    Document {
        job: &prepared.job,
        dataset: DatasetCounts {
            rows: counts.rows,
            examples: counts.examples,
            blocks: counts.blocks + counts.eval_blocks,
            tokens: counts.tokens,
            trained_tokens: counts.trained_tokens,
            sets: &counts.sets,
        },
        plan: PlanCounts {
            steps: prepared.total_steps(),
            slots_per_step: prepared.slots_per_step(),
        },
        memory: Memory {
            processor: prepared.estimate.processor,
            gpu: prepared.estimate.gpu,
            methods: methods(&prepared.job, &prepared.model_config),
        },
        notices: notices(prepared),
        samples,
    }
}

fn write_table(out: &mut dyn Write, prepared: &Prepared) -> io::Result<()> {
    write_rows(out, rows(prepared), prepared)
}

/// What there is to say of the data alone.
pub(super) fn write_data(out: &mut dyn Write, prepared: &Prepared) -> io::Result<()> {
    write_rows(out, data_rows(prepared), prepared)
}

fn write_rows(
    out: &mut dyn Write,
    rows: Vec<(&'static str, String)>,
    prepared: &Prepared,
) -> io::Result<()> {
    for (name, value) in rows {
        write_row(out, name, &value)?;
    }
    for notice in notices(prepared) {
        write_row(out, "note", &notice)?;
    }
    Ok(())
}

/// What the user should know, a line each.
fn notices(prepared: &Prepared) -> Vec<String> {
    let mut notices = prepared.notices();
    let methods = methods(&prepared.job, &prepared.model_config);
    notices.extend(available_bytes().and_then(|free| advice(&methods, free)));
    notices
}

pub(super) fn write_row(out: &mut dyn Write, name: &str, value: &str) -> io::Result<()> {
    writeln!(out, "{name:<12} {}", visible(value))
}

fn data_rows(prepared: &Prepared) -> Vec<(&'static str, String)> {
    let (job, counts) = (&prepared.job, &prepared.data.counts);
    let mut rows = data(counts, job.sequence_len).to_vec();
    rows.extend(set_lines(job, counts).into_iter().map(|set| ("share", set)));
    rows
}

fn rows(prepared: &Prepared) -> Vec<(&'static str, String)> {
    let (job, estimate) = (&prepared.job, &prepared.estimate);
    let mut rows = vec![
        ("job", shown(&prepared.job_digest).to_owned()),
        ("model", model(prepared)),
        ("method", method(job, estimate)),
    ];
    rows.extend(data_rows(prepared));
    rows.extend([
        ("plan", plan(prepared)),
        ("memory", memory(&estimate.processor)),
        ("methods", told(&methods(job, &prepared.model_config))),
    ]);
    if GPUS {
        rows.push(("GPU memory", gpu_memory(&estimate.gpu)));
    }
    rows.push(("output", job.output_dir.display().to_string()));
    rows
}

fn model(prepared: &Prepared) -> String {
    let (config, estimate) = (&prepared.model_config, &prepared.estimate);
    format!(
        "{} ({}, {}, {} layers, vocabulary {}{})",
        prepared.job.model_name(),
        config.architecture.name(),
        parameter_count(estimate.parameters, estimate.active_parameters),
        config.layers,
        grouped(config.vocab_size as u64),
        bits(config.quantization_of(&prepared.job))
    )
}

fn method(job: &JobSpec, estimate: &Estimate) -> String {
    let method = match &job.method {
        Method::Full => full_fine_tuning(job).to_owned(),
        Method::Lora(lora) => format!(
            "{}, rank {}, alpha {}{}",
            adapter_kind(lora),
            lora.r,
            lora.alpha,
            adapter_start(lora)
        ),
    };
    format!(
        "{method}: {} trainable parameters ({:.2}%)",
        grouped(estimate.trainable_parameters),
        percent(estimate.trainable_parameters, estimate.parameters)
    )
}

fn data(counts: &DataCounts, sequence_len: usize) -> [(&'static str, String); 4] {
    let validation = match counts.eval_examples {
        0 => "none".to_owned(),
        held_out => format!(
            "{} in {}",
            count(held_out, "example"),
            count(counts.eval_blocks, "block")
        ),
    };
    let examples = format!(
        "{}, {}, longest {}",
        count(counts.rows, "row"),
        count(counts.examples, "example"),
        count(counts.longest, "token")
    );
    let tokens = format!(
        "{}, {} of them trained ({:.1}%)",
        grouped(counts.tokens),
        grouped(counts.trained_tokens),
        percent(counts.trained_tokens, counts.tokens)
    );
    let blocks = format!(
        "{} of {} tokens, {:.1}% padding",
        block_count(counts),
        grouped(sequence_len as u64),
        percent(counts.padding_tokens, counts.tokens + counts.padding_tokens)
    );
    [
        ("data", examples),
        ("tokens", tokens),
        ("blocks", blocks),
        ("validation", validation),
    ]
}

fn plan(prepared: &Prepared) -> String {
    let blocks = prepared.data.file.train_blocks() as usize;
    format!(
        "{} of {} ({}), {:.2} epochs",
        count(prepared.total_steps(), "step"),
        count(prepared.slots_per_step() as u64, "slot"),
        count(prepared.job.global_batch_size.min(blocks) as u64, "block"),
        prepared.schedule.epoch_after(prepared.total_steps())
    )
}

fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

fn memory(need: &Need) -> String {
    let told = need.least().told();
    match (need.keeping, need.recomputing) {
        (Some(keeping), Some(recomputing)) if keeping.total() > recomputing.total() => format!(
            "{told}; {} where activations need not be computed again",
            bytes(keeping.total())
        ),
        _ => told,
    }
}

fn gpu_memory(need: &Need) -> String {
    let told = memory(need);
    format!("{told}; some hundred MiB more for the driver and NCCL")
}

/// The text with what is learned between ⟦ and ⟧, then every token.
fn write_sample(out: &mut dyn Write, number: usize, sample: &Sample) -> io::Result<()> {
    writeln!(out, "\nexample {number} (learned: ⟦...⟧)")?;
    for span in &sample.spans {
        let text = visible(&span.text);
        if span.trained {
            write!(out, "⟦{text}⟧")?;
        } else {
            write!(out, "{text}")?;
        }
    }
    writeln!(out)?;
    writeln!(
        out,
        "input_ids {}",
        serde_json::to_string(&sample.input_ids)?
    )?;
    let mask: String = sample
        .labels
        .iter()
        .map(|label| if *label < 0 { '.' } else { '1' })
        .collect();
    writeln!(out, "mask      {mask}")
}

fn shown(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}
