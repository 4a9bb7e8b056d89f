//! Which weights are the best, whether they are the result, and when the run ends early: Transformers' and Axolotl's fields.
//!
//! Source of the rules between the fields: Transformers 5, `TrainingArguments._validate_args`; Axolotl, `check_early_stopping`.

use crate::job::limits::MAX_STEPS;
use crate::job::quote::shorten;
use crate::job::read::Reader;
use crate::job::resolve::cadence::{Evals, Often, Saves};
use crate::job::spec::{BestModel, Cadence, EarlyStopping};

/// Axolotl's name of patience, with which the best weights are the result; LLaMA-Factory's leaves that to another field.
const PATIENCE: &str = "early_stopping_patience";
const LOAD: &str = "load_best_model_at_end";
const NO_EVALUATION: &str = "has nothing to go by: give eval_steps, evals_per_epoch or eval_strategy, so that the run stops for evaluations";

/// Reads what comes of the weights with the best evaluation. `None` where nothing does.
pub(super) fn best_model(
    reader: &mut Reader<'_>,
    saves: Saves,
    evals: Evals,
    has_validation: bool,
) -> Option<BestModel> {
    let early_stopping = early_stopping(reader);
    let metric = metric(reader);
    let greater_is_better = reader.switch("greater_is_better").unwrap_or(false);
    let asked = reader.switch(LOAD);
    let patience = reader.given(PATIENCE).map(|given| given.written.as_str());
    let implied = early_stopping.is_some() && patience == Some(PATIENCE);
    let best = BestModel {
        greater_is_better,
        load_at_end: asked.unwrap_or(implied),
        save: saves == Saves::Best,
        early_stopping,
    };
    let deciding = match () {
        () if early_stopping.is_some() => PATIENCE,
        () if best.load_at_end => LOAD,
        () if best.save => "save_strategy",
        // It names what is told of the run, and changes nothing.
        () if metric => "metric_for_best_model",
        () => return None,
    };
    let is_evaluated = has_validation && evals.0.is_some_and(|often| often != Often::Never);
    let given = reader.given(deciding);
    match given {
        _ if deciding == "metric_for_best_model" => {}
        Some(given) if !has_validation => {
            let message = "has nothing to evaluate: `val_set_size` holds no examples out, and `test_datasets` names none";
            reader.problem(given, message.to_owned());
        }
        Some(given) if !is_evaluated => reader.problem(given, NO_EVALUATION.to_owned()),
        Some(given) if best.load_at_end => {
            if let Some(message) = mismatch(saves, evals) {
                reader.problem(given, message);
            }
        }
        _ => {}
    }
    Some(best)
}

/// Reads when the run ends early.
fn early_stopping(reader: &mut Reader<'_>) -> Option<EarlyStopping> {
    let patience = reader
        .whole(PATIENCE, 0..=MAX_STEPS)
        .filter(|patience| *patience > 0);
    let wanted = "a number, 0 or more";
    let threshold = reader.number("early_stopping_threshold", wanted, |n| n >= 0.0);
    patience.map(|patience| EarlyStopping {
        patience,
        threshold: threshold.unwrap_or(0.0),
    })
}

/// Reads what tells the best weights. True where the job names it.
fn metric(reader: &mut Reader<'_>) -> bool {
    let Some(text) = reader.text("metric_for_best_model") else {
        return false;
    };
    let is_loss = ["loss", "eval_loss"].contains(&text.trim());
    if let Some(given) = reader.given("metric_for_best_model").filter(|_| !is_loss) {
        let message = format!(
            "must be loss or eval_loss, found `{}`: an evaluation measures nothing else that tells weights apart",
            shorten(&text)
        );
        reader.problem(given, message);
    }
    true
}

/// Why the best weights cannot be the result with checkpoints and evaluations as the job has them, by the rules that Transformers
/// has for that; goes after the field's name.
fn mismatch(saves: Saves, evals: Evals) -> Option<String> {
    let rule = "needs checkpoints where evaluations are, as Transformers has it:";
    match (saves, evals.0?) {
        (Saves::Auto | Saves::Best, _) => None,
        (Saves::Often(Often::Never), _) => Some(format!(
            "{rule} there are none with save_strategy: no; remove that, or write save_strategy: best"
        )),
        (Saves::Often(Often::Every(save)), Often::Every(eval)) if save % eval != 0 => Some(
            format!("{rule} save_steps ({save}) is no multiple of eval_steps ({eval})"),
        ),
        (Saves::Often(Often::Of(Cadence::PerEpoch(_))), Often::Every(_))
        | (Saves::Often(Often::Every(_)), Often::Of(Cadence::PerEpoch(_))) => Some(format!(
            "{rule} one of them is said in steps and the other in epochs; say both in the same, or write save_strategy: best"
        )),
        _ => None,
    }
}
