//! What of this process's command line can be said again: on other machines, to go on after a stop, or in a record that
//! others read.

use std::ffi::OsString;

use common::text::{MAX_REASON_CHARACTERS, one_line};

/// Options of `start` that say where this run goes and on which machine, and whether a value follows.
const OF_THIS_RUN: [(&str, bool); 6] = [
    ("--single-node", false),
    ("--local-workers", true),
    ("--threads", true),
    ("--device", true),
    ("--listen", true),
    ("--output-dir", true),
];

/// What of a command line that was understood as `start` belongs to the job: it can be said again on other machines.
pub fn job_args(line: impl Iterator<Item = OsString>) -> Vec<String> {
    let words = line.map(|word| word.to_string_lossy().into_owned());
    let mut words = words.skip_while(|word| word != "start").skip(1);
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        let name = word.split('=').next().unwrap_or(&word);
        let with_dashes = name.replace('_', "-");
        match OF_THIS_RUN
            .iter()
            .find(|(option, _)| *option == with_dashes)
        {
            // A value after an equals sign is part of the word.
            Some((_, has_value)) if *has_value && name == word => drop(words.next()),
            Some(_) => {}
            None => kept.push(word),
        }
    }
    without_secrets(kept.into_iter())
}

/// Names of the field that says where a run begins.
const RESUME: [&str; 3] = [
    "resume",
    "resume_from_checkpoint",
    "auto_resume_from_checkpoints",
];

/// The command line that goes on where a run with this one stopped. `begins_anew`: by itself it would not.
pub fn resume_args(line: impl Iterator<Item = OsString>, begins_anew: bool) -> Vec<String> {
    let mut words = line.map(|word| word.to_string_lossy().into_owned());
    if !begins_anew {
        return without_secrets(words);
    }
    let says_where_to_begin = |pair: &str| {
        let name = pair.split_once('=').map_or(pair, |(name, _)| name);
        let name = name.trim().replace('-', "_");
        RESUME.contains(&name.as_str())
    };
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        if word == "--set" {
            let value = words.next();
            if let Some(value) = value.filter(|value| !says_where_to_begin(value)) {
                kept.extend([word, value]);
            }
            continue;
        }
        let setting = word.strip_prefix("--set=");
        match setting.or_else(|| word.strip_prefix("--")) {
            Some(pair) if says_where_to_begin(pair) => {
                if setting.is_none() && !word.contains('=') {
                    drop(words.next());
                }
            }
            _ => kept.push(word),
        }
    }
    kept.extend(["--resume", "auto"].map(str::to_owned));
    without_secrets(kept.into_iter())
}

/// Options and fields whose values are nobody else's business. Names of files with secrets are no secrets.
const SECRET: [&str; 5] = ["api_key", "auth_token", "hub_token", "password", "secret"];
const HIDDEN: &str = "***";
/// Of a recorded command line.
const MAX_RECORDED_WORDS: usize = 256;

/// The command line for a record that others read: without what may be secret, and without control characters.
pub fn recorded_args(line: impl Iterator<Item = OsString>) -> Vec<String> {
    let words = line
        .take(MAX_RECORDED_WORDS)
        .map(|word| one_line(&word.to_string_lossy(), MAX_REASON_CHARACTERS));
    without_secrets(words)
}

/// The words with the values hidden that may be secret. No field of a job is: what is hidden changes nothing of the run.
fn without_secrets(words: impl Iterator<Item = String>) -> Vec<String> {
    let mut kept = Vec::new();
    let mut hides_next = false;
    for word in words {
        let hides = std::mem::take(&mut hides_next);
        let (name, value) = match word.rsplit_once('=') {
            // `--set=hub_token=VALUE`, `hub_token=VALUE`, `--hub-token=VALUE`.
            Some((name, value)) => (name, Some(value)),
            None => (word.as_str(), None),
        };
        kept.push(match value {
            _ if hides => HIDDEN.to_owned(),
            Some(_) if is_secret(name) => format!("{name}={HIDDEN}"),
            Some(_) if holds_secret(&word) => {
                let name = word.split('=').next().unwrap_or_default();
                format!("{name}={HIDDEN}")
            }
            None if holds_secret(&word) => HIDDEN.to_owned(),
            _ => without_credentials(&word),
        });
        hides_next = value.is_none() && name.starts_with("--") && is_secret(name);
    }
    kept
}

/// Whether a key of a mapping, or of an address's query, names a secret: `{api_key: VALUE}`, `host?token=VALUE`.
fn holds_secret(word: &str) -> bool {
    let word = word.to_lowercase().replace(['-', '"', '\''], "_");
    let is_named = |secret: &&str| {
        word.match_indices(*secret).any(|(at, _)| {
            let after = word[at + secret.len()..].trim_start_matches(['_', ' ']);
            let is_key = word[..at].contains(['{', ',', '?', '&']);
            is_key && after.starts_with([':', '='])
        })
    };
    SECRET.iter().chain(&["token"]).any(is_named)
}

fn is_secret(name: &str) -> bool {
    let name = name.to_lowercase().replace('-', "_");
    SECRET.iter().any(|secret| name.ends_with(secret))
}

/// `https://user:secret@host` and tokens of the Hugging Face hub.
fn without_credentials(word: &str) -> String {
    if let Some((scheme, rest)) = word.split_once("://")
        && let Some((_, host)) = rest.split_once('@')
    {
        return format!("{scheme}://{HIDDEN}@{host}");
    }
    match word.find("hf_") {
        Some(at) if word.len() - at > 20 => format!("{}{HIDDEN}", &word[..at]),
        _ => word.to_owned(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::arguments::Arguments;

    fn words(line: &str) -> impl Iterator<Item = OsString> {
        line.split(' ').map(OsString::from)
    }

    #[test]
    fn what_is_said_of_the_job_can_be_said_again_elsewhere() {
        let kept = |line: &str| job_args(line.split(' ').map(OsString::from)).join(" ");
        assert_eq!(
            kept(
                "bin/coordinator start --single-node job.yaml --output-dir=out --max-steps 10 --threads 4 \
                 --set seed=7 --local-workers=2 --listen 127.0.0.1:1 --token-file start"
            ),
            "job.yaml --max-steps 10 --set seed=7 --token-file start"
        );
        assert_eq!(
            kept("coordinator start job.yaml --single_node --output_dir out --learning_rate 1e-4"),
            "job.yaml --learning_rate 1e-4"
        );
        // Every option that is no field of the job is one of those, but for the token's.
        let command = Arguments::command();
        let start = command.find_subcommand("start").unwrap();
        let machine = |arg: &&clap::Arg| arg.get_help_heading() == Some("Machines");
        for option in start.get_arguments().filter(machine) {
            let name = format!("--{}", option.get_long().unwrap());
            let takes_value = option.get_action().takes_values();
            let known = OF_THIS_RUN.contains(&(&name, takes_value));
            assert!(known || name == "--token-file", "{name}");
        }
    }

    #[test]
    fn a_record_of_the_command_line_keeps_no_secret() {
        let recorded = |line: &str| recorded_args(words(line)).join(" ");
        let harmless =
            "coordinator start job.yaml --token-file secrets/token --set lora_r=4 --set=seed=1";
        assert_eq!(recorded(harmless), harmless);
        for (said, kept) in [
            ("--set hub_token=abc", "--set hub_token=***"),
            ("--set=hub_token=abc", "--set=hub_token=***"),
            ("--hub-token abc --seed 1", "--hub-token *** --seed 1"),
            ("--api_key=a", "--api_key=***"),
            ("--set fsdp_config={api_key:abc}", "--set fsdp_config=***"),
            ("--set x={a:1,token:abc}", "--set x=***"),
            ("--deepspeed x?token=abc", "--deepspeed x?token=***"),
            (
                "--set datasets.0.path=token.jsonl",
                "--set datasets.0.path=token.jsonl",
            ),
            (
                "--base-model https://me:pass@host/model",
                "--base-model https://***@host/model",
            ),
            ("--x hf_abcdefghijklmnopqrstuvwxyz", "--x ***"),
            ("--x a\x1b[2Jb", "--x a␛[2Jb"),
        ] {
            assert_eq!(recorded(said), kept);
        }
        assert!(recorded(&"a ".repeat(10_000)).len() < 1000);
    }

    #[test]
    fn the_command_that_goes_on_does_not_begin_anew() {
        let line = "coordinator start job.yaml --set seed=1";
        let again = |line: &str, begins_anew| resume_args(words(line), begins_anew).join(" ");
        assert_eq!(again(line, false), line);
        assert_eq!(again(line, true), format!("{line} --resume auto"));
        for said in [
            "--resume never",
            "--resume=never",
            "--set resume=never",
            "--set=resume=never",
            "--resume-from-checkpoint never",
            "--resume_from_checkpoint=never",
            "--set auto_resume_from_checkpoints=false",
        ] {
            assert_eq!(
                again(&format!("{line} {said}"), true),
                format!("{line} --resume auto")
            );
        }
    }
}
