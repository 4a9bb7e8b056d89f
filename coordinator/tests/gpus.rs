//! Workers on GPUs as real processes: over TCP where they share one, over NCCL where each has its own, and whatever happens to
//! them or to NCCL, the weights are those of one worker. On the emulator of `worker/tests/emulator`, where NCCL misbehaves as it is
//! told to; on a GPU those that share it alone.
#![cfg(all(feature = "cuda", target_os = "linux"))]
#![allow(clippy::unwrap_used)]

mod support;

use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use support::{Finished, JOIN, Process, Run, Site, free_port, join_until_terminated};
use worker::{ComputeDevice, Device, JoinOptions};

/// The environment variable that says on which GPU a worker computes.
const GPU: &str = "TEST_WORKER_GPU";
/// What makes the stand-in for NCCL misbehave.
const FAULT: &str = "FAKE_NCCL_FAULT";
const STEPS: &str = "8";
const OVER_TCP: &str = "gradients are exchanged over TCP: ";

/// Not a test: what the others start this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    let (Ok(address), Ok(gpu)) = (std::env::var(JOIN), std::env::var(GPU)) else {
        return;
    };
    tracing_subscriber::fmt()
        .with_env_filter("warn,worker=debug")
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let mut options = JoinOptions::new(address);
    options.threads = Some(1);
    options.device = Device::Cuda(gpu.parse().unwrap());
    join_until_terminated(options).unwrap();
}

/// A place to train, and the digest that one worker alone comes to. None where there is no GPU.
fn stage() -> Option<(Site, String)> {
    if let Err(error) = Device::Cuda(0).open() {
        assert!(std::env::var_os("MUSTER_NEEDS_GPU").is_none(), "{error}");
        println!("skipped: {error}");
        return None;
    }
    let site = Site::new();
    static QUIET: OnceLock<String> = OnceLock::new();
    let quiet = QUIET.get_or_init(|| site.train("quiet", &["--max-steps", STEPS]));
    Some((site, quiet.clone()))
}

/// The same where there are several GPUs, and an NCCL that misbehaves as it is told to: the emulator's.
fn emulated_stage() -> Option<(Site, String)> {
    let device = Device::Cuda(0).open();
    let is_emulated = |device: &ComputeDevice| device.to_string().contains("emulated");
    if !device.as_ref().is_ok_and(is_emulated) {
        println!("skipped: no emulator is named in LD_LIBRARY_PATH");
        return None;
    }
    stage()
}

/// A worker on the GPU of this number, whose NCCL has this fault.
fn join(site: &Site, name: &str, port: u16, gpu: usize, fault: &str) -> Process {
    // What the stand-in leaves behind goes with the site.
    let scratch = site.path(&format!("scratch-{name}"));
    std::fs::create_dir_all(&scratch).unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "worker_process", "--ignored", "--nocapture"])
        .env(JOIN, format!("127.0.0.1:{port}"))
        .env(GPU, gpu.to_string())
        .env("EMULATED_GPUS", "3")
        .env(FAULT, fault)
        .env("TMPDIR", scratch)
        .env("MUSTER_CACHE_DIR", site.path(&format!("cache-{name}")))
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(site.log_of(name)).unwrap())
        .spawn()
        .unwrap();
    Process(child)
}

struct Scene<'a> {
    output: &'a str,
    /// Of each worker: its GPU, and the fault of its NCCL.
    workers: &'a [(usize, &'a str)],
    /// The run waits below that.
    min_workers: usize,
    /// The first is killed after some steps.
    kills: bool,
}

/// Plays it to its end, and shows all logs where that is not `quiet`.
fn play(site: &Site, quiet: &str, scene: &Scene<'_>) -> (Finished, Vec<String>) {
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let least = scene.min_workers.to_string();
    let options = ["--max-steps", STEPS, "--listen", &listen];
    let options = [&options[..], &["--min-workers", &least]].concat();
    let began = Instant::now();
    let mut run = Run::of(&mut site.start(scene.output, &options));
    run.until("workers join with");
    let seats = scene.workers.iter().enumerate();
    let name = |seat: usize| format!("{}-{seat}", scene.output);
    let mut workers: Vec<Process> = seats
        .map(|(seat, (gpu, fault))| join(site, &name(seat), port, *gpu, fault))
        .collect();
    if scene.kills {
        run.steps(3);
        workers[0].kill();
    }
    let run = run.end();
    println!("{}: {:.1} s", scene.output, began.elapsed().as_secs_f64());
    let logs = (0..workers.len()).map(|seat| std::fs::read(site.log_of(&name(seat))).unwrap());
    let logs = logs.map(|log| String::from_utf8_lossy(&log).into_owned());
    let logs: Vec<String> = logs.collect();
    let shown = || format!("{}{}\n{}", run.stdout, run.stderr, logs.join("\n---\n"));
    assert!(run.status.success(), "{}", shown());
    assert_eq!(site.digest(scene.output), quiet, "{}", shown());
    (run, logs)
}

/// The reasons for TCP that the coordinator told.
fn reasons(run: &Finished) -> Vec<&str> {
    let lines = run.stdout.lines().chain(run.stderr.lines());
    lines
        .filter_map(|line| Some(line.split_once(OVER_TCP)?.1))
        .collect()
}

/// Where a GPU is shared. A machine may have no NCCL, either.
fn excludes_nccl(reason: &str) -> bool {
    reason.contains("share a GPU") || reason.contains("has no NCCL")
}

fn connected(log: &str, gpus: usize) -> bool {
    log.contains(&format!("NCCL connects {gpus} GPUs"))
}

#[test]
fn processes_that_share_a_gpu_exchange_over_tcp_to_the_weights_of_one() {
    let Some((site, quiet)) = stage() else { return };
    for (output, workers, kills) in [("two", 2, false), ("three-killed", 3, true)] {
        let scene = Scene {
            output,
            workers: &vec![(0, ""); workers],
            min_workers: 2,
            kills,
        };
        let (run, _) = play(&site, &quiet, &scene);
        let reasons = reasons(&run);
        assert!(
            !reasons.is_empty() && reasons.iter().all(|reason| excludes_nccl(reason)),
            "{reasons:?}"
        );
    }
}

#[test]
fn processes_with_a_gpu_each_exchange_over_nccl_to_the_weights_of_one() {
    let Some((site, quiet)) = emulated_stage() else {
        return;
    };
    for (output, workers, kills) in [
        ("two", &[(0, ""), (1, "")][..], false),
        ("three", &[(0, ""), (1, ""), (2, "")], false),
        ("killed", &[(0, ""), (1, ""), (2, "")], true),
        // In the midst of an exchange, and while the communicator is formed.
        ("died", &[(0, ""), (1, "die@7"), (2, "")], false),
        ("unborn", &[(0, ""), (1, ""), (2, "die@init")], false),
    ] {
        let scene = Scene {
            output,
            workers,
            min_workers: 2,
            kills,
        };
        let (run, logs) = play(&site, &quiet, &scene);
        // Whoever dies is no fault of NCCL's.
        assert_eq!(reasons(&run), [""; 0], "{output}");
        let survives = |log: &&String| connected(log, 2) || connected(log, 3);
        assert!(logs.iter().filter(survives).count() >= 2, "{output}");
    }
}

#[test]
fn workers_of_one_process_with_a_gpu_each_come_to_the_weights_of_one() {
    let Some((site, quiet)) = emulated_stage() else {
        return;
    };
    let on_two = [
        "--single-node",
        "--device",
        "cuda:0,cuda:1",
        "--max-steps",
        STEPS,
    ];
    let mut start = site.start("one-process", &on_two);
    start.env("EMULATED_GPUS", "2").env("TMPDIR", site.path(""));
    let run = Run::of(&mut start).end();
    assert!(run.status.success(), "{run:?}");
    assert_eq!(site.digest("one-process"), quiet);
    assert_eq!(reasons(&run), [""; 0]);
    let metrics = std::fs::read_to_string(site.path("one-process/metrics.jsonl")).unwrap();
    assert!(metrics.contains(r#""workers":2"#), "{metrics}");
}

#[test]
fn a_gpu_and_a_processor_are_not_mixed() {
    let Some((site, _)) = stage() else { return };
    let mixed = ["--single-node", "--device", "cuda:0,cpu"];
    let run = Run::of(&mut site.start("mixed", &mixed)).end();
    assert_eq!(run.status.code(), Some(3), "{run:?}");
    assert!(run.stderr.contains("must compute alike"), "{run:?}");
}

#[test]
fn where_nccl_fails_or_hangs_tcp_takes_over_with_one_reason() {
    let Some((site, quiet)) = emulated_stage() else {
        return;
    };
    for (fault, expected) in [
        ("fail@init", "the forming of the communicator failed"),
        ("fail@7", "a call failed: unhandled system error"),
        ("hang@7", "a call did not end within"),
    ] {
        let scene = Scene {
            output: fault,
            workers: &[(0, ""), (1, fault)],
            min_workers: 2,
            kills: false,
        };
        let (run, logs) = play(&site, &quiet, &scene);
        let reasons = reasons(&run);
        assert!(
            reasons.len() == 1 && reasons[0].contains(expected),
            "{fault}: {}{}",
            run.stdout,
            logs.join("\n---\n")
        );
        for log in logs {
            assert_eq!(log.matches(OVER_TCP).count(), 1, "{log}");
        }
    }
}
