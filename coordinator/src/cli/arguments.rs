//! Command line of the coordinator: flags become plain options and the sources of a job. Decides nothing else.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use common::logging;

use super::config::ConfigCommand;
use super::job::JobArguments;
use super::push::PushArguments;
use crate::version;

const EXAMPLES: &str = "\
Examples:
  One machine, one process:
    coordinator start job.yaml --single-node
  Several machines; then on each of the others: worker join HOST:7077
    coordinator start job.yaml --listen 0.0.0.0:7077
  Other values than the job file's:
    coordinator start job.yaml --learning-rate 1e-4 --min-workers 2
  Without a job file:
    coordinator start --base-model models/tiny --dataset chat.jsonl \\
      --adapter lora --single-node
  What would be trained, without training:
    coordinator check job.yaml --show 3
  The data alone, for later runs that read it in the same way:
    coordinator preprocess job.yaml

A value of the job file gives way to the environment
(MUSTER_LEARNING_RATE=1e-4), and that to a flag.";

const EXIT_CODES: &str = "\
Exit codes:
    0  done
    1  the job failed, or cannot start now: port or output folder in use;
       or what was asked for cannot be printed
    2  wrong usage, or an error in the job file
    3  model, data, machine or output folder would not do
   75  stopped, and the same command goes on
  130  Ctrl-C, after saving a checkpoint";

const START_EXAMPLES: &str = "\
Examples:
  coordinator start job.yaml --single-node
  coordinator start job.yaml --single-node --local-workers 2 --threads 4
  coordinator start job.yaml --single-node --device cuda:0,cuda:1
  coordinator start job.yaml --listen 0.0.0.0:7077 --token-file token
  coordinator start job.yaml --max-steps 10 --output-dir trial --resume never

Run again after it was stopped, it goes on where it was.
Fields of docs/job.md without a dot, and aliases, are flags (--lr 1e-4);
--set takes them too, and those of a data set or of cluster:
  --set datasets.0.field_messages=conversations";

/// Fine-tunes language models on whatever machines are at hand
#[derive(Debug, Parser)]
#[command(
    name = "coordinator",
    version,
    long_version = version::long(),
    after_help = EXAMPLES,
    after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"),
    max_term_width = 110
)]
pub struct Arguments {
    /// What of the log is shown: off, error, warn, info, debug, trace, or MODULE=LEVEL [default: warn, or as MUSTER_LOG or
    /// RUST_LOG says]
    #[arg(long, global = true, value_name = "LEVEL", value_parser = logging::parse_level)]
    pub log_level: Option<String>,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a job: wait for workers, train, write the result
    #[command(after_help = START_EXAMPLES, after_long_help = format!("{START_EXAMPLES}\n\n{EXIT_CODES}"))]
    Start(StartArguments),
    /// Say everything about a job that can be known before training
    Check(CheckArguments),
    /// Prepare a job's data without training: later runs find it
    Preprocess(PreprocessArguments),
    /// Print a job file in Muster's own spelling, or the schema of job files
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Push the result of a run that is done to the Hugging Face hub
    Push(PushArguments),
    /// Print a script that completes this command line in a shell
    ///
    /// For bash: source <(coordinator completions bash)
    Completions {
        #[arg(value_name = "SHELL")]
        shell: Shell,
    },
    /// Print the manual page of this program, or of one of its commands
    ///
    /// To read it: coordinator man start | man -l -
    Man {
        #[arg(value_name = "COMMAND")]
        command: Option<String>,
    },
}

#[derive(Debug, Args)]
pub struct StartArguments {
    #[command(flatten)]
    pub job: JobArguments,

    /// Train in this process too; no worker has to join
    #[arg(long, alias = "single_node", help_heading = "Machines")]
    pub single_node: bool,

    /// Workers inside this process
    #[arg(
        long,
        alias = "local_workers",
        value_name = "N",
        requires = "single_node",
        value_parser = count(1..=64),
        help_heading = "Machines"
    )]
    pub local_workers: Option<usize>,

    /// Threads of each worker inside this process [default: all cores, shared out]
    #[arg(long, value_name = "N", requires = "single_node", value_parser = count(1..=1024), help_heading = "Machines")]
    pub threads: Option<usize>,

    /// What workers inside this process compute on; of several (cuda:0,cuda:1) each takes the next, and there are as many workers unless
    /// --local-workers says otherwise [default: auto, the first GPU that this program can use, or else the processor]
    #[cfg(feature = "single-node")]
    #[arg(
        long,
        value_name = "auto|cpu|cuda|cuda:N",
        requires = "single_node",
        value_delimiter = ',',
        help_heading = "Machines"
    )]
    pub device: Vec<worker::Device>,

    /// Address for workers [default: 127.0.0.1:7077, or any free port of 127.0.0.1 with --single-node]
    #[arg(long, value_name = "HOST:PORT", env = "MUSTER_LISTEN", value_parser = parse_address, help_heading = "Machines")]
    pub listen: Option<String>,

    /// File with the secret that workers must show
    #[arg(
        long,
        alias = "token_file",
        value_name = "FILE",
        env = "MUSTER_TOKEN_FILE",
        help_heading = "Machines"
    )]
    pub token_file: Option<PathBuf>,
}

impl StartArguments {
    /// Where to listen, `HOST:PORT`.
    pub fn listen_address(&self) -> &str {
        let default = match self.single_node {
            true => "127.0.0.1:0",
            false => "127.0.0.1:7077",
        };
        self.listen.as_deref().unwrap_or(default)
    }

    /// 0 without `--single-node`.
    pub fn local_workers(&self) -> usize {
        match self.single_node {
            true => self.local_workers.unwrap_or(self.devices().max(1)),
            false => 0,
        }
    }

    /// How many devices are named for the workers in this process.
    fn devices(&self) -> usize {
        #[cfg(feature = "single-node")]
        return self.device.len();
        #[cfg(not(feature = "single-node"))]
        0
    }
}

#[derive(Debug, Args)]
pub struct CheckArguments {
    #[command(flatten)]
    pub job: JobArguments,

    /// Rendered examples to show, with their tokens and what of them is trained
    #[arg(long, value_name = "N", default_value = "1", value_parser = count(0..=1000))]
    pub show: usize,

    /// Print one JSON document instead
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PreprocessArguments {
    #[command(flatten)]
    pub job: JobArguments,
}

fn parse_address(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            Ok(text.to_owned())
        }
        _ => Err("write HOST:PORT, for example 0.0.0.0:7077".to_owned()),
    }
}

fn count(
    range: std::ops::RangeInclusive<usize>,
) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync {
    move |text: &str| match text.parse::<usize>() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!(
            "must be a number from {} to {}",
            range.start(),
            range.end()
        )),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::exit;
    use clap::CommandFactory;

    fn start(line: &str) -> StartArguments {
        let words = ["coordinator", "start"].into_iter().chain(line.split(' '));
        match Arguments::try_parse_from(words).unwrap().command {
            Command::Start(start) => start,
            _ => panic!("not start"),
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_help_fits_80_columns_and_its_examples_can_be_copied() {
        let mut command = Arguments::command().term_width(80);
        command.build();
        let commands: Vec<clap::Command> = command.get_subcommands().cloned().collect();
        for command in commands.iter().chain([&command]) {
            let help = command.clone().render_long_help().to_string();
            for line in help.lines() {
                assert!(line.chars().count() <= 80, "{line}");
            }
        }
        let help = |name: &str| {
            let found = commands.iter().find(|command| command.get_name() == name);
            found.unwrap().clone().render_long_help().to_string()
        };
        let whole = command.clone().render_long_help().to_string();
        for (help, part) in [
            (&whole, EXAMPLES),
            (&whole, EXIT_CODES),
            (&help("start"), START_EXAMPLES),
            (&help("start"), EXIT_CODES),
        ] {
            assert!(help.contains(part), "{help}");
        }
    }

    #[test]
    fn it_says_what_it_is_and_how_it_is_completed() {
        let version = Arguments::command().render_long_version().to_string();
        for part in ["commit ", "features ", "instruction set ", common::VERSION] {
            assert!(version.contains(part), "{version}");
        }
        let script = common::manual::completions(Arguments::command(), Shell::Bash);
        assert!(String::from_utf8(script).unwrap().contains("--single-node"));
        let page = |of| common::manual::page(Arguments::command(), of);
        let start = String::from_utf8(page(Some("start")).unwrap()).unwrap();
        assert!(start.contains(".TH coordinator-start"), "{start}");
        assert!(page(None).is_ok());
        let error = page(Some("stop")).unwrap_err();
        assert!(error.contains("start, check"), "{error}");
    }

    #[test]
    fn single_node_listens_on_a_free_port_of_the_loopback() {
        assert_eq!(start("job.yaml").listen_address(), "127.0.0.1:7077");
        assert_eq!(start("job.yaml").local_workers(), 0);
        assert_eq!(
            start("job.yaml --single-node").listen_address(),
            "127.0.0.1:0"
        );
        assert_eq!(start("job.yaml --single-node").local_workers(), 1);
        #[cfg(feature = "single-node")]
        {
            let on_two = start("job.yaml --single-node --device cuda:0,cuda:1");
            assert_eq!(on_two.local_workers(), 2);
            let shared = start("job.yaml --single-node --device cuda:1 --local-workers 3");
            assert_eq!(shared.local_workers(), 3);
        }
        assert_eq!(
            start("job.yaml --single-node --listen 0.0.0.0:1").listen_address(),
            "0.0.0.0:1"
        );
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            "job.yaml --listen 7077",
            "job.yaml --listen host:port",
            "job.yaml --local-workers 2",
            "job.yaml --single-node --local-workers 0",
            "job.yaml --lerning_rate 1",
            "job.yaml --set",
            "job.yaml --lr",
        ] {
            let words = ["coordinator", "start"].into_iter().chain(line.split(' '));
            let error = Arguments::try_parse_from(words).unwrap_err();
            assert_eq!(error.exit_code(), i32::from(exit::USAGE), "{line}");
        }
    }
}
