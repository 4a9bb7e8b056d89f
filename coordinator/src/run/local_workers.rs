//! `--single-node`: the same worker library in this process, over the loopback; and the same inference for the test
//! prompts.

use std::net::SocketAddr;
use std::path::Path;
use std::thread::available_parallelism;

use common::job::JobSpec;
use thiserror::Error;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use worker::engine::inference::generate::{Generator, Sampling};
use worker::engine::inference::merged_weights::FourBits;
use worker::{Device, DeviceError, Finished, JoinOptions, WorkerError};

use crate::rpc::listener::exchange_host;

/// Most tokens of an answer to a test prompt.
const MAX_NEW_TOKENS: usize = 64;

/// Workers inside this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalWorkers {
    pub count: usize,
    /// Threads of each worker. None: all cores are shared out.
    pub threads: Option<usize>,
    /// Devices that the workers take in turn, beginning again after the last. Empty: each takes `auto`.
    pub devices: Vec<Device>,
}

/// Why the named devices cannot be used together.
#[derive(Debug, Error)]
pub enum DevicesError {
    #[error(
        "--device names {devices} devices for {workers} workers: name no more, or raise --local-workers"
    )]
    TooMany { devices: usize, workers: usize },
    #[error(
        "workers of one run must compute alike, but {first} and {other} do not: name devices of one kind with --device"
    )]
    Mixed { first: String, other: String },
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Checks, before anything else is done, that the named devices can be used together.
pub fn check(devices: &[Device], workers: usize) -> Result<(), DevicesError> {
    if devices.len() > workers {
        let devices = devices.len();
        return Err(DevicesError::TooMany { devices, workers });
    }
    let mut first = None;
    for device in devices {
        let device = device.open()?;
        let (name, class) = (device.to_string(), device.numerics_class());
        let (first, first_class) = first.get_or_insert((name.clone(), class.clone()));
        if *first_class != class {
            let first = first.clone();
            return Err(DevicesError::Mixed { first, other: name });
        }
    }
    Ok(())
}

impl LocalWorkers {
    /// Starts the workers, which join the coordinator that listens at `address`.
    pub fn join(
        &self,
        address: SocketAddr,
        token: Option<&str>,
        shutdown: &CancellationToken,
    ) -> JoinSet<Result<Finished, WorkerError>> {
        // Packing and the test prompts are no part of what training takes.
        if !worker::forget_peak_of_this_process() {
            tracing::warn!(
                "the peak memory will count what came before training, too: /proc/self/clear_refs cannot be written"
            );
        }
        let cores = available_parallelism().map_or(1, usize::from);
        let threads = self.threads.unwrap_or((cores / self.count.max(1)).max(1));
        let mut workers = JoinSet::new();
        let devices = self.devices.iter().copied().cycle();
        let devices = devices.chain(std::iter::repeat(Device::Auto));
        for (number, device) in (1..=self.count).zip(devices) {
            let mut options = JoinOptions::new(address.to_string());
            options.device = device;
            options.threads = Some(threads);
            options.token = token.map(str::to_owned);
            options.name = Some(format!("local-{number}"));
            options.exchange_host = exchange_host(address);
            workers.spawn(worker::join(options, shutdown.clone()));
        }
        workers
    }
}

/// Answers all prompts by greedy decoding, with the engine of this process.
pub fn answer(
    model_dir: &Path,
    adapter_dir: Option<&Path>,
    job: &JobSpec,
) -> Result<Vec<String>, String> {
    if job.test_prompts.is_empty() {
        return Ok(Vec::new());
    }
    let say = |error: worker::engine::inference::generate::GenerateError| error.to_string();
    let mut generator =
        Generator::load(model_dir, adapter_dir, FourBits::of(job), Some(job)).map_err(say)?;
    generator.ask_as_in(job).map_err(say)?;
    let sampling = Sampling {
        max_new_tokens: MAX_NEW_TOKENS,
        temperature: 0.0,
        seed: 0,
    };
    job.test_prompts
        .iter()
        .map(|prompt| {
            generator
                .answer(prompt, &sampling, &mut |_| {})
                .map_err(say)
        })
        .collect()
}
