//! A coordinator or worker process that writes a log, may carry a failpoint, and does not outlive the test.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use worker::{Finished, JoinOptions};

use super::support::join_until_terminated;

/// The environment variables that turn this test binary into a worker.
pub const JOIN: &str = "MUSTER_TEST_JOIN";
/// How long a worker looks for a coordinator that is gone.
const COORDINATOR_TIMEOUT: Duration = Duration::from_secs(30);
const LINES_SHOWN: usize = 300;

pub struct Process {
    child: Child,
    pub name: String,
    log: PathBuf,
    failpoint: String,
    /// The test has killed it.
    pub is_felled: bool,
}

impl Process {
    /// Starts `command`, armed with `failpoint` unless that is empty.
    pub fn start(name: String, mut command: Command, failpoint: &str, logs: &Path) -> Self {
        let log = logs.join(format!("{name}.log"));
        let file = std::fs::File::create(&log).unwrap();
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .env_remove("MUSTER_FAILPOINT")
            .env("RUST_LOG", "warn,worker=debug");
        if !failpoint.is_empty() {
            command.env("MUSTER_FAILPOINT", failpoint);
        }
        Self {
            child: command.spawn().unwrap(),
            name,
            log,
            failpoint: failpoint.to_owned(),
            is_felled: false,
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// None while it runs.
    pub fn end(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    pub fn kill(&mut self) {
        self.is_felled = true;
        self.child.kill().unwrap();
    }

    pub fn signal(&self, signal: &str) {
        let id = self.id().to_string();
        // It may be gone already.
        let _ = Command::new("kill")
            .args([signal, &id])
            .stderr(Stdio::null())
            .status();
    }

    pub fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
        let state = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.trim().chars().next());
        state == Some('T')
    }

    /// The place that it is armed with.
    pub fn place(&self) -> &str {
        self.failpoint.split([':', '=']).next().unwrap_or_default()
    }

    /// Its failpoint stops it, and it was not seen stopped before.
    pub fn stops_itself(&self) -> bool {
        self.failpoint.ends_with("=stop")
    }

    /// The end of its log, for people.
    pub fn story(&self) -> String {
        let text =
            String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let shown = lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n");
        let Self {
            name, failpoint, ..
        } = self;
        format!("--- {name} (failpoint {failpoint:?})\n{shown}\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn was_killed(status: ExitStatus) -> bool {
    const SIGKILL: i32 = 9;
    status.signal() == Some(SIGKILL)
}

/// A worker in this process, which ends with it. SIGTERM asks it to leave.
pub fn work(address: String) -> ! {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    common::failpoint::arm().unwrap();
    let mut options = JoinOptions::new(address);
    options.threads = Some(1);
    options.connect_timeout = COORDINATOR_TIMEOUT;
    let code = match join_until_terminated(options) {
        Ok(Finished::Job { .. } | Finished::Left) => 0,
        Err(error) => {
            eprintln!("error: {error}");
            1
        }
    };
    std::process::exit(code)
}
