//! Resolves the curve of the learning rate: `lr_scheduler`, the settings in `lr_scheduler_kwargs`, and Axolotl's keys beside them.

use super::settings::Settings;
use crate::job::did_you_mean::did_you_mean;
use crate::job::lr_scheduler::{
    ANY_DIVISOR, CYCLES, DIVISOR, POWER, RATE, SHARE, STEPS, TIMESCALE,
};
use crate::job::quote::shorten;
use crate::job::read::Reader;
use crate::job::{Anneal, LrScheduler, OneCycle, Stage, WarmupStableDecay};

/// Values of `lr_scheduler`.
const NAMES: [&str; 12] = [
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "one_cycle",
    "rex",
];

/// Further values of Transformers, which are no functions of the step.
const FOLLOW_THE_LOSS: [&str; 2] = ["reduce_lr_on_plateau", "greedy"];

/// Waves of the cosine that fall from the peak to the lowest rate and end there.
const HALF_A_WAVE: f64 = 0.5;

pub(super) fn lr_scheduler(reader: &mut Reader<'_>, learning_rate: f64) -> LrScheduler {
    let name = name(reader);
    let mut beside = Beside::read(reader);
    let mut settings = Settings::read(reader, "lr_scheduler_kwargs", "{num_cycles: 2}");
    let scheduler = match name {
        "linear" => LrScheduler::Linear,
        "constant" => LrScheduler::Constant,
        "constant_with_warmup" => LrScheduler::ConstantWithWarmup,
        "cosine_with_restarts" => LrScheduler::CosineWithRestarts {
            num_cycles: settings.number(reader, "num_cycles", CYCLES).unwrap_or(1.0),
        },
        "cosine_with_min_lr" => LrScheduler::CosineWithMinLr {
            min_lr_rate: min_lr_rate(reader, &mut settings, learning_rate),
            num_cycles: half_a_wave(reader, &mut settings),
        },
        "cosine_warmup_with_min_lr" => LrScheduler::CosineWarmupWithMinLr {
            min_lr_rate: min_lr_rate(reader, &mut settings, learning_rate),
            num_cycles: half_a_wave(reader, &mut settings),
            warmup_lr_rate: settings.number(reader, "warmup_lr_rate", SHARE),
        },
        "polynomial" => LrScheduler::Polynomial {
            lr_end: settings.number(reader, "lr_end", RATE).unwrap_or(1e-7),
            power: settings.number(reader, "power", POWER).unwrap_or(1.0),
        },
        "inverse_sqrt" => LrScheduler::InverseSqrt {
            timescale: settings.whole(reader, "timescale", TIMESCALE),
        },
        "warmup_stable_decay" => warmup_stable_decay(reader, &mut settings),
        "one_cycle" => one_cycle(reader, &mut settings),
        "rex" => LrScheduler::Rex {
            min_lr_ratio: beside.take_min_lr_ratio(),
        },
        _ => cosine(reader, &mut settings, &mut beside),
    };
    refuse_unknown(&settings, reader, name, &beside);
    beside.tell_unused(reader, name);
    let given = reader.given("lr_scheduler_kwargs");
    if let Some(given) = given.or_else(|| reader.given("lr_scheduler"))
        && let Err(reason) = scheduler.check(learning_rate)
    {
        reader.problem(given, reason);
    }
    scheduler
}

fn name(reader: &mut Reader<'_>) -> &'static str {
    if let Some((given, text)) = reader.scalar("lr_scheduler", "the name of a curve") {
        let lower = text.to_ascii_lowercase().replace('-', "_");
        if FOLLOW_THE_LOSS.contains(&lower.as_str()) {
            let message = format!(
                "is `{lower}`, whose rate follows the losses of a run; here it is a function of the step, the same for every worker and \
                 after every resume: use cosine, or constant_with_warmup"
            );
            reader.problem(given, message);
            return "cosine";
        }
    }
    let choices = NAMES
        .each_ref()
        .map(|name| (std::slice::from_ref(name), *name));
    reader.choice("lr_scheduler", &choices).unwrap_or("cosine")
}

// ---- curves ----

fn cosine(reader: &mut Reader<'_>, settings: &mut Settings, beside: &mut Beside) -> LrScheduler {
    if beside.quadratic_warmup {
        beside.is_quadratic_used = true;
        return LrScheduler::CosineAfterQuadraticWarmup;
    }
    if beside.min_lr_ratio > 0.0 {
        let min_lr_ratio = beside.take_min_lr_ratio();
        let constant_lr_ratio = beside.constant_lr_ratio;
        beside.is_constant_used = true;
        return match constant_lr_ratio > 0.0 {
            true => LrScheduler::CosineThenConstant {
                min_lr_ratio,
                constant_lr_ratio,
            },
            false => LrScheduler::CosineWithMinLr {
                min_lr_rate: min_lr_ratio,
                num_cycles: HALF_A_WAVE,
            },
        };
    }
    match half_a_wave(reader, settings) {
        HALF_A_WAVE => LrScheduler::Cosine,
        num_cycles => LrScheduler::CosineWaves { num_cycles },
    }
}

fn half_a_wave(reader: &mut Reader<'_>, settings: &mut Settings) -> f64 {
    let num_cycles = settings.number(reader, "num_cycles", CYCLES);
    num_cycles.unwrap_or(HALF_A_WAVE)
}

/// The lowest rate as a share of the peak: `min_lr_rate`, or `min_lr` through `learning_rate`.
fn min_lr_rate(reader: &mut Reader<'_>, settings: &mut Settings, learning_rate: f64) -> f64 {
    let rate = settings.number(reader, "min_lr", RATE);
    let share = settings.number(reader, "min_lr_rate", SHARE);
    let has = |name| settings.get(name).is_some();
    let message = match (has("min_lr"), has("min_lr_rate"), rate) {
        (true, true, _) => "has both min_lr and min_lr_rate; remove one".to_owned(),
        (false, false, _) => {
            let example = "lr_scheduler_kwargs: {min_lr_rate: 0.1}";
            format!(
                "needs min_lr or min_lr_rate, the lowest rate or its share of the peak ({example})"
            )
        }
        (_, _, Some(rate)) if rate > learning_rate => {
            format!("has a min_lr of {rate}, which is more than learning_rate ({learning_rate})")
        }
        _ => {
            return share
                .or(rate.map(|rate| rate / learning_rate))
                .unwrap_or(0.0);
        }
    };
    let name = match has("min_lr") || has("min_lr_rate") {
        true => "lr_scheduler_kwargs",
        false => "lr_scheduler",
    };
    if let Some(given) = reader.given(name) {
        reader.problem(given, message);
    }
    0.0
}

fn warmup_stable_decay(reader: &mut Reader<'_>, settings: &mut Settings) -> LrScheduler {
    let stages: &[(&str, Stage)] = &[
        ("linear", Stage::Linear),
        ("cosine", Stage::Cosine),
        ("1-sqrt", Stage::OneMinusSqrt),
    ];
    let warmup_type = settings.choice(reader, "warmup_type", stages);
    let decay_type = settings.choice(reader, "decay_type", stages);
    LrScheduler::WarmupStableDecay(WarmupStableDecay {
        num_stable_steps: settings.whole(reader, "num_stable_steps", STEPS),
        num_decay_steps: settings.whole(reader, "num_decay_steps", STEPS),
        warmup_type: warmup_type.unwrap_or(Stage::Linear),
        decay_type: decay_type.unwrap_or(Stage::Cosine),
        min_lr_ratio: settings
            .number(reader, "min_lr_ratio", SHARE)
            .unwrap_or(0.0),
        num_cycles: half_a_wave(reader, settings),
    })
}

fn one_cycle(reader: &mut Reader<'_>, settings: &mut Settings) -> LrScheduler {
    let strategies = &[("cos", Anneal::Cos), ("linear", Anneal::Linear)];
    let anneal_strategy = settings.choice(reader, "anneal_strategy", strategies);
    let cycle = OneCycle {
        pct_start: settings.number(reader, "pct_start", SHARE),
        div_factor: settings
            .number(reader, "div_factor", DIVISOR)
            .unwrap_or(25.0),
        final_div_factor: settings
            .number(reader, "final_div_factor", ANY_DIVISOR)
            .unwrap_or(1e4),
        three_phase: settings.switch(reader, "three_phase").unwrap_or(false),
        anneal_strategy: anneal_strategy.unwrap_or(Anneal::Cos),
    };
    if settings.switch(reader, "cycle_momentum").unwrap_or(true) {
        let told = "one_cycle: adam_beta1 stays as it is, where PyTorch moves it between 0.95 and 0.85 too (lr_scheduler_kwargs: \
                    {cycle_momentum: false} says the same as here)";
        reader.notices.push(told.to_owned());
    }
    LrScheduler::OneCycle(cycle)
}

// ---- Axolotl's keys beside lr_scheduler ----

/// What Axolotl's keys say, and which of them the curve took.
struct Beside {
    min_lr_ratio: f64,
    constant_lr_ratio: f64,
    quadratic_warmup: bool,
    is_min_used: bool,
    is_constant_used: bool,
    is_quadratic_used: bool,
}

impl Beside {
    fn read(reader: &mut Reader<'_>) -> Self {
        let mut share = |name| reader.number(name, SHARE.wanted, |value| SHARE.contains(value));
        Self {
            min_lr_ratio: share("cosine_min_lr_ratio").unwrap_or(0.0),
            constant_lr_ratio: share("cosine_constant_lr_ratio").unwrap_or(0.0),
            quadratic_warmup: reader.switch("lr_quadratic_warmup").unwrap_or(false),
            is_min_used: false,
            is_constant_used: false,
            is_quadratic_used: false,
        }
    }

    fn take_min_lr_ratio(&mut self) -> f64 {
        self.is_min_used = true;
        self.min_lr_ratio
    }

    /// Names what was given and changes nothing, as in Axolotl.
    fn tell_unused(&self, reader: &mut Reader<'_>, scheduler: &str) {
        let why = match scheduler {
            "cosine" if self.is_quadratic_used => "lr_quadratic_warmup".to_owned(),
            "cosine" => "no cosine_min_lr_ratio".to_owned(),
            name => format!("lr_scheduler: {name}"),
        };
        for (name, is_unused) in [
            (
                "cosine_min_lr_ratio",
                self.min_lr_ratio > 0.0 && !self.is_min_used,
            ),
            (
                "cosine_constant_lr_ratio",
                self.constant_lr_ratio > 0.0 && !self.is_constant_used,
            ),
            (
                "lr_quadratic_warmup",
                self.quadratic_warmup && !self.is_quadratic_used,
            ),
        ] {
            if is_unused {
                let told = format!("{name}: changes nothing with {why}, as in Axolotl");
                reader.notices.push(told);
            }
        }
    }
}

// ---- lr_scheduler_kwargs ----

/// Refuses settings that the curve does not know; where its owner takes any and reads none, they are named.
fn refuse_unknown(settings: &Settings, reader: &mut Reader<'_>, scheduler: &str, beside: &Beside) {
    let ignored_with = match scheduler {
        "constant" | "constant_with_warmup" => Some(("lr_scheduler: ", scheduler, "Transformers")),
        "rex" => Some(("lr_scheduler: ", scheduler, "Axolotl")),
        "cosine" if beside.is_quadratic_used => Some(("", "lr_quadratic_warmup", "Axolotl")),
        "cosine" if beside.is_min_used => Some(("", "cosine_min_lr_ratio", "Axolotl")),
        _ => None,
    };
    if let Some((field, with, owner)) = ignored_with {
        if settings.unknown().next().is_some() {
            let notice =
                format!("lr_scheduler_kwargs: changes nothing with {field}{with}, as in {owner}");
            reader.notices.push(notice);
        }
        return;
    }
    for key in settings.unknown() {
        let knows = match settings.known.is_empty() {
            true => "it takes none here; remove it".to_owned(),
            false => format!("it knows {}", settings.known.join(", ")),
        };
        let hint = did_you_mean(&key.text, settings.known.iter().copied());
        let message = format!(
            "`lr_scheduler_kwargs` has `{}`, which is no setting of `{scheduler}`: {knows}{hint}",
            shorten(&key.text)
        );
        reader.problems.add(&key.origin, message);
    }
}
