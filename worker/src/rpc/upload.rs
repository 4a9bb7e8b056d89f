//! State on its way to the coordinator, while training goes on.
//!
//! In: snapshots. Out: the files that a checkpoint holds, in chunks, straight from memory: this machine's disk has no part
//! in it. They are read twice, for their digests and for the wire.

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::failpoint;
use common::files::adapter::{AdapterConfig, parse_tensor_name};
use common::files::model::{ModelFolder, WeightFiles};
use common::files::sink::{Entries, Fill, Sink};
use common::files::tensors::Dtype;
use common::files::{FileEntry, FileError, Frozen, Layout, Snapshot, WeightsFormat};
use common::job::{BaseDtype, InitWeights, JobSpec, Method, TargetModules, is_of_parameter};
use common::model::{EMBEDDING, ModelConfig, base_tensors, frozen_tensors};
use common::wire::CHUNK_BYTES;
use proto::v1;
use proto::v1::upload_chunk::Chunk;
use serde_json::Value;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use crate::rpc::connect::{Client, retry_delays};

const MAX_UPLOAD_FAILURES: usize = 4;
/// Chunks read ahead of the wire.
const CHUNKS_AHEAD: usize = 4;

/// Why a state could not be uploaded.
#[derive(Debug, Error)]
pub enum UploadError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("the coordinator did not take the state: {reason}")]
    Refused { reason: String },
    #[error("handing the state over was interrupted")]
    Interrupted,
}

/// Uploads of states to the coordinator, in the background.
#[derive(Clone)]
pub struct Uploads {
    shared: Arc<Shared>,
    tasks: Arc<Mutex<JoinSet<()>>>,
    runtime: tokio::runtime::Handle,
}

struct Shared {
    /// The client; None once nobody takes states any more, because the engine keeps this longer than the connection may stay.
    client: Mutex<Option<Client>>,
    worker: u64,
    failures: mpsc::Sender<UploadError>,
    /// Held by the upload in progress: only one at a time, as they share the bandwidth.
    turn: tokio::sync::Mutex<()>,
}

impl Uploads {
    /// Prepares uploads by this worker. What fails on this machine is sent to `failures`, because the coordinator cannot know
    /// of it. Must be called within the runtime.
    pub fn new(client: Client, worker: u64, failures: mpsc::Sender<UploadError>) -> Self {
        Self {
            shared: Arc::new(Shared {
                client: Mutex::new(Some(client)),
                worker,
                failures,
                turn: tokio::sync::Mutex::new(()),
            }),
            tasks: Arc::default(),
            runtime: tokio::runtime::Handle::current(),
        }
    }

    /// Begins to upload a state; training goes on at once.
    pub fn start(&self, state: State) {
        let shared = self.shared.clone();
        let task = async move {
            let _turn = shared.turn.lock().await;
            let step = state.snapshot.step;
            match shared.upload(state).await {
                Ok(()) => {}
                Err(error @ UploadError::Refused { .. }) => {
                    tracing::error!("the state after step {step} could not be saved: {error}");
                }
                Err(error) => drop(shared.failures.try_send(error)),
            }
        };
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(task, &self.runtime);
    }

    /// Ends all uploads and lets the connection go: nobody takes the states any more.
    pub fn abandon(&self) {
        drop(self.shared.client().take());
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.abort_all();
    }

    /// Waits until all states are uploaded, for `limit` at most.
    pub async fn finish(&self, limit: Duration) {
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        if tokio::time::timeout(limit, tasks.join_all()).await.is_err() {
            tracing::warn!("gave up on a state that could not be handed over in time");
        }
    }
}

impl Shared {
    fn client(&self) -> MutexGuard<'_, Option<Client>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn upload(&self, state: State) -> Result<(), UploadError> {
        let state = Arc::new(state);
        let described = {
            let state = state.clone();
            tokio::task::spawn_blocking(move || state.describe()).await
        };
        let (header, entries) = described.map_err(|_| UploadError::Interrupted)??;
        let header = v1::UploadHeader {
            worker: self.worker,
            ..header
        };
        let mut delays = retry_delays(MAX_UPLOAD_FAILURES);
        let mut broken: Option<String> = None;
        loop {
            let sent = self.send(&state, &header, &entries).await;
            let Err(status) = sent else {
                return Ok(());
            };
            let transient = status.code() == tonic::Code::Unavailable;
            let Some(delay) = delays.next().filter(|_| transient) else {
                let reason = reason(broken, status.message());
                return Err(UploadError::Refused { reason });
            };
            broken.get_or_insert(status.message().to_owned());
            tokio::time::sleep(delay).await;
        }
    }

    async fn send(
        &self,
        state: &Arc<State>,
        header: &v1::UploadHeader,
        entries: &[FileEntry],
    ) -> Result<(), tonic::Status> {
        let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
        // Never full: it is the first message.
        let _ = sender.try_send(chunk(Chunk::Header(header.clone())));
        let client = self.client().clone();
        let over = || tonic::Status::cancelled("the session is over");
        let mut client = client.ok_or_else(over)?;
        let (state, entries) = (state.clone(), entries.to_vec());
        let writing = tokio::task::spawn_blocking(move || {
            let chunks = Chunks { sender, entries };
            state.snapshot.write_files(chunks, &state.format)
        });
        let reply = client.upload_state(ReceiverStream::new(receiver)).await;
        // A reply before the last chunk is a refusal, and then the writer finds its channel closed.
        let written = writing.await;
        reply?;
        written
            .map_err(|_| UploadError::Interrupted)
            .and_then(|written| written.map_err(UploadError::File))
            .map_err(|error| tonic::Status::internal(error.to_string()))
    }
}

/// Says why an upload failed. The first error tells most: a further attempt may only say that it was not expected.
fn reason(broken: Option<String>, last: &str) -> String {
    match broken {
        Some(first) if first != last => format!("{first}; then, when tried again: {last}"),
        _ => last.to_owned(),
    }
}

/// A state to be uploaded.
pub struct State {
    pub snapshot: Snapshot,
    /// Digest of the weights, where it is known already.
    pub weights_digest: Option<String>,
    pub format: WeightsFormat,
}

impl State {
    /// Header of the upload, with the worker's number left open, and its files in their order.
    fn describe(&self) -> Result<(v1::UploadHeader, Vec<FileEntry>), FileError> {
        let mut entries = Entries::default();
        self.snapshot.write_files(&mut entries, &self.format)?;
        let known = self.weights_digest.clone();
        let header = v1::UploadHeader {
            worker: 0,
            step: self.snapshot.step,
            weights_digest: known.unwrap_or_else(|| self.snapshot.weights_digest()),
        };
        Ok((header, entries.0))
    }
}

/// Files as the messages of an upload. Writing ends with an error where nobody takes them any more.
struct Chunks {
    sender: mpsc::Sender<v1::UploadChunk>,
    /// Entries of the files to come, in their order.
    entries: Vec<FileEntry>,
}

impl Sink for Chunks {
    fn file(&mut self, name: &str, _size: u64, fill: Fill) -> Result<(), FileError> {
        let path = Path::new(name);
        let entry = self.entries.iter().find(|entry| entry.path == name);
        let entry = entry.ok_or_else(|| FileError::malformed(path, "was not announced"))?;
        let announced = Chunk::File(v1::FileEntry {
            path: entry.path.clone(),
            size: entry.size,
            digest: entry.digest.clone(),
        });
        let mut data = Data {
            sender: &self.sender,
            left: entry.size,
            next: Vec::new(),
        };
        let filled = data.send(announced).and_then(|()| fill(&mut data));
        filled.map_err(FileError::io("hand over", path))
    }
}

/// The bytes of one file.
struct Data<'a> {
    sender: &'a mpsc::Sender<v1::UploadChunk>,
    /// Bytes of the file that are still to be written.
    left: u64,
    next: Vec<u8>,
}

impl Data<'_> {
    fn send(&self, content: Chunk) -> io::Result<()> {
        let sent = self.sender.blocking_send(chunk(content));
        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

impl Write for Data<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.next.is_empty() {
            self.next.reserve_exact(CHUNK_BYTES.min(self.left as usize));
        }
        let count = bytes.len().min(CHUNK_BYTES - self.next.len());
        self.next.extend_from_slice(&bytes[..count]);
        self.left = self.left.saturating_sub(count as u64);
        if self.next.len() == CHUNK_BYTES || self.left == 0 {
            let data = std::mem::take(&mut self.next);
            self.send(Chunk::Data(data.into()))?;
            failpoint::reached("upload");
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn chunk(content: Chunk) -> v1::UploadChunk {
    v1::UploadChunk {
        chunk: Some(content),
    }
}

/// What the trained weights become on disk.
pub fn weights_format(
    job: &JobSpec,
    model_dir: &Path,
    layout: &Layout,
) -> Result<WeightsFormat, FileError> {
    match &job.method {
        Method::Lora(lora) => {
            let modules = match &lora.target_modules {
                TargetModules::Named(names) => names.clone(),
                TargetModules::AllLinear => {
                    adapted_modules(layout, |path| path.rsplit('.').next().unwrap_or(path))
                }
                // By their paths: what Python makes of the pattern need not be what it means here.
                TargetModules::Matching(_) => adapted_modules(layout, |path| path),
            };
            let path = job.base_model.to_string_lossy();
            let base_model = job.base_model_id.as_deref().unwrap_or(&path);
            let mut config = AdapterConfig::from_lora(lora, base_model, modules);
            config.revision = job.model_revision.clone();
            Ok(WeightsFormat::Adapter(config))
        }
        Method::Full => Ok(WeightsFormat::Model {
            config: config_of(model_dir, job, layout)?,
            dtype: match job.base_dtype {
                BaseDtype::Float32 => Dtype::F32,
                BaseDtype::Bfloat16 => Dtype::BF16,
            },
            frozen: frozen(model_dir, job)?,
        }),
    }
}

/// What the job leaves of its model as it is, if there is such.
fn frozen(model_dir: &Path, job: &JobSpec) -> Result<Option<Frozen>, FileError> {
    let folder = ModelFolder::open(model_dir, job.init_weights)?;
    let malformed = |reason: String| FileError::malformed(model_dir, reason);
    let config = ModelConfig::of(&folder).map_err(|error| malformed(error.to_string()))?;
    let tensors = frozen_tensors(&config, &job.unfrozen);
    let tensors = tensors.map_err(|error| malformed(error.to_string()))?;
    if tensors.is_empty() {
        return Ok(None);
    }
    let files = match job.init_weights {
        InitWeights::Random => None,
        InitWeights::Pretrained => {
            let files = WeightFiles::open(&folder, &base_tensors(&config))?;
            Some(Arc::new(files))
        }
    };
    Ok(Some(Frozen { files, tensors }))
}

/// The model's `config.json` with as many tokens as its embedding has now. What was quantised is not any more.
fn config_of(model_dir: &Path, job: &JobSpec, layout: &Layout) -> Result<Value, FileError> {
    let folder = ModelFolder::open(model_dir, job.init_weights)?;
    let mut config = folder.config_json().clone();
    let rows = layout.find(EMBEDDING).map(|tensor| tensor.shape[0]);
    if let (Some(rows), Some(size)) = (rows, config.get_mut("vocab_size")) {
        *size = rows.into();
    }
    if let Some(fields) = config.as_object_mut() {
        fields.remove("quantization_config");
    }
    Ok(config)
}

/// The names (`q_proj`) of the modules that have an adapter.
fn adapted_modules(layout: &Layout, name_of: impl Fn(&str) -> &str) -> Vec<String> {
    let names = layout.tensors.iter().filter_map(|tensor| {
        let (path, _) = parse_tensor_name(&tensor.name)?;
        (!is_of_parameter(path)).then(|| name_of(path).to_owned())
    });
    names.collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use common::files::Flat;

    use super::*;

    const SCALARS: usize = 700_000;

    fn state() -> State {
        let flat = |seed: f32| (0..SCALARS).map(|i| seed + i as f32).collect::<Flat>();
        State {
            snapshot: Snapshot {
                step: 4,
                layout: Arc::new(Layout::new([("a".into(), vec![SCALARS])])),
                weights: flat(0.5).into(),
                moments: vec![flat(-0.25).into(), flat(0.125).into()],
            },
            weights_digest: None,
            format: WeightsFormat::Model {
                config: serde_json::json!({"architectures": ["LlamaForCausalLM"]}),
                dtype: Dtype::BF16,
                frozen: None,
            },
        }
    }

    #[test]
    fn a_refusal_after_a_break_says_what_broke() {
        let broke = Some("connection reset".to_owned());
        assert_eq!(
            reason(broke.clone(), "that state was not asked for"),
            "connection reset; then, when tried again: that state was not asked for"
        );
        assert_eq!(reason(broke, "connection reset"), "connection reset");
        assert_eq!(reason(None, "disk full"), "disk full");
    }

    #[test]
    fn what_is_announced_follows_in_chunks_that_fit() {
        let state = state();
        let (header, entries) = state.describe().unwrap();
        assert_eq!(header.weights_digest, state.snapshot.weights_digest());
        let (sender, mut receiver) = mpsc::channel(100);
        let chunks = Chunks {
            sender,
            entries: entries.clone(),
        };
        state.snapshot.write_files(chunks, &state.format).unwrap();
        let mut files: BTreeMap<String, (u64, blake3::Hasher)> = BTreeMap::new();
        let mut current = String::new();
        while let Some(message) = receiver.blocking_recv() {
            match message.chunk.unwrap() {
                Chunk::File(entry) => {
                    current = entry.path;
                    files.insert(current.clone(), Default::default());
                }
                Chunk::Data(data) => {
                    assert!(!data.is_empty() && data.len() <= CHUNK_BYTES);
                    let (size, hasher) = files.get_mut(&current).unwrap();
                    *size += data.len() as u64;
                    hasher.update(&data);
                }
                Chunk::Header(_) => panic!("a second header"),
            }
        }
        assert_eq!(files.len(), entries.len());
        for entry in entries {
            let (size, hasher) = &files[&entry.path];
            assert_eq!(*size, entry.size, "{}", entry.path);
            assert_eq!(hasher.finalize().to_hex().to_string(), entry.digest);
        }
    }

    #[test]
    fn a_state_that_nobody_takes_any_more_is_not_written_to_its_end() {
        let state = state();
        let (_, entries) = state.describe().unwrap();
        let (sender, receiver) = mpsc::channel(1);
        drop(receiver);
        let chunks = Chunks { sender, entries };
        state
            .snapshot
            .write_files(chunks, &state.format)
            .unwrap_err();
    }
}
