//! State on its way to the coordinator, while training goes on.
//!
//! In: snapshots. Out: the files that a checkpoint holds, written to a folder of this machine, streamed up, and removed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::failpoint;
use common::files::adapter::{AdapterConfig, parse_tensor_name};
use common::files::model::ModelFolder;
use common::files::tensors::Dtype;
use common::files::{FileEntry, FileError, Layout, Snapshot, WeightsFormat};
use common::job::{BaseDtype, JobSpec, Method, TargetModules};
use common::wire::CHUNK_BYTES;
use proto::v1;
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use crate::connect::{Client, retry_delays};
use crate::temporary::TemporaryFolder;

const MAX_FAILURES: usize = 4;

#[derive(Debug, Error)]
pub enum UploadError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("cannot use {path}: {source}")]
    Folder {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the coordinator did not take the state: {reason}")]
    Refused { reason: String },
    #[error("writing the state was interrupted")]
    Interrupted,
}

/// Uploads in the background.
#[derive(Clone)]
pub struct Uploads {
    shared: Arc<Shared>,
    tasks: Arc<Mutex<JoinSet<()>>>,
    runtime: tokio::runtime::Handle,
}

struct Shared {
    client: Client,
    worker: u64,
    cache: PathBuf,
    failures: mpsc::Sender<UploadError>,
    /// One at a time: each needs memory and disk for a whole state.
    turn: tokio::sync::Mutex<()>,
}

impl Uploads {
    /// What fails on this machine is sent to `failures`, because the coordinator cannot know of it. Must be called
    /// within the runtime.
    pub fn new(
        client: Client,
        worker: u64,
        cache: PathBuf,
        failures: mpsc::Sender<UploadError>,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                client,
                worker,
                cache,
                failures,
                turn: tokio::sync::Mutex::new(()),
            }),
            tasks: Arc::default(),
            runtime: tokio::runtime::Handle::current(),
        }
    }

    /// Hands a state over; training goes on at once.
    pub fn start(&self, snapshot: Snapshot, format: WeightsFormat) {
        let shared = self.shared.clone();
        let task = async move {
            let _turn = shared.turn.lock().await;
            let step = snapshot.step;
            match shared.upload(snapshot, format).await {
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

    /// Ends them all: nobody takes the states any more.
    pub fn abandon(&self) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.abort_all();
    }

    /// Waits until everything is handed over, but not for ever.
    pub async fn finish(&self, limit: Duration) {
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        if tokio::time::timeout(limit, tasks.join_all()).await.is_err() {
            tracing::warn!("gave up on a state that could not be handed over in time");
        }
    }
}

impl Shared {
    async fn upload(&self, snapshot: Snapshot, format: WeightsFormat) -> Result<(), UploadError> {
        let parent = self.cache.join("uploads");
        let folder = TemporaryFolder::create(&parent).map_err(|source| UploadError::Folder {
            path: parent,
            source,
        })?;
        let header = v1::UploadHeader {
            worker: self.worker,
            step: snapshot.step,
            weights_digest: snapshot.weights_digest(),
        };
        let path = folder.path().to_owned();
        let write = move || -> Result<Vec<FileEntry>, FileError> {
            snapshot.write_files(&path, &format)?;
            list(&path)
        };
        let written = tokio::task::spawn_blocking(write).await;
        let entries = written.map_err(|_| UploadError::Interrupted)??;
        let mut delays = retry_delays(MAX_FAILURES);
        loop {
            let Err(status) = self.send(folder.path(), &header, &entries).await else {
                return Ok(());
            };
            let transient = status.code() == tonic::Code::Unavailable;
            match delays.next().filter(|_| transient) {
                Some(delay) => tokio::time::sleep(delay).await,
                None => {
                    let reason = status.message().to_owned();
                    return Err(UploadError::Refused { reason });
                }
            }
        }
    }

    async fn send(
        &self,
        folder: &Path,
        header: &v1::UploadHeader,
        entries: &[FileEntry],
    ) -> Result<(), tonic::Status> {
        let (sender, receiver) = mpsc::channel(4);
        let mut client = self.client.clone();
        let reading = read_chunks(folder, header.clone(), entries, sender);
        let sending = client.upload_state(ReceiverStream::new(receiver));
        // Both to their end: a reply before the last chunk is a refusal, and then the reader finds its channel closed.
        let (read, reply) = tokio::join!(reading, sending);
        reply?;
        read.map_err(|e| tonic::Status::internal(e.to_string()))
    }
}

/// The messages of an upload, in order. Ends early where nobody takes them any more.
async fn read_chunks(
    folder: &Path,
    header: v1::UploadHeader,
    entries: &[FileEntry],
    sender: mpsc::Sender<v1::UploadChunk>,
) -> std::io::Result<()> {
    use v1::upload_chunk::Chunk;
    let send = async |chunk: Chunk| {
        sender
            .send(v1::UploadChunk { chunk: Some(chunk) })
            .await
            .is_ok()
    };
    if !send(Chunk::Header(header)).await {
        return Ok(());
    }
    for entry in entries {
        let announced = Chunk::File(v1::FileEntry {
            path: entry.path.clone(),
            size: entry.size,
            digest: entry.digest.clone(),
        });
        if !send(announced).await {
            return Ok(());
        }
        let mut file = tokio::fs::File::open(folder.join(&entry.path)).await?;
        loop {
            let mut data = Vec::with_capacity(CHUNK_BYTES);
            let mut part = (&mut file).take(CHUNK_BYTES as u64);
            if part.read_to_end(&mut data).await? == 0 {
                break;
            }
            if !send(Chunk::Data(data.into())).await {
                return Ok(());
            }
            failpoint::reached("upload");
        }
    }
    Ok(())
}

/// The files of a folder by name. `Snapshot::write_files` makes no subfolders.
fn list(folder: &Path) -> Result<Vec<FileEntry>, FileError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(FileError::io("read", folder))? {
        let entry = entry.map_err(FileError::io("read", folder))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    names
        .iter()
        .map(|name| FileEntry::of(folder, name))
        .collect()
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
                TargetModules::AllLinear => adapted_modules(layout),
            };
            let base_model = job.base_model.to_string_lossy();
            let mut config = AdapterConfig::from_lora(lora, &base_model, modules);
            config.revision = job.model_revision.clone();
            Ok(WeightsFormat::Adapter(config))
        }
        Method::Full => Ok(WeightsFormat::Model {
            config: ModelFolder::open(model_dir, job.init_weights)?
                .config_json()
                .clone(),
            dtype: match job.base_dtype {
                BaseDtype::Float32 => Dtype::F32,
                BaseDtype::Bfloat16 => Dtype::BF16,
            },
        }),
    }
}

/// The names (`q_proj`) of the modules that have an adapter.
fn adapted_modules(layout: &Layout) -> Vec<String> {
    let names = layout.tensors.iter().filter_map(|tensor| {
        let (path, _) = parse_tensor_name(&tensor.name)?;
        path.rsplit('.').next().map(str::to_owned)
    });
    names.collect()
}
