//! The job on the command line: its file, `--set`, and a flag for every name that a field of a job has.
//!
//! The frequent fields are shown in the help; all others, their aliases and the keys of other trainers are known too, with
//! dashes and with underscores, so that a command line that was written for one of those says what becomes of each of its
//! flags. Leaves: the sources of a job.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::builder::OsStringValueParser;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use common::job::{self, FlagValue, JobErrors, JobSources, JobSpec, Origin, Problem};
use common::progress::Progress;

use crate::prepare::obtain_adapter;

/// The job, and what of it is said on the command line.
#[derive(Clone, Debug, Default)]
pub struct JobArguments {
    /// Job file; not needed where flags say it all.
    pub job: Option<PathBuf>,
    /// `FIELD=VALUE` of each `--set`, in order.
    set: Vec<OsString>,
    /// Flags of their own and their values, in order.
    flags: Vec<(String, OsString)>,
}

/// Flags that the help shows: name, placeholder, meaning.
const SHOWN: &[(&str, &str, &str)] = &[
    (
        "base-model",
        "MODEL",
        "Model to fine-tune: a folder, or an id on the Hugging Face hub",
    ),
    (
        "dataset",
        "DATA",
        "What to train on: a file, folder, pattern, or an id on the hub; may be given several times",
    ),
    ("output-dir", "DIR", "Where results and checkpoints go"),
    ("adapter", "KIND", "lora, or full to train every weight"),
    ("lora-r", "R", "Rank of the adapter"),
    ("learning-rate", "RATE", "Peak learning rate"),
    ("num-epochs", "N", "Passes over the data"),
    ("max-steps", "N", "Stop after this many steps"),
    ("sequence-len", "TOKENS", "Tokens in a block"),
    ("global-batch-size", "BLOCKS", "Blocks in a step"),
    (
        "micro-batch-size",
        "BLOCKS",
        "Blocks that go through the model at once",
    ),
    (
        "val-set-size",
        "SIZE",
        "How much of the data is held out for evaluation: a fraction, or a number of examples",
    ),
    (
        "save-steps",
        "STEPS",
        "Steps between two checkpoints, or auto: as often as costs at most 1% of the time",
    ),
    ("logging-steps", "STEPS", "Steps between two printed lines"),
    (
        "seed",
        "SEED",
        "Decides the order of the data, dropout and new weights",
    ),
    ("resume", "FROM", "auto, never or a checkpoint folder"),
    (
        "test-prompt",
        "TEXT",
        "Asked before and after training; may be given several times",
    ),
    ("min-workers", "N", "The run waits below this many workers"),
];

const HEADING: &str = "Job (fields of docs/job.md without a dot are flags, with - or _)";

impl JobArguments {
    /// Reads the job from its file, this process's environment and the flags.
    /// Fetches the adapter that the job starts from, where that is on the hub.
    pub fn load(&self, progress: &Progress) -> Result<JobSpec, JobErrors> {
        let mut problems = Vec::new();
        let environment = muster_environment(&mut problems);
        let flags = self.flags(&mut problems);
        if !problems.is_empty() {
            return Err(JobErrors { problems });
        }
        let sources = JobSources {
            file: self.job.clone(),
            environment,
            flags,
        };
        job::load_with_adapter(sources, &|request| obtain_adapter(request, progress))
    }

    /// The flags as a job's source: each `--set`, then the flags of their own.
    fn flags(&self, problems: &mut Vec<Problem>) -> Vec<(String, String)> {
        let mut flags: Vec<(String, String)> = Vec::new();
        for pair in &self.set {
            match pair.to_str().map(parse_pair) {
                Some(Some(pair)) => flags.push(pair),
                Some(None) => problems.push(Problem {
                    origin: Origin::Flag("--set".to_owned()),
                    message: "write FIELD=VALUE, for example learning_rate=1e-4".to_owned(),
                }),
                None => problems.push(not_text(Origin::Flag("--set".to_owned()), pair)),
            }
        }
        // Where each list stands among the flags, and its entries.
        let mut lists: Vec<(usize, &str, Vec<&str>)> = Vec::new();
        for (name, value) in &self.flags {
            let Some(value) = value.to_str() else {
                problems.push(not_text(Origin::Flag(name.clone()), value));
                continue;
            };
            let (FlagValue::Entry(field) | FlagValue::List(field)) = job::flag_value(name) else {
                flags.push((name.clone(), value.to_owned()));
                continue;
            };
            match lists.iter_mut().find(|(_, of, _)| *of == field) {
                Some((_, _, entries)) => entries.push(value),
                None => {
                    lists.push((flags.len(), field, vec![value]));
                    flags.push((name.clone(), String::new()));
                }
            }
        }
        for (at, _, entries) in lists {
            let (name, value) = &mut flags[at];
            *value = match job::flag_value(name) {
                FlagValue::List(_) => entries.join(","),
                // A JSON list is a YAML list, whatever the texts hold.
                _ => serde_json::json!(entries).to_string(),
            };
        }
        flags
    }

    /// A switch takes the next word for its value, and a list all of them, so that either may have taken the job file.
    fn give_back_the_job(&mut self) {
        if self.job.is_some() {
            return;
        }
        let is_file = |value: &OsString| {
            let text = value.to_string_lossy();
            [".yaml", ".yml", ".json"]
                .iter()
                .any(|end| text.ends_with(end))
        };
        let taken = self.flags.iter().position(|(name, value)| {
            let may = matches!(
                job::flag_value(name),
                FlagValue::Switch | FlagValue::List(_)
            );
            may && is_file(value)
        });
        if let Some(taken) = taken {
            let (name, value) = self.flags.remove(taken);
            if job::flag_value(&name) == FlagValue::Switch {
                self.flags.insert(taken, (name, "true".into()));
            }
            self.job = Some(value.into());
        }
    }
}

impl Args for JobArguments {
    fn augment_args(command: Command) -> Command {
        let file = Arg::new("job")
            .value_name("JOB")
            .help("Job file (YAML); not needed where flags say it all")
            .value_parser(clap::value_parser!(PathBuf));
        // As TRL's command line has it.
        let config = Arg::new("config")
            .long("config")
            .value_name("JOB")
            .value_parser(clap::value_parser!(PathBuf))
            .conflicts_with("job")
            .hide(true);
        let set = Arg::new("set")
            .long("set")
            .value_name("FIELD=VALUE")
            .help("Any field of the job, for example learning_rate=1e-4 or datasets.0.path=chat.jsonl")
            .action(ArgAction::Append)
            .value_parser(OsStringValueParser::new())
            .help_heading(HEADING);
        let shown = SHOWN.iter().filter_map(|(name, placeholder, help)| {
            let name = NAMES.iter().find(|known| known.dashed == *name)?;
            Some(flag(name).value_name(*placeholder).help(*help))
        });
        let is_shown = |name: &&Name| SHOWN.iter().any(|(shown, ..)| *shown == name.dashed);
        let hidden = NAMES.iter().filter(|name| !is_shown(name));
        let hidden = hidden.map(|name| flag(name).value_name("VALUE").hide(true));
        command.args([file, config, set]).args(shown).args(hidden)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// A flag in its spellings.
struct Name {
    /// `--base-model`
    id: String,
    /// `base-model`
    dashed: String,
    /// `base_model`
    underscored: String,
    /// Whether it stands alone and says no.
    is_negation: bool,
}

static NAMES: LazyLock<Vec<Name>> = LazyLock::new(|| {
    let name = |underscored: String, is_negation| {
        let dashed = underscored.replace('_', "-");
        Name {
            id: format!("--{dashed}"),
            dashed,
            underscored,
            is_negation,
        }
    };
    let names = job::flag_names().map(|named| name(named.to_owned(), false));
    names
        .chain(job::negations().map(|named| name(named, true)))
        .collect()
});

/// `--base-model`, which may be written `--base_model`.
fn flag(name: &'static Name) -> Arg {
    let arg = Arg::new(name.id.as_str())
        .long(name.dashed.as_str())
        .action(ArgAction::Append)
        .value_parser(OsStringValueParser::new())
        .allow_negative_numbers(true)
        .help_heading(HEADING);
    let arg = match name.dashed == name.underscored {
        true => arg,
        false => arg.alias(name.underscored.as_str()),
    };
    if name.is_negation {
        // The next word is none of its own.
        let arg = arg.num_args(0..=1).require_equals(true);
        return arg.default_missing_value("true");
    }
    match job::flag_value(&name.id) {
        FlagValue::Switch | FlagValue::Foreign => arg.num_args(0..=1).default_missing_value("true"),
        FlagValue::List(_) => arg.num_args(1..),
        FlagValue::Entry(_) | FlagValue::One => arg,
    }
}

impl FromArgMatches for JobArguments {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut arguments = Self::default();
        arguments.update_from_arg_matches(matches)?;
        Ok(arguments)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let values = |id: &str| {
            let values = matches.try_get_raw(id).ok().flatten();
            let values = values.into_iter().flatten().map(OsString::from);
            let indices = matches.indices_of(id).into_iter().flatten();
            indices.zip(values).collect::<Vec<_>>()
        };
        let file = |id: &str| matches.get_one::<PathBuf>(id).cloned();
        self.job = file("job").or_else(|| file("config"));
        self.set = values("set").into_iter().map(|(_, value)| value).collect();
        let ids = matches
            .ids()
            .map(|id| id.as_str())
            .filter(|id| id.starts_with("--"));
        let mut flags: Vec<(usize, String, OsString)> = ids
            .flat_map(|id| {
                let values = values(id).into_iter();
                values.map(move |(index, value)| (index, id.to_owned(), value))
            })
            .collect();
        flags.sort_by_key(|(index, ..)| *index);
        let named = flags.into_iter().map(|(_, name, value)| (name, value));
        self.flags = named.collect();
        self.give_back_the_job();
        Ok(())
    }
}

/// `std::env::vars` would panic on text that is not Unicode.
fn muster_environment(problems: &mut Vec<Problem>) -> Vec<(String, String)> {
    let is_ours = |(name, _): &(OsString, OsString)| name.to_string_lossy().starts_with("MUSTER_");
    let mut variables = Vec::new();
    for (name, value) in std::env::vars_os().filter(is_ours) {
        let name = name.to_string_lossy().into_owned();
        match value.into_string() {
            Ok(value) => variables.push((name, value)),
            Err(value) => problems.push(not_text(Origin::Environment(name), &value)),
        }
    }
    variables
}

/// Paths go into the records of a run, which are JSON.
fn not_text(origin: Origin, value: &OsString) -> Problem {
    Problem {
        origin,
        message: format!(
            "{value:?} is not UTF-8 text, as the records of a run have to be; rename it, or name it through a link"
        ),
    }
}

fn parse_pair(text: &str) -> Option<(String, String)> {
    let (name, value) = text.split_once('=')?;
    (!name.trim().is_empty()).then(|| (name.trim().to_owned(), value.to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::arguments::{Arguments, Command as Chosen};
    use common::job::{BaseDtype, Checkpointing, Method, TargetModules};

    fn parse(words: &[&str]) -> Result<JobArguments, clap::Error> {
        let line = ["coordinator", "check"].iter().chain(words);
        match Arguments::try_parse_from(line)?.command {
            Chosen::Check(check) => Ok(check.job),
            other => panic!("not check: {other:?}"),
        }
    }

    fn arguments(line: &str) -> JobArguments {
        parse(&line.split(' ').collect::<Vec<_>>()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The flags of a command line as a job's source.
    fn flags(line: &str) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        let flags = arguments(line).flags(&mut problems);
        assert!(problems.is_empty(), "{problems:?}");
        flags
    }

    fn job_of(line: &str) -> Result<JobSpec, JobErrors> {
        job::load(JobSources {
            flags: flags(line),
            ..JobSources::default()
        })
    }

    #[test]
    fn flags_and_settings_are_kept_in_their_order() {
        let line = "job.yaml --lora-r 8 --set lora_r=4 --set cluster.min_workers=2 --dataset a.jsonl --lr 2 --dataset [b].jsonl \
                    --learning_rate 3";
        let flags = flags(line);
        let pairs: Vec<(&str, &str)> = flags
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_str()))
            .collect();
        assert_eq!(
            pairs,
            [
                ("lora_r", "4"),
                ("cluster.min_workers", "2"),
                ("--lora-r", "8"),
                ("--dataset", r#"["a.jsonl","[b].jsonl"]"#),
                ("--lr", "2"),
                ("--learning-rate", "3"),
            ]
        );
        assert_eq!(arguments(line).job, Some("job.yaml".into()));
    }

    #[test]
    fn a_command_line_for_another_trainer_is_understood() {
        let job = job_of(
            "--model_name_or_path m --dataset_name d.jsonl --use_peft --lora_r 4 --lora_target_modules q_proj v_proj \
             --learning_rate 1e-4 --num_train_epochs 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 4 \
             --max_seq_length 64 --lr_scheduler_type constant_with_warmup --warmup_ratio 0.1 --bf16 True --packing False \
             --gradient_checkpointing --seed 7 --max_steps -1 --optim adamw_torch --tf32 True --remove_unused_columns False \
             --min_workers 3",
        )
        .unwrap_or_else(|errors| panic!("{errors}"));
        let Method::Lora(lora) = &job.method else {
            panic!("not lora")
        };
        let modules = vec!["q_proj".to_owned(), "v_proj".to_owned()];
        assert_eq!(lora.target_modules, TargetModules::Named(modules));
        assert_eq!(
            (lora.r, job.global_batch_size, job.micro_batch_size),
            (4, 8, 2)
        );
        assert_eq!(
            (job.learning_rate, job.num_epochs, job.max_steps),
            (1e-4, 2.0, None)
        );
        assert_eq!(
            (job.base_dtype, job.sample_packing),
            (BaseDtype::Bfloat16, false)
        );
        assert_eq!(job.gradient_checkpointing, Checkpointing::Always);
        assert_eq!(
            (job.sequence_len, job.seed, job.cluster.min_workers),
            (64, 7, 3)
        );
        assert_eq!(
            job.reading.notices,
            ["not needed here: tf32, remove_unused_columns"]
        );
        let refused = job_of(
            "--base_model m --dataset d --load_in_4bit --optim galore_adamw --deepspeed z3.json",
        )
        .unwrap_err();
        assert_eq!(refused.problems.len(), 2, "{refused}");
    }

    #[test]
    fn a_switch_is_switched_off_as_transformers_does_it() {
        let job = job_of(
            "--model_name_or_path m --dataset_name d --no_remove_unused_columns --no-sample-packing --no_shuffle_dataset",
        )
        .unwrap_or_else(|errors| panic!("{errors}"));
        assert!(!job.sample_packing && !job.shuffle);
        assert_eq!(
            job.reading.notices,
            ["not needed here: remove_unused_columns"]
        );
        let of = |line: &str| job_of(line).unwrap_err().to_string();
        let refused = of("--base_model m --dataset d --no_average_tokens_across_devices");
        assert!(
            refused
                .starts_with("--no-average-tokens-across-devices: `average_tokens_across_devices`"),
            "{refused}"
        );
        let both = of("--base_model m --dataset d --shuffle --no_shuffle");
        assert!(
            both.contains("--no-shuffle: gives `false`, but --shuffle gives `true`"),
            "{both}"
        );
        let file = arguments("--no_shuffle job.yaml");
        assert_eq!(file.job, Some("job.yaml".into()));
        // What is no switch has no such flag, and one that is a name of its own is itself.
        assert!(parse(&["--no_learning_rate"]).is_err());
        assert!(of("--base_model m --dataset d --no_cuda").contains("--device of `start`"));
        assert!(parse(&["--no_no_cuda"]).is_err());
    }

    #[test]
    fn every_name_of_a_field_is_a_flag_in_both_spellings() {
        for name in job::flag_names() {
            for flag in [format!("--{name}"), format!("--{}", name.replace('_', "-"))] {
                let parsed =
                    parse(&["job.yaml", &flag, "{"]).unwrap_or_else(|error| panic!("{error}"));
                let errors = job::load(JobSources {
                    flags: parsed.flags(&mut Vec::new()),
                    ..JobSources::default()
                });
                let text = errors
                    .err()
                    .map(|errors| errors.to_string())
                    .unwrap_or_default();
                assert!(!text.contains("unknown field"), "{flag}: {text}");
            }
        }
    }

    #[test]
    fn an_unknown_flag_is_told_its_neighbour() {
        for (flag, meant) in [
            ("--lerning_rate", "--learning"),
            ("--base-modle", "--base"),
            ("--num_train_epoch", "--num_train_epochs"),
        ] {
            let error = parse(&["job.yaml", flag, "1"]).unwrap_err().to_string();
            assert!(error.contains(meant), "{error}");
        }
    }

    #[test]
    fn the_job_file_behind_a_switch_or_a_list_is_the_job_file() {
        let after_switch = arguments("--use_peft job.yaml");
        assert_eq!(after_switch.job, Some("job.yaml".into()));
        assert_eq!(
            flags("--use_peft job.yaml"),
            [("--use-peft".to_owned(), "true".to_owned())]
        );
        let after_list = arguments("--target_modules q_proj v_proj job.yml");
        assert_eq!(after_list.job, Some("job.yml".into()));
    }

    #[test]
    fn the_help_is_a_page() {
        let error = parse(&["--help"]).unwrap_err().to_string();
        assert!(
            error.contains("docs/job.md") && error.contains("--learning-rate"),
            "{error}"
        );
        assert!(error.lines().count() < 70, "{error}");
        assert!(!error.contains("--wandb"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_value_that_is_no_text_is_named() {
        use std::os::unix::ffi::OsStrExt;
        let path = std::ffi::OsStr::from_bytes(b"caf\xe9");
        let words = ["coordinator", "check", "--output-dir"].map(OsString::from);
        let line = words.into_iter().chain([path.to_owned()]);
        let Chosen::Check(check) = Arguments::try_parse_from(line).unwrap().command else {
            panic!("not check")
        };
        let errors = check.job.load(&Progress::default()).unwrap_err();
        let [problem] = errors.problems.as_slice() else {
            panic!("{errors}")
        };
        let text = problem.to_string();
        assert!(
            text.starts_with("--output-dir: \"caf\\xE9\" is not UTF-8 text"),
            "{text}"
        );
    }

    #[test]
    fn set_wants_a_field_and_a_value() {
        let errors = arguments("job.yaml --set learning_rate")
            .load(&Progress::default())
            .unwrap_err();
        assert_eq!(
            errors.to_string(),
            "--set: write FIELD=VALUE, for example learning_rate=1e-4"
        );
    }
}
