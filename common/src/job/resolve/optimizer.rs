//! Resolves the optimizer: its name among all that other programs have, and what only it knows.

use super::settings::Settings;
use crate::job::Optimizer;
use crate::job::did_you_mean::did_you_mean;
use crate::job::quote::shorten;
use crate::job::read::Reader;

/// An optimizer by name, with the betas that it has where the job gives none.
#[derive(Clone, Copy)]
struct Named {
    names: &'static [&'static str],
    kind: Kind,
    betas: (f64, f64),
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Adamw,
    Adamw8bit,
    Sgd,
    Lion,
    Lion8bit,
    Muon,
}

/// Defaults of Transformers, which hands them to its Lion too.
const USUAL_BETAS: (f64, f64) = (0.9, 0.999);

/// Names that are done as they say. The first of each is Muster's own.
const DONE: &[Named] = &[
    Named {
        names: &[
            "adamw",
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_torch_xla",
            "adamw_torch_npu_fused",
            "adamw_hf",
            "adamw_apex_fused",
            "paged_adamw",
            "paged_adamw_32bit",
            "optimi_adamw",
            "flash_adamw",
        ],
        kind: Kind::Adamw,
        betas: USUAL_BETAS,
    },
    Named {
        names: &["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"],
        kind: Kind::Adamw8bit,
        betas: USUAL_BETAS,
    },
    Named {
        names: &["sgd"],
        kind: Kind::Sgd,
        betas: USUAL_BETAS,
    },
    Named {
        // The package's own defaults.
        names: &["lion", "lion_pytorch"],
        kind: Kind::Lion,
        betas: (0.9, 0.99),
    },
    Named {
        names: &["lion_32bit", "paged_lion_32bit"],
        kind: Kind::Lion,
        betas: USUAL_BETAS,
    },
    Named {
        names: &["lion_8bit", "paged_lion_8bit"],
        kind: Kind::Lion8bit,
        betas: USUAL_BETAS,
    },
    Named {
        // Those of Axolotl's optimizer for the weights that AdamW updates.
        names: &["muon"],
        kind: Kind::Muon,
        betas: (0.95, 0.95),
    },
];

/// Names that are done with other bits in the moments than they have elsewhere, and what is told of that.
const DONE_IN_OTHER_BITS: &[(Named, &str)] = &[
    (
        Named {
            names: &["adamw_torch_8bit", "ao_adamw_8bit"],
            kind: Kind::Adamw8bit,
            betas: USUAL_BETAS,
        },
        "moments are kept in 8 bits as bitsandbytes keeps them, not torchao: blocks of 256, and float32 in embeddings",
    ),
    (
        Named {
            names: &["adamw_torch_4bit", "ao_adamw_4bit", "ao_adamw_fp8"],
            kind: Kind::Adamw8bit,
            betas: USUAL_BETAS,
        },
        "moments are kept in 8 bits as bitsandbytes keeps them, 2 bytes per trained parameter",
    ),
    (
        Named {
            names: &["adamw_anyprecision"],
            kind: Kind::Adamw,
            betas: USUAL_BETAS,
        },
        "AdamW keeps its moments in float32, 8 bytes per trained parameter; optimizer: adamw_8bit takes 2",
    ),
    (
        Named {
            names: &["flash_lion"],
            kind: Kind::Lion,
            betas: (0.9, 0.99),
        },
        "Lion keeps its moment in float32, 4 bytes per trained parameter; optimizer: lion_8bit takes 1",
    ),
];

/// What there is beside these elsewhere, and why it is not done here. A name that ends in `*` stands for all that begin so.
const NOT_DONE: &[(&[&str], &str)] = &[
    (
        &["adafactor"],
        "keeps sums over rows and columns in place of a moment, which no state here has",
    ),
    (
        &["came_pytorch", "came"],
        "keeps sums over rows and columns in place of moments, which no state here has",
    ),
    (
        &["ademamix*", "paged_ademamix*"],
        "keeps a third moment, which no state here has",
    ),
    (
        &["adagrad", "rmsprop*"],
        "scales by squared gradients alone; adamw does so too, with a momentum",
    ),
    (
        &["galore_*", "apollo_*", "q_galore_*"],
        "projects gradients to need less memory for moments; adapter: lora needs less still",
    ),
    (
        &["lomo", "adalomo"],
        "updates weights while gradients are computed, but here an update needs those of all workers",
    ),
    (
        &["grokadamw"],
        "follows the losses of a run, but here an update is a function of the gradient and the step",
    ),
    (
        &["schedule_free_*"],
        "trains one set of weights and evaluates another; the curve of lr_scheduler does its work",
    ),
    (
        &["stable_adamw"],
        "clips each update by its own size; max_grad_norm clips gradients here",
    ),
    (
        &["adopt_adamw"],
        "divides by the moment of the step before, unlike AdamW",
    ),
    (
        &["dion"],
        "approximates momentum by low ranks; muon orthogonalises all of it",
    ),
    (
        &["sinkgd"],
        "scales rows and columns in turns and keeps no moment",
    ),
    (
        &["flash_adam", "adam", "flash_sgd", "flash_sgdw"],
        "decays weights in another way than the optimizers here",
    ),
    (
        &["adam_mini"],
        "keeps one second moment for many weights, which no state here has",
    ),
];

/// The optimizer of a job, and the betas that it has where none are given.
pub(super) fn optimizer(reader: &mut Reader<'_>) -> (Optimizer, (f64, f64)) {
    let named = named(reader);
    let uses_muon = reader.switch("use_muon").unwrap_or(false);
    let mut arguments = Settings::read(reader, "optim_args", "{momentum: 0.9}");
    let optimizer = match (uses_muon, named.kind) {
        (true, kind) => {
            use_muon(reader, kind);
            Optimizer::Muon {
                trains_vectors: true,
            }
        }
        (false, Kind::Adamw) => Optimizer::Adamw,
        (false, Kind::Adamw8bit) => Optimizer::Adamw8bit,
        (false, Kind::Lion) => Optimizer::Lion,
        (false, Kind::Lion8bit) => Optimizer::Lion8bit,
        (false, Kind::Muon) => {
            let told = "optimizer: muon leaves norms and biases as they are, as in Axolotl (use_muon: true trains them by AdamW)";
            reader.notices.push(told.to_owned());
            Optimizer::Muon {
                trains_vectors: false,
            }
        }
        (false, Kind::Sgd) => Optimizer::Sgd {
            momentum: arguments.any_number(reader, "momentum").unwrap_or(0.0),
            dampening: arguments.any_number(reader, "dampening").unwrap_or(0.0),
            nesterov: arguments.switch(reader, "nesterov").unwrap_or(false),
        },
    };
    if let Optimizer::Muon { .. } = optimizer {
        let told = "optimizer: Muon is done on processors; a worker on a GPU refuses the job";
        reader.notices.push(told.to_owned());
    }
    refuse_unknown(&arguments, reader, &optimizer);
    if let Err(reason) = optimizer.check()
        && let Some(given) = reader.given("optim_args")
    {
        reader.problem(given, reason);
    }
    let betas = match uses_muon {
        true => USUAL_BETAS,
        false => named.betas,
    };
    (optimizer, betas)
}

/// Says what LLaMA-Factory's switch does beside a named optimizer.
fn use_muon(reader: &mut Reader<'_>, kind: Kind) {
    let (Some(given), Some(switch)) = (reader.given("optimizer"), reader.given("use_muon")) else {
        return;
    };
    match kind {
        Kind::Adamw | Kind::Adamw8bit => {
            let written = &given.written;
            let told = format!("{written}: changes nothing with use_muon, as in LLaMA-Factory");
            reader.notices.push(told);
        }
        _ => {
            let message = format!(
                "and `{}` both name the optimizer; remove one",
                given.written
            );
            reader.problem(switch, message);
        }
    }
}

fn named(reader: &mut Reader<'_>) -> Named {
    let usual = DONE[0];
    let Some((given, text)) = reader.scalar("optimizer", "the name of an optimizer") else {
        return usual;
    };
    let name = text.to_ascii_lowercase().replace('-', "_");
    let has = |named: &&Named| named.names.contains(&name.as_str());
    if name.is_empty() {
        return usual;
    }
    if let Some(named) = DONE.iter().find(has) {
        return *named;
    }
    if let Some((named, told)) = DONE_IN_OTHER_BITS.iter().find(|(named, _)| has(&named)) {
        reader.notices.push(format!("{}: {told}", given.written));
        return *named;
    }
    let is_meant = |pattern: &&str| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => **pattern == name,
    };
    let own: Vec<&str> = DONE.iter().map(|named| named.names[0]).collect();
    let own = own.join(", ").replace(", lion_32bit", "");
    let message = match NOT_DONE
        .iter()
        .find(|(names, _)| names.iter().any(is_meant))
    {
        Some((_, reason)) => format!("is {name}, which {reason}: use one of {own}"),
        None => {
            let others = DONE_IN_OTHER_BITS.iter().map(|(named, _)| named);
            let known = DONE.iter().chain(others);
            let names = known.flat_map(|named| named.names.iter().copied());
            let hint = did_you_mean(&name, names);
            format!("must be one of {own}, found `{}`{hint}", shorten(text))
        }
    };
    reader.problem(given, message);
    usual
}

/// Refuses arguments that the optimizer does not know.
fn refuse_unknown(settings: &Settings, reader: &mut Reader<'_>, optimizer: &Optimizer) {
    /// What is a field of the job.
    const FIELDS: [&str; 6] = ["betas", "beta1", "beta2", "eps", "lr", "weight_decay"];
    for key in settings.unknown() {
        let name = key.text.as_str();
        let advice = match (FIELDS.contains(&name), settings.known.is_empty()) {
            (true, _) => {
                "give learning_rate, adam_beta1, adam_beta2, adam_epsilon and weight_decay instead"
                    .to_owned()
            }
            (false, true) => "it takes none; remove it".to_owned(),
            (false, false) => {
                let hint = did_you_mean(name, settings.known.iter().copied());
                format!("it knows {}{hint}", settings.known.join(", "))
            }
        };
        let name = shorten(name);
        let message =
            format!("`optim_args` has `{name}`, which is no setting of {optimizer} here: {advice}");
        reader.problems.add(&key.origin, message);
    }
}
