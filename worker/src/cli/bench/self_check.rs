//! `worker self-check`: does a device train right, and how fast. In: a device. Out: a table of what was compared with the
//! processor, what had to be the same to the bit, and what speeds it reached. Nothing but this program is needed.
//!
//! Every row is computed in another process and has a deadline, so that one which crashes or hangs is a row that failed, and
//! not the end: the next one begins in a new process.

mod helper;
mod shapes;
#[cfg(feature = "cuda")]
mod speeds;
mod training;
mod verdict;
mod widened;

use std::sync::mpsc;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};
use worker::{ComputeDevice, Device};

use self::helper::{Helper, asked};
#[cfg(feature = "cuda")]
use self::speeds::Speed;
use self::training::Check;
use self::verdict::Verdict;
use super::{BenchError, say};

#[derive(Args)]
pub struct SelfCheckArgs {
    /// What to check: `auto` takes the first GPU where this program can use one, and the processor elsewhere
    #[arg(long, value_name = "auto|cpu|cuda|cuda:N", default_value_t = Device::Auto)]
    device: Device,
    /// Leave the speeds out
    #[arg(long)]
    quick: bool,
    /// How long a row of the table may take; speeds twice that
    #[arg(long, value_name = "SECONDS", default_value_t = 120, allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    row_timeout: u64,
    /// How long all of it may take; rows that were not begun then have failed
    #[arg(long, value_name = "SECONDS", default_value_t = 590, allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    timeout: u64,
    /// Only compute this part of the table, for the process that prints it
    #[arg(long, hide = true)]
    part: Option<usize>,
    /// From this row of the part on
    #[arg(long, hide = true, default_value_t = 0)]
    from: usize,
    /// Only train the shape of this number, and print the digest of its weights: for checks of several processes
    #[arg(long, hide = true)]
    digest_of: Option<usize>,
}

/// A row of the table, as one process tells another.
#[derive(Serialize, Deserialize)]
struct Answer {
    mark: String,
    found: String,
    /// Whether the process ends, because the device may be of no more use to it.
    ends: bool,
}

/// Rows that one process computes, unless one of them breaks it.
enum Part {
    Training {
        number: usize,
        shape: &'static str,
        checks: Vec<Check>,
    },
    #[cfg(feature = "cuda")]
    Speed(Speed),
}

/// The parts of the table, the same in every process.
fn parts(on_gpu: bool) -> Vec<Part> {
    let shapes = shapes::shapes().into_iter().enumerate();
    let trainings = shapes.map(|(number, shape)| Part::Training {
        number,
        checks: Check::all(&shape, on_gpu),
        shape: shape.name,
    });
    #[cfg(feature = "cuda")]
    let speeds = Speed::all().into_iter().filter(|_| on_gpu).map(Part::Speed);
    #[cfg(not(feature = "cuda"))]
    let speeds = [];
    trainings.chain(speeds).collect()
}

impl Part {
    fn is_training(&self) -> bool {
        matches!(self, Self::Training { .. })
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Training { shape, .. } => shape,
            #[cfg(feature = "cuda")]
            Self::Speed(speed) => speed.name,
        }
    }

    fn rows(&self) -> Vec<&'static str> {
        match self {
            Self::Training { checks, .. } => checks.iter().map(|check| check.told()).collect(),
            #[cfg(feature = "cuda")]
            Self::Speed(speed) => vec![speed.told()],
        }
    }

    fn run(
        &self,
        row: usize,
        device: &ComputeDevice,
        timeout: Duration,
    ) -> Result<Verdict, BenchError> {
        match self {
            Self::Training { number, checks, .. } => {
                training::check(*number, checks[row], device, timeout)
            }
            #[cfg(feature = "cuda")]
            Self::Speed(speed) => speed.run(device),
        }
    }
}

/// Checks a device and prints the table.
///
/// # Errors
/// Where the device cannot be used, or a comparison failed.
pub fn run(args: SelfCheckArgs) -> Result<(), BenchError> {
    if let Some(number) = args.digest_of {
        say(format_args!(
            "{}",
            training::digest(number, &args.device.open()?)?
        ));
        return Ok(());
    }
    if let Some(part) = args.part {
        return answer(&args, part);
    }
    let (device, on_gpu) = {
        let device = open(&args)?;
        say(format_args!(
            "device {device}, class {}",
            device.numerics_class()
        ));
        (asked(&device), !matches!(device, ComputeDevice::Cpu))
    };
    let mut table = Table {
        args: &args,
        device: device.to_string(),
        ends: Instant::now() + Duration::from_secs(args.timeout),
        failures: 0,
        slow: 0,
    };
    for (number, part) in parts(on_gpu).iter().enumerate() {
        if part.is_training() || !args.quick {
            table.part(number, part);
        }
    }
    match on_gpu {
        true => say_what_is_next(&device),
        false => say(format_args!(
            "      speeds of large models: left out without a GPU"
        )),
    }
    table.conclude()
}

/// Opens the device within a bound, because a driver may hang. It is closed before other processes open it, so that one which
/// only one process may use can be checked, too.
fn open(args: &SelfCheckArgs) -> Result<ComputeDevice, BenchError> {
    let (sender, opened) = mpsc::channel();
    let device = args.device;
    std::thread::spawn(move || {
        // Where nobody waits any more, nobody needs it.
        let _ = sender.send(device.open());
    });
    match opened.recv_timeout(Duration::from_secs(args.row_timeout)) {
        Ok(opened) => Ok(opened?),
        Err(_) => Err(BenchError::Hangs {
            seconds: args.row_timeout,
        }),
    }
}

/// Computes the rows of a part, for the process that prints them.
fn answer(args: &SelfCheckArgs, part: usize) -> Result<(), BenchError> {
    let device = args.device.open()?;
    let parts = parts(!matches!(device, ComputeDevice::Cpu));
    let Some(part) = parts.get(part) else {
        return Err(BenchError::Failures { failures: 1 });
    };
    // So that whoever waits for other processes ends before this one is ended.
    let timeout = Duration::from_secs(args.row_timeout) * 4 / 5;
    for row in args.from..part.rows().len() {
        let (mark, found, ends) = match part.run(row, &device, timeout) {
            Ok(Verdict::Passed(found)) => ("pass", found, false),
            Ok(Verdict::Failed(found)) => ("FAIL", found, false),
            #[cfg(feature = "cuda")]
            Ok(Verdict::Slow(found)) => ("slow", found, false),
            Err(error) => ("FAIL", error.to_string(), true),
        };
        super::print_json(&Answer {
            mark: mark.to_owned(),
            found,
            ends,
        });
        if ends {
            break;
        }
    }
    Ok(())
}

struct Table<'a> {
    args: &'a SelfCheckArgs,
    device: String,
    ends: Instant,
    failures: usize,
    slow: usize,
}

impl Table<'_> {
    fn part(&mut self, number: usize, part: &Part) {
        let began = Instant::now();
        let mut helper = None;
        for (row, what) in part.rows().into_iter().enumerate() {
            let answer = self.answer(&mut helper, number, row, part);
            let answer = answer.unwrap_or_else(|reason| {
                helper = None;
                Answer {
                    mark: "FAIL".to_owned(),
                    found: reason,
                    ends: true,
                }
            });
            if answer.ends {
                helper = None;
            }
            self.failures += usize::from(answer.mark == "FAIL");
            self.slow += usize::from(answer.mark == "slow");
            say(format_args!(
                "{}  {:<34} {what:<42} {}",
                answer.mark,
                part.name(),
                answer.found
            ));
        }
        let seconds = began.elapsed().as_secs_f64();
        say(format_args!("      {:<34} {seconds:.1} s", part.name()));
    }

    /// Asks a process that is there, or else a new one, for a row of the table.
    fn answer(
        &self,
        helper: &mut Option<Helper>,
        part: usize,
        row: usize,
        of: &Part,
    ) -> Result<Answer, String> {
        let times = if of.is_training() { 1 } else { 2 };
        let timeout = Duration::from_secs(self.args.row_timeout) * times;
        let timeout = timeout.min(self.ends.saturating_duration_since(Instant::now()));
        if timeout.is_zero() {
            return Err("not begun: the time is up (--timeout)".to_owned());
        }
        let helper = match helper {
            Some(helper) => helper,
            None => helper.insert(self.start(part, row).map_err(|error| error.to_string())?),
        };
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = helper.answer(left);
            let line = line.map_err(|reason| format!("the process {reason}"))?;
            // A library may print, too.
            if let Ok(answer) = serde_json::from_str(&line) {
                return Ok(answer);
            }
        }
    }

    fn start(&self, part: usize, row: usize) -> std::io::Result<Helper> {
        let [part, row, timeout] =
            [part, row, self.args.row_timeout as usize].map(|number| number.to_string());
        Helper::start(&[
            "--device",
            &self.device,
            "--part",
            &part,
            "--from",
            &row,
            "--row-timeout",
            &timeout,
        ])
    }

    fn conclude(&self) -> Result<(), BenchError> {
        match (self.failures, self.slow) {
            (0, 0) => say(format_args!("all checks passed")),
            (0, slow) => say(format_args!(
                "all checks passed, {slow} slower than aimed at"
            )),
            (failures, _) => return Err(BenchError::Failures { failures }),
        }
        Ok(())
    }
}

/// Prints what to check next that this program cannot check alone.
fn say_what_is_next(device: &Device) {
    say(format_args!("next, wrong memory accesses and races:"));
    for tool in ["memcheck", "racecheck"] {
        say(format_args!(
            "  compute-sanitizer --target-processes all --tool {tool} worker self-check --device {device} --quick --row-timeout 3600 --timeout 36000"
        ));
    }
    say(format_args!(
        "next, workers that share the GPU, some of them killed, and every operation by itself:"
    ));
    say(format_args!(
        "  MUSTER_NEEDS_GPU=1 cargo test --release -p coordinator --features cuda --test gpus share"
    ));
    say(format_args!(
        "  MUSTER_NEEDS_GPU=1 cargo test --release -p worker --features cuda --lib -- cuda on_gpu"
    ));
    say(format_args!(
        "next, PyTorch's speed beside the one above (torch, transformers, peft):"
    ));
    for (shape, options) in [
        ("qwen3-0.6b", "--mode lora --batch 8 --seq 2048"),
        ("qwen3-0.6b", "--mode full --batch 8 --seq 2048"),
        (
            "llama-3.1-8b",
            "--mode lora --batch 2 --seq 4096 --gradient-checkpointing",
        ),
    ] {
        say(format_args!(
            "  python3 worker/benches/peer/train.py --device {device} --config worker/benches/shapes/{shape}.json {options} --warmup 2"
        ));
    }
}
