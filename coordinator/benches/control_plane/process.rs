//! The coordinator's process as seen from outside: start, address, processor time, memory, end.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// `/proc` counts processor time in hundredths of a second.
const TICKS_PER_SECOND: f64 = 100.0;

pub struct Coordinator {
    child: Child,
    /// `http://HOST:PORT`
    pub address: String,
}

/// Processor time so far.
pub struct Usage {
    at: Instant,
    processor_seconds: f64,
}

impl Coordinator {
    pub fn start(min_workers: usize, slots: usize) -> Self {
        let program = std::env::current_exe().expect("this program has a path");
        let mut child = Command::new(program)
            .args(["--serve", &min_workers.to_string(), &slots.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program can be started again");
        let output = child.stdout.take().expect("its output is piped");
        let mut lines = BufReader::new(output).lines();
        let address = lines
            .next()
            .and_then(Result::ok)
            .expect("the coordinator says where it listens");
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                println!("{line}");
            }
        });
        Self { child, address }
    }

    pub fn usage(&self) -> Usage {
        let stat = self.proc("stat");
        // The second field is the program's name in brackets, which may hold spaces.
        let fields = stat.rsplit(") ").next().unwrap_or_default();
        let ticks = |field: usize| -> f64 {
            let field = fields.split(' ').nth(field - 3);
            field.and_then(|ticks| ticks.parse().ok()).unwrap_or(0.0)
        };
        Usage {
            at: Instant::now(),
            processor_seconds: (ticks(14) + ticks(15)) / TICKS_PER_SECOND,
        }
    }

    /// A line of the table: cores used since then, and memory now.
    pub fn report(&mut self, name: &str, since: &Usage) {
        let now = self.usage();
        let seconds = (now.at - since.at).as_secs_f64();
        let cores = (now.processor_seconds - since.processor_seconds) / seconds;
        let status = self.proc("status");
        let mebibytes = |key: &str| -> f64 {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let number = line.and_then(|line| line.split_whitespace().next());
            number.and_then(|kb| kb.parse().ok()).unwrap_or(0.0) / 1024.0
        };
        println!(
            "{name:28} {cores:>8.3} {:>10.1} {:>10.1}",
            mebibytes("VmRSS:"),
            mebibytes("VmHWM:")
        );
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap_or_default()
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
