//! What of this process's command line can be said again: on other machines, or to go on after a stop.

use std::ffi::OsString;

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
pub fn job_words(line: impl Iterator<Item = OsString>) -> Vec<String> {
    let words = line.map(|word| word.to_string_lossy().into_owned());
    let mut words = words.skip_while(|word| word != "start").skip(1);
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        let name = word.split('=').next().unwrap_or(&word);
        match OF_THIS_RUN.iter().find(|(option, _)| *option == name) {
            // A value after an equals sign is part of the word.
            Some((_, has_value)) if *has_value && name == word => drop(words.next()),
            Some(_) => {}
            None => kept.push(word),
        }
    }
    kept
}

/// The command line that goes on where a run with this one stopped. `begins_anew`: by itself it would not.
pub fn resume_words(line: impl Iterator<Item = OsString>, begins_anew: bool) -> Vec<String> {
    let mut words = line.map(|word| word.to_string_lossy().into_owned());
    if !begins_anew {
        return words.collect();
    }
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--resume" => drop(words.next()),
            "--set" => {
                let value = words.next();
                if let Some(value) = value.filter(|value| !value.starts_with("resume=")) {
                    kept.extend([word, value]);
                }
            }
            _ if word.starts_with("--resume=") || word.starts_with("--set=resume=") => {}
            _ => kept.push(word),
        }
    }
    kept.extend(["--resume", "auto"].map(str::to_owned));
    kept
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::args::Arguments;

    fn words(line: &str) -> impl Iterator<Item = OsString> {
        line.split(' ').map(OsString::from)
    }

    #[test]
    fn what_is_said_of_the_job_can_be_said_again_elsewhere() {
        let kept = |line: &str| job_words(line.split(' ').map(OsString::from)).join(" ");
        assert_eq!(
            kept(
                "bin/coordinator start --single-node job.yaml --output-dir=out --max-steps 10 --threads 4 \
                 --set seed=7 --local-workers=2 --listen 127.0.0.1:1 --token-file start"
            ),
            "job.yaml --max-steps 10 --set seed=7 --token-file start"
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
    fn the_command_that_goes_on_does_not_begin_anew() {
        let line = "coordinator start job.yaml --set seed=1";
        let again = |line: &str, begins_anew| resume_words(words(line), begins_anew).join(" ");
        assert_eq!(again(line, false), line);
        assert_eq!(again(line, true), format!("{line} --resume auto"));
        for said in [
            "--resume never",
            "--resume=never",
            "--set resume=never",
            "--set=resume=never",
        ] {
            assert_eq!(
                again(&format!("{line} {said}"), true),
                format!("{line} --resume auto")
            );
        }
    }
}
