//! How often checkpoints are saved and the held-out data is evaluated: by steps, by shares of the run, by epochs, or never.

use crate::job::limits::MAX_STEPS;
use crate::job::number::{parse_number, without_separators};
use crate::job::quote::shorten;
use crate::job::read::Reader;
use crate::job::spec::{Cadence, SaveSteps};
use crate::job::yaml::Value;

/// Most times in an epoch: more than anybody wants of checkpoints or evaluations.
const MAX_PER_EPOCH: u64 = 10_000;

/// Transformers' `save_strategy` and `eval_strategy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strategy {
    Steps,
    Epoch,
    No,
    /// Whenever an evaluation is the best so far; for checkpoints only.
    Best,
}

/// After how many steps, if that is a number already, and else how often.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Often {
    Never,
    Every(u64),
    Of(Cadence),
}

/// When checkpoints are saved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Saves {
    /// The run decides.
    Auto,
    /// Only where an evaluation is the best so far.
    Best,
    Often(Often),
}

impl Saves {
    /// The number of steps, or what of it is left to the data.
    pub fn steps(self) -> (SaveSteps, Option<Cadence>) {
        match self {
            Self::Auto => (SaveSteps::Auto, None),
            Self::Best | Self::Often(Often::Never) => (SaveSteps::Never, None),
            Self::Often(Often::Every(steps)) => (SaveSteps::Every(steps), None),
            Self::Often(Often::Of(cadence)) => (SaveSteps::Auto, Some(cadence)),
        }
    }
}

/// When the run stops for evaluations; `None` where it does not.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Evals(pub Option<Often>);

impl Evals {
    /// The number of steps, or what of it is left to the data.
    pub fn steps(self) -> (Option<u64>, Option<Cadence>) {
        match self.0 {
            Some(Often::Every(steps)) => (Some(steps), None),
            Some(Often::Of(cadence)) => (None, Some(cadence)),
            Some(Often::Never) | None => (None, None),
        }
    }
}

/// Reads when checkpoints are saved.
pub(super) fn save_steps(reader: &mut Reader<'_>) -> Saves {
    let fields = ["save_strategy", "save_steps", "saves_per_epoch"];
    let steps = match reader.scalar(fields[1], "auto or a number of steps") {
        None | Some((_, "auto")) => None,
        Some(_) => often(reader, fields[1]),
    };
    let strategy = strategy(reader, fields[0], fields[1]);
    let per_epoch = per_epoch(reader, fields[2]);
    let is_same = |field: &str| match field {
        // They only say that the steps decide.
        "save_strategy" => match strategy {
            Some(Strategy::Steps) | None => true,
            Some(Strategy::No) => steps == Some(Often::Never),
            Some(Strategy::Epoch | Strategy::Best) => false,
        },
        "saves_per_epoch" => per_epoch.is_none(),
        _ => false,
    };
    match decides(reader, fields, is_same, "when checkpoints are saved") {
        Some("save_strategy") if strategy == Some(Strategy::No) => Saves::Often(Often::Never),
        Some("save_strategy") if strategy == Some(Strategy::Best) => Saves::Best,
        Some("save_strategy") => Saves::Often(Often::Of(Cadence::PerEpoch(1))),
        Some("saves_per_epoch") => {
            per_epoch.map_or(Saves::Auto, |often| Saves::Often(Often::Of(often)))
        }
        _ => steps.map_or(Saves::Auto, Saves::Often),
    }
}

/// Reads when the held-out data is evaluated, beside at the end.
pub(super) fn eval_steps(reader: &mut Reader<'_>, holds_out: bool) -> Evals {
    let fields = ["eval_strategy", "eval_steps", "evals_per_epoch"];
    let steps = often(reader, fields[1]).filter(|often| *often != Often::Never);
    let strategy = strategy(reader, fields[0], fields[1]);
    let per_epoch = per_epoch(reader, fields[2]);
    if !holds_out {
        tell_no_evaluation(reader, &fields);
        return Evals(None);
    }
    let steps = match (strategy, steps, per_epoch) {
        (Some(Strategy::Steps), None, None) => logged(reader),
        (_, steps, _) => steps,
    };
    if let Some(given) = reader.given(fields[0]) {
        let message = match strategy {
            Some(Strategy::Steps) if steps.is_none() && per_epoch.is_none() => {
                "is steps, but `eval_steps` says no number of them"
            }
            Some(Strategy::No) if steps.is_none() && per_epoch.is_none() => {
                "is no, but what `val_set_size` holds out or `test_datasets` names is evaluated at the end; remove one"
            }
            _ => "",
        };
        if !message.is_empty() {
            reader.problem(given, message.to_owned());
        }
    }
    let is_same = |field: &str| match field {
        "eval_strategy" => match strategy {
            Some(Strategy::Steps) | None => true,
            Some(Strategy::No) => steps.is_none() && per_epoch.is_none(),
            Some(Strategy::Epoch | Strategy::Best) => false,
        },
        "evals_per_epoch" => per_epoch.is_none(),
        _ => steps.is_none(),
    };
    let decided_by = decides(
        reader,
        fields,
        is_same,
        "when the held-out data is evaluated",
    );
    let often = match decided_by {
        Some("eval_strategy") if strategy == Some(Strategy::No) => None,
        Some("eval_strategy") => Some(Often::Of(Cadence::PerEpoch(1))),
        Some("evals_per_epoch") => per_epoch.map(Often::Of),
        _ => steps,
    };
    Evals(often)
}

/// Why the run does not stop for evaluations that the job asks for.
const NOTHING_TO_EVALUATE: &str =
    "nothing is evaluated, because val_set_size holds no examples out and test_datasets names none";

/// Names the fields that ask for evaluations of nothing, as Axolotl's examples and Transformers' defaults do.
fn tell_no_evaluation(reader: &mut Reader<'_>, fields: &[&str]) {
    let is_off = |name: &str| is_never_evaluated(reader) && name == "eval_strategy";
    let asks = |name: &&&str| {
        let text = reader.given(name).map(|given| &given.node.value);
        let is_zero =
            matches!(text, Some(Value::Scalar { text, .. }) if parse_number(text) == Some(0.0));
        text.is_some() && !is_zero && !is_off(name)
    };
    let asked: Vec<&str> = fields
        .iter()
        .filter(asks)
        .filter_map(|name| Some(reader.given(name)?.written.as_str()))
        .collect();
    if !asked.is_empty() {
        let notice = format!("{}: {NOTHING_TO_EVALUATE}", asked.join(", "));
        reader.notices.push(notice);
    }
}

/// As often as lines are printed: what Transformers makes of `eval_strategy: steps` alone. None where the job does not say that.
fn logged(reader: &mut Reader<'_>) -> Option<Often> {
    let given = reader.given("logging_steps")?;
    let Value::Scalar { text, .. } = &given.node.value else {
        return None;
    };
    let steps: u64 = without_separators(text).parse().ok()?;
    let is_usable = (1..=MAX_STEPS).contains(&steps);
    if is_usable {
        let notice = format!(
            "eval_strategy: steps without eval_steps: every {steps} steps, as logging_steps"
        );
        reader.notices.push(notice);
    }
    is_usable.then_some(Often::Every(steps))
}

/// Reads whether the weights that the run begins with are evaluated.
pub(super) fn eval_on_start(reader: &mut Reader<'_>, holds_out: bool) -> bool {
    let is_on = reader.switch("eval_on_start").unwrap_or(false);
    if is_on && !holds_out {
        reader
            .notices
            .push(format!("eval_on_start: {NOTHING_TO_EVALUATE}"));
    }
    is_on && holds_out
}

/// Whether the job says that nothing is evaluated.
pub(super) fn is_never_evaluated(reader: &Reader<'_>) -> bool {
    says(
        reader,
        "eval_strategy",
        &["no", "none", "never", "false", "off"],
    )
}

/// Whether the job says that the run stops for evaluations.
pub(super) fn is_evaluated_in_training(reader: &Reader<'_>) -> bool {
    says(reader, "eval_strategy", &["steps", "epoch"])
}

fn says(reader: &Reader<'_>, name: &str, words: &[&str]) -> bool {
    let given = reader.given(name).map(|given| &given.node.value);
    matches!(given, Some(Value::Scalar { text, .. }) if words.contains(&text.to_ascii_lowercase().as_str()))
}

/// The field that decides, of those that do not just agree with whatever another says.
fn decides<'n>(
    reader: &mut Reader<'_>,
    fields: [&'n str; 3],
    agrees: impl Fn(&str) -> bool,
    what: &str,
) -> Option<&'n str> {
    let deciding: Vec<&str> = fields.into_iter().filter(|field| !agrees(field)).collect();
    reader.one_of(&deciding, what)
}

/// Reads a number of steps, or a share of the run below 1.
fn often(reader: &mut Reader<'_>, name: &str) -> Option<Often> {
    let (given, text) = reader.scalar(name, "a number of steps")?;
    match parse_number(text) {
        Some(share) if share > 0.0 && share < 1.0 => Some(Often::Of(Cadence::ShareOfRun(share))),
        _ => match without_separators(text).parse::<u64>() {
            Ok(0) => Some(Often::Never),
            Ok(steps) if steps <= MAX_STEPS => Some(Often::Every(steps)),
            _ => {
                reader.wrong(
                    given,
                    "a whole number of steps, or a fraction of the run below 1 (0.25)",
                );
                None
            }
        },
    }
}

fn zero_is_none(steps: u64) -> Option<u64> {
    (steps > 0).then_some(steps)
}

fn per_epoch(reader: &mut Reader<'_>, name: &str) -> Option<Cadence> {
    let times = reader.whole(name, 0..=MAX_PER_EPOCH)?;
    zero_is_none(times).map(Cadence::PerEpoch)
}

fn strategy(reader: &mut Reader<'_>, name: &str, instead: &str) -> Option<Strategy> {
    let (given, text) = reader.scalar(name, "steps, epoch or no")?;
    match text.to_ascii_lowercase().as_str() {
        "" => None,
        "steps" => Some(Strategy::Steps),
        "epoch" => Some(Strategy::Epoch),
        "no" | "none" | "never" | "false" | "off" => Some(Strategy::No),
        "best" if name == "save_strategy" => Some(Strategy::Best),
        other => {
            let other = shorten(other);
            let best = if name == "save_strategy" {
                ", best"
            } else {
                ""
            };
            let message = format!(
                "must be steps, epoch{best} or no, found `{other}`; give the number of steps as `{instead}`"
            );
            reader.problem(given, message);
            None
        }
    }
}
