//! A disk that is full for a while.

use std::process::Command;

use common::files::checkpoint::newest_valid;

use super::support::{self, Run, Site, free_port};

/// Files may not grow beyond this while the disk is full: metrics fit, a checkpoint does not.
const FULL_BYTES: u64 = 32 << 10;

/// Sets how large this process may make a file. Its writes beyond that fail, as those on a full disk do.
fn limit_files(process: u32, bytes: u64) {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: libc::RLIM_INFINITY,
    };
    let process = process as libc::pid_t;
    // SAFETY: `limit` outlives the call, and no old limit is asked for.
    let result =
        unsafe { libc::prlimit(process, libc::RLIMIT_FSIZE, &limit, std::ptr::null_mut()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// The same command in a process that gets an error for a file that is too large, and no signal.
fn without_signal(command: &Command) -> Command {
    let mut wrapped = Command::new("sh");
    wrapped.args(["-c", "trap '' XFSZ; exec \"$@\"", "sh"]);
    wrapped.arg(command.get_program()).args(command.get_args());
    wrapped.current_dir(command.get_current_dir().unwrap());
    wrapped
}

#[test]
fn a_full_disk_fails_the_save_and_nothing_else() {
    let site = Site::new();
    let options = [
        "--max-steps",
        "80",
        "--set",
        "save_steps=4",
        "--set",
        "lora_r=32",
    ];
    let quiet = site.train("quiet", &options);

    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let command = site.start("out", &[&["--listen", &listen], &options[..]].concat());
    let mut run = Run::of(&mut without_signal(&command));
    let mut worker = site.join("one", port);
    run.until("checkpoint-4");
    limit_files(run.process.0.id(), FULL_BYTES);
    run.until("was not saved");
    let saved = newest_valid(&site.path("out")).unwrap();
    assert!(saved.damaged.is_empty(), "{:?}", saved.damaged);
    let saved = saved.newest.unwrap().1.step;
    // The run goes on, and the checkpoint stays, unless a newer one was as good as written when the disk became full.
    run.steps(3);
    let still = newest_valid(&site.path("out")).unwrap();
    assert!(still.newest.unwrap().1.step >= saved);
    limit_files(run.process.0.id(), libc::RLIM_INFINITY);
    run.until("checkpoint-");

    let run = run.end();
    assert!(run.status.success() && worker.wait().success(), "{run:?}");
    assert!(run.stdout.contains("File too large"), "{run:?}");
    assert_eq!(site.digest("out"), quiet);
    assert_eq!(site.steps("out").len(), 80);
}

/// A run that has done its last step on a full disk, with its worker. The state is larger than a file may be.
fn at_its_end(site: &Site, port: u16) -> (Run, support::Process) {
    let mut run = Run::of(&mut without_signal(&start_large(site, port)));
    let worker = site.join("one", port);
    run.until("step 3/");
    limit_files(run.process.0.id(), FULL_BYTES);
    run.until("trying again in");
    (run, worker)
}

const LARGE: [&str; 4] = ["--max-steps", "20", "--set", "lora_r=32"];

fn start_large(site: &Site, port: u16) -> Command {
    let listen = format!("127.0.0.1:{port}");
    site.start("out", &[&["--listen", &listen], &LARGE[..]].concat())
}

#[test]
fn a_result_waits_for_room_on_the_disk() {
    let site = Site::new();
    let quiet = site.train("quiet", &LARGE);
    let (mut run, mut worker) = at_its_end(&site, free_port());
    run.until("trying again in");
    assert_eq!(site.json("out/run.json")["state"], "running");
    limit_files(run.process.0.id(), libc::RLIM_INFINITY);
    let run = run.end();
    assert!(run.status.success() && worker.wait().success(), "{run:?}");
    assert_eq!(site.digest("out"), quiet);
    assert_eq!(site.steps("out").len(), 20);
}

#[test]
fn a_result_that_found_no_room_is_stored_by_the_next_coordinator() {
    let site = Site::new();
    let quiet = site.train("quiet", &LARGE);
    let port = free_port();
    let (run, mut worker) = at_its_end(&site, port);
    run.process.signal("-TERM");
    let run = run.end();
    assert_eq!(run.status.code(), Some(75), "{run:?}");
    assert!(run.stdout.contains("stopped after 20 steps"), "{run:?}");
    let again = Run::of(&mut start_large(&site, port)).end();
    assert!(
        again.status.success() && worker.wait().success(),
        "{again:?}"
    );
    assert!(
        !again.stdout.contains("  loss "),
        "nothing is computed again: {again:?}"
    );
    assert_eq!(site.digest("out"), quiet);
    assert_eq!(site.steps("out").len(), 20);
}

#[test]
fn a_full_disk_is_said_once_and_costs_no_line() {
    let site = Site::new();
    let options = ["--max-steps", "60", "--set", "eval_steps=60"];
    let command = site.start(
        "out",
        &[&["--single-node", "--threads", "1"], &options[..]].concat(),
    );
    let mut run = Run::of(&mut without_signal(&command));
    run.until("step 5/");
    limit_files(run.process.0.id(), 1 << 10);
    run.until("metrics.jsonl: cannot write");
    run.steps(10);
    limit_files(run.process.0.id(), libc::RLIM_INFINITY);
    run.until("are written again");
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    assert_eq!(
        run.stdout.matches("metrics.jsonl: cannot write").count(),
        1,
        "{run:?}"
    );
    let steps: Vec<_> = site
        .steps("out")
        .iter()
        .map(|step| step["step"].as_u64())
        .collect();
    assert_eq!(steps, (1..=60).map(Some).collect::<Vec<_>>());
}
