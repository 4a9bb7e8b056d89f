//! How a worker joins a coordinator, and how that may end well.

use std::path::PathBuf;
use std::time::Duration;

use crate::engine::device::Device;
use crate::status::Status;

/// Default time to wait for a coordinator that was lost: long enough for one that must find another machine.
pub const RECONNECT_TIMEOUT: Duration = Duration::from_secs(600);

/// How long a worker that was asked to stop waits to be let go. Whoever asks usually kills it after 30 s.
pub const DRAINING_TIMEOUT: Duration = Duration::from_secs(25);

/// How to join a coordinator. Only the address is needed.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// `HOST:PORT` of the coordinator, or `HOST` where it listens at the default port.
    pub address: String,
    /// Threads to compute with. Default: all cores.
    pub threads: Option<usize>,
    /// The device to compute on.
    pub device: Device,
    /// The coordinator's token, sent as a bearer token with every call.
    pub token: Option<String>,
    /// The address that other workers should use. Default: the one that the coordinator sees.
    pub exchange_host: Option<String>,
    /// The port at which other workers reach this one. Default: any that is free.
    pub exchange_port: Option<u16>,
    /// Where fetched models are kept. Default: `MUSTER_CACHE_DIR`, else `~/.cache/muster`.
    pub cache_dir: Option<PathBuf>,
    /// Cache of the Hugging Face hub, in which a model is looked for before it is fetched. Default: where Python has it
    /// (`HF_HUB_CACHE`, `HF_HOME`, else `~/.cache/huggingface/hub`).
    pub hub_cache: Option<PathBuf>,
    /// Name of this worker in logs and on terminals. Default: host name and process number.
    pub name: Option<String>,
    /// How long to try to reach the coordinator at first.
    pub connect_timeout: Duration,
    /// How long to wait, with the state that is held, for a coordinator that was lost.
    pub reconnect_timeout: Duration,
    /// How long to wait, once asked to stop, until what was computed here is counted.
    pub draining_timeout: Duration,
    /// Where the worker notes what it is at, for whoever shows it.
    pub status: Status,
}

impl JoinOptions {
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            threads: None,
            device: Device::default(),
            token: None,
            exchange_host: None,
            exchange_port: None,
            cache_dir: None,
            hub_cache: None,
            name: None,
            connect_timeout: Duration::from_secs(60),
            reconnect_timeout: RECONNECT_TIMEOUT,
            draining_timeout: DRAINING_TIMEOUT,
            status: Status::default(),
        }
    }
}

/// Why a worker came to a good end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finished {
    /// The coordinator said that the job is done (or stopped, with the reason).
    Job { reason: String },
    /// The worker was asked to stop and has left.
    Left,
}
