//! Runs that nobody watches: output that is not read, a terminal that stands still, a full disk, a pipe that is closed.
//! Training, metrics and the end of the process do not depend on any of them.
#![cfg(all(feature = "single-node", target_os = "linux"))]
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::{Process, Site};

const STEPS: [&str; 3] = ["--single-node", "--max-steps", "40"];

/// Not a test: what [`Site::join`] starts this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    support::work();
}

/// A pipe that takes nothing more, as long as nobody reads.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    // SAFETY: the descriptor is open, and the call touches no memory of this process.
    let size = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) };
    writer.write_all(&vec![b'.'; size as usize]).unwrap();
    (reader, writer)
}

/// A terminal: the side of whoever looks at it, and that of the program.
fn terminal() -> (OwnedFd, File) {
    // SAFETY: the calls make a descriptor that is owned here and nowhere else, and touch no memory of this process.
    let master = unsafe {
        let master = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY);
        assert!(master >= 0);
        assert_eq!(libc::grantpt(master), 0);
        assert_eq!(libc::unlockpt(master), 0);
        OwnedFd::from_raw_fd(master)
    };
    let mut name = [0; 64];
    // SAFETY: the name is written into the buffer, with its length, and ends with a zero.
    let named = unsafe { libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr().cast(), 64) };
    assert_eq!(named, 0);
    let name: Vec<u8> = name.into_iter().take_while(|byte| *byte != 0).collect();
    let name = String::from_utf8(name).unwrap();
    let program = File::options().read(true).write(true).open(name).unwrap();
    (master, program)
}

/// Runs to the end with these outputs; every step must be on record.
fn check(site: &Site, output: &str, stdout: impl Into<Stdio>, stderr: impl Into<Stdio>) {
    let child = site
        .start(output, &STEPS)
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .unwrap();
    let status = Process(child).wait();
    assert_eq!(status.code(), Some(0), "{output}");
    assert_eq!(site.steps(output).len(), 40, "{output}");
    site.digest(output);
}

#[test]
fn outputs_that_nobody_reads_stop_no_run() {
    let site = Site::new();
    let (_out_reader, stdout) = full_pipe();
    let (_err_reader, stderr) = full_pipe();
    check(&site, "unread", stdout, stderr);
}

#[test]
fn outputs_that_are_closed_stop_no_run() {
    let site = Site::new();
    let (_, stdout) = std::io::pipe().unwrap();
    let log = site.path("log");
    check(&site, "closed", stdout, File::create(&log).unwrap());
    assert_eq!(
        fs::read_to_string(log).unwrap(),
        "",
        "no panic, no complaint"
    );
}

#[test]
fn a_full_disk_under_the_log_stops_no_run() {
    let site = Site::new();
    let full = || File::options().write(true).open("/dev/full").unwrap();
    check(&site, "full", full(), full());
}

#[test]
fn a_terminal_that_stands_still_stops_no_run() {
    let site = Site::new();
    let (_master, terminal) = terminal();
    let stderr = terminal.try_clone().unwrap();
    check(&site, "still", terminal, stderr);
}

#[test]
fn what_was_asked_for_and_cannot_be_printed_is_an_error() {
    for words in [
        &["man"][..],
        &["man", "start"],
        &["completions", "bash"],
        &["--help"],
        &["--version"],
    ] {
        let print = |stdout: Stdio| {
            Command::new(env!("CARGO_BIN_EXE_coordinator"))
                .args(words)
                .stdout(stdout)
                .output()
                .unwrap()
        };
        let full = File::options().write(true).open("/dev/full").unwrap();
        let full = print(full.into());
        let said = String::from_utf8(full.stderr).unwrap();
        assert_eq!(full.status.code(), Some(1), "{words:?}: {said}");
        let expected = "error: standard output cannot be written: No space left on device";
        assert!(said.starts_with(expected), "{words:?}: {said}");
        // As where `head` has seen enough.
        let (_, closed) = std::io::pipe().unwrap();
        let closed = print(closed.into());
        assert!(closed.status.success(), "{words:?}");
        assert!(closed.stderr.is_empty(), "{words:?}");
    }
}

#[test]
fn a_stop_is_not_held_up_by_outputs_that_nobody_reads() {
    let site = Site::new();
    let (_out_reader, stdout) = full_pipe();
    let (_err_reader, stderr) = full_pipe();
    let listen = format!("127.0.0.1:{}", support::free_port());
    let child = site
        .start("out", &["--listen", &listen])
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .unwrap();
    let mut process = Process(child);
    let began = Instant::now();
    while !site.path("out/run.json").exists() {
        assert!(began.elapsed() < Duration::from_secs(60), "no run begins");
        std::thread::sleep(Duration::from_millis(20));
    }
    let asked = Instant::now();
    process.signal("-INT");
    assert_eq!(process.wait().code(), Some(130));
    // Nobody who is in no hurry is waited for so briefly.
    assert!(asked.elapsed() < Duration::from_secs(3));
}

#[test]
fn a_failed_start_ends_with_its_code_though_nobody_reads_why() {
    let site = Site::new();
    let (_out_reader, stdout) = full_pipe();
    let (_err_reader, stderr) = full_pipe();
    let child = site
        .start("out", &["--single-node", "--set", "no_such_field=1"])
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .unwrap();
    assert_eq!(Process(child).wait().code(), Some(2));
}
