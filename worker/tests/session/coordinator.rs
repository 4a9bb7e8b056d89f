//! The coordinator that the tests play: it serves files, blocks and uploads, and hands every session to the test.

use std::collections::HashMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::data::block::Block;
use common::files::manifest::file_digest;
use common::job::{JobSources, JobSpec};
use common::plan::{Schedule, learning_rate};
use common::wire::{TOKEN_KEY, down, token_matches};
use futures::{Stream, StreamExt};
use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use proto::v1::worker_message::Message as Up;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use worker::join;
use worker::{Finished, JoinOptions, WorkerError};

pub const TOKEN: &str = "secret";
pub const SEQUENCE_LEN: usize = 16;
pub const MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);

/// The bulk half of a coordinator; sessions are handed to the test.
pub struct Fake {
    pub sessions: mpsc::Sender<Peer>,
    /// By digest.
    pub files: Mutex<HashMap<String, Vec<u8>>>,
    pub blocks: Vec<Block>,
    /// File calls that break off half-way, before the others do not.
    pub breaks: AtomicUsize,
    pub fetched_bytes: AtomicUsize,
    /// Who sends the files of a megabyte and more, as long as the caller has got them from there.
    pub holder: Mutex<Option<v1::Member>>,
    pub uploads: Mutex<Vec<v1::UploadChunk>>,
    /// Whoever writes holds the blocks back.
    pub gate: tokio::sync::RwLock<()>,
}

/// One worker, as the coordinator sees it.
pub struct Peer {
    pub up: Streaming<v1::WorkerMessage>,
    pub down: mpsc::Sender<Result<v1::CoordinatorMessage, Status>>,
}

impl Peer {
    pub async fn send(&self, message: Down) {
        self.down.send(Ok(down(message))).await.unwrap();
    }

    /// The next message that is no heartbeat; None at the end.
    pub async fn next(&mut self) -> Option<Up> {
        loop {
            let next = tokio::time::timeout(MESSAGE_TIMEOUT, self.up.message());
            match next.await.unwrap().ok()??.message.unwrap() {
                Up::Heartbeat(_) => {}
                message => return Some(message),
            }
        }
    }

    pub async fn joined(&mut self) -> v1::Join {
        match self.next().await.unwrap() {
            Up::Join(join) => join,
            other => panic!("{other:?}"),
        }
    }

    pub async fn ready(&mut self) -> v1::Ready {
        match self.next().await.unwrap() {
            Up::Ready(ready) => ready,
            other => panic!("{other:?}"),
        }
    }

    pub async fn entered(&mut self) -> v1::Entered {
        match self.next().await.unwrap() {
            Up::Entered(entered) => entered,
            other => panic!("{other:?}"),
        }
    }

    pub async fn synced(&mut self) -> v1::Synced {
        match self.next().await.unwrap() {
            Up::Synced(synced) => synced,
            other => panic!("{other:?}"),
        }
    }

    pub async fn slot_done(&mut self) -> v1::SlotDone {
        match self.next().await.unwrap() {
            Up::SlotDone(done) => done,
            other => panic!("{other:?}"),
        }
    }

    pub async fn withdrawn(&mut self) -> v1::Withdrawn {
        match self.next().await.unwrap() {
            Up::Withdrawn(withdrawn) => withdrawn,
            other => panic!("{other:?}"),
        }
    }

    pub async fn reported(&mut self) -> v1::StepReport {
        match self.next().await.unwrap() {
            Up::StepReport(report) => report,
            other => panic!("{other:?}"),
        }
    }
}

pub type Downstream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Coordinator for Fake {
    type SessionStream = Downstream<v1::CoordinatorMessage>;
    type FetchBlocksStream = Downstream<v1::BlockChunk>;
    type FetchFileStream = Downstream<v1::FileChunk>;

    async fn session(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let token = request.metadata().get(TOKEN_KEY);
        if !token.is_some_and(|token| token_matches(token.as_bytes(), TOKEN)) {
            return Err(Status::unauthenticated("the token is missing or wrong"));
        }
        let (down, queue) = mpsc::channel(64);
        let up = request.into_inner();
        self.sessions.send(Peer { up, down }).await.unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }

    async fn fetch_blocks(
        &self,
        request: Request<v1::FetchBlocksRequest>,
    ) -> Result<Response<Self::FetchBlocksStream>, Status> {
        let _open = self.gate.read().await;
        let chunks: Vec<_> = request
            .into_inner()
            .blocks
            .into_iter()
            .map(|block| {
                let mut data = Vec::new();
                self.blocks[block as usize].encode(&mut data);
                let data = data.into();
                Ok(v1::BlockChunk { block, data })
            })
            .collect();
        Ok(Response::new(Box::pin(futures::stream::iter(chunks))))
    }

    async fn fetch_file(
        &self,
        request: Request<v1::FetchFileRequest>,
    ) -> Result<Response<Self::FetchFileStream>, Status> {
        let _open = self.gate.read().await;
        let v1::FetchFileRequest {
            digest,
            offset,
            worker,
            unusable,
        } = request.into_inner();
        let whole = self.files.lock().unwrap()[&digest].clone();
        let rest = &whole[offset as usize..];
        let holder = self.holder.lock().unwrap().clone();
        let from = holder.filter(|holder| {
            worker != 0 && !unusable.contains(&holder.worker) && rest.len() > 1 << 20
        });
        if from.is_some() {
            let chunk = v1::FileChunk {
                from,
                ..v1::FileChunk::default()
            };
            // Others first, then its turn; the call stays open.
            let chunks = [v1::FileChunk::default(), chunk].map(Ok);
            let open = futures::stream::iter(chunks).chain(futures::stream::pending());
            return Ok(Response::new(Box::pin(open)));
        }
        let breaks = self
            .breaks
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        let sent = match breaks {
            Ok(_) => &rest[..rest.len() / 2],
            Err(_) => rest,
        };
        self.fetched_bytes.fetch_add(sent.len(), Ordering::SeqCst);
        let mut chunks: Vec<_> = sent
            .chunks(1 << 20)
            .map(|data| {
                let data = data.to_vec().into();
                Ok(v1::FileChunk { data, from: None })
            })
            .collect();
        if breaks.is_ok() {
            chunks.push(Err(Status::unavailable("a cable was pulled")));
        }
        Ok(Response::new(Box::pin(futures::stream::iter(chunks))))
    }

    async fn upload_state(
        &self,
        request: Request<Streaming<v1::UploadChunk>>,
    ) -> Result<Response<v1::UploadReply>, Status> {
        let mut chunks = request.into_inner();
        while let Some(chunk) = chunks.message().await? {
            self.uploads.lock().unwrap().push(chunk);
        }
        Ok(Response::new(v1::UploadReply {}))
    }
}

/// A coordinator with a job, its files and its blocks.
pub struct Stage {
    pub fake: Arc<Fake>,
    pub sessions: mpsc::Receiver<Peer>,
    pub server: JoinHandle<()>,
    pub address: String,
    pub job: JobSpec,
    pub welcome: v1::Welcome,
    pub folder: tempfile::TempDir,
}

pub const CONFIG: &str = r#"{
  "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 64, "hidden_size": 16,
  "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
  "hidden_act": "silu", "attention_bias": false, "initializer_range": 0.02, "max_position_embeddings": 64,
  "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "float32"
}"#;

fn job(folder: &Path) -> JobSpec {
    let model = folder.join("model");
    std::fs::create_dir_all(&model).unwrap();
    std::fs::write(model.join("config.json"), CONFIG).unwrap();
    std::fs::write(model.join("notes.txt"), vec![b'x'; 3 << 20]).unwrap();
    let data = folder.join("data.jsonl");
    std::fs::write(&data, "{\"text\": \"x\"}\n").unwrap();
    let set = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    common::job::load(JobSources {
        flags: vec![
            set("base_model", model.to_str().unwrap()),
            set("init_weights", "random"),
            set("datasets.0.path", data.to_str().unwrap()),
            set("sequence_len", "16"),
            set("micro_batch_size", "1"),
            set("global_batch_size", "4"),
            set("max_steps", "3"),
            set("learning_rate", "0.01"),
            set("output_dir", folder.join("out").to_str().unwrap()),
        ],
        ..JobSources::default()
    })
    .unwrap_or_else(|errors| panic!("{errors}"))
}

fn blocks() -> Vec<Block> {
    let block = |number: u32| {
        let token = |at: usize| (number * 7 + at as u32 * 3) % 64;
        Block {
            tokens: (0..SEQUENCE_LEN).map(token).collect(),
            segments: vec![1; SEQUENCE_LEN],
            trained: (0..SEQUENCE_LEN).map(|at| at > 0).collect(),
        }
    };
    (0..12).map(block).collect()
}

pub async fn stage() -> Stage {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let (mut files, mut entries) = (HashMap::new(), Vec::new());
    for name in ["config.json", "notes.txt"] {
        let path = folder.path().join("model").join(name);
        let bytes = std::fs::read(&path).unwrap();
        let digest = file_digest(&path).unwrap();
        entries.push(v1::FileEntry {
            path: name.to_owned(),
            size: bytes.len() as u64,
            digest: digest.clone(),
        });
        files.insert(digest, bytes);
    }
    let (sender, sessions) = mpsc::channel(8);
    let fake = Arc::new(Fake {
        sessions: sender,
        files: Mutex::new(files),
        blocks: blocks(),
        breaks: AtomicUsize::new(0),
        fetched_bytes: AtomicUsize::new(0),
        holder: Mutex::default(),
        uploads: Mutex::default(),
        gate: tokio::sync::RwLock::default(),
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tonic::transport::Server::builder()
        .add_service(CoordinatorServer::from_arc(fake.clone()))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let server = tokio::spawn(async move { drop(server.await) });
    let welcome = v1::Welcome {
        worker: 1,
        term: 1,
        job: serde_json::to_vec(&job).unwrap().into(),
        job_digest: job.digest(),
        model_files: entries,
        model_dir: folder.path().join("model").display().to_string(),
        blocks: Some(v1::BlockSet {
            digest: "0".repeat(64),
            train_blocks: 12,
            eval_blocks: 0,
            sequence_len: SEQUENCE_LEN as u32,
        }),
        total_steps: 3,
        ..v1::Welcome::default()
    };
    Stage {
        fake,
        sessions,
        server,
        address,
        job,
        welcome,
        folder,
    }
}

pub type Joined = JoinHandle<Result<Finished, WorkerError>>;

impl Stage {
    pub fn options(&self) -> JoinOptions {
        JoinOptions {
            threads: Some(1),
            token: Some(TOKEN.to_owned()),
            cache_dir: Some(self.folder.path().join("cache")),
            hub_cache: Some(self.folder.path().join("hub")),
            connect_timeout: Duration::from_secs(5),
            ..JoinOptions::new(&self.address)
        }
    }

    pub async fn session(&mut self) -> Peer {
        let session = tokio::time::timeout(MESSAGE_TIMEOUT, self.sessions.recv());
        session.await.unwrap().unwrap()
    }

    /// A worker that has joined and is ready, and where its peers reach it.
    pub async fn ready_worker(&mut self) -> (Joined, Peer, v1::Member, v1::Ready) {
        let worker = tokio::spawn(join(self.options(), CancellationToken::new()));
        let mut peer = self.session().await;
        let join = peer.joined().await;
        let member = v1::Member {
            worker: 1,
            name: join.name,
            address: format!("127.0.0.1:{}", join.exchange_port),
        };
        peer.send(Down::Welcome(self.welcome.clone())).await;
        let ready = peer.ready().await;
        assert_eq!(ready.job_digest, self.job.digest());
        (worker, peer, member, ready)
    }

    /// What a worker handed over. It ends only when everything that it began to hand over has arrived.
    pub fn uploaded(&self) -> (v1::UploadHeader, Vec<(v1::FileEntry, Vec<u8>)>) {
        use v1::upload_chunk::Chunk;
        let (mut header, mut files) = (None, Vec::<(v1::FileEntry, Vec<u8>)>::new());
        for chunk in self.fake.uploads.lock().unwrap().drain(..) {
            match chunk.chunk.unwrap() {
                Chunk::Header(sent) => assert!(header.replace(sent).is_none()),
                Chunk::File(entry) => files.push((entry, Vec::new())),
                Chunk::Data(data) => files.last_mut().unwrap().1.extend(data),
            }
        }
        (header.unwrap(), files)
    }

    pub fn plan(&self, generation: u64, step: u64) -> v1::Plan {
        let schedule = Schedule::new(&self.job, 12);
        v1::Plan {
            generation,
            step,
            kind: v1::PlanKind::Train as i32,
            slots: schedule.step_slots(step).len() as u32,
            trained_tokens: 4 * (SEQUENCE_LEN as u64 - 1),
            learning_rate: learning_rate(&self.job, step, 3),
            digest: true,
            clear: false,
        }
    }
}

pub fn slots(entered: &v1::Entered) -> Vec<u32> {
    entered.held.iter().map(|held| held.slot).collect()
}

pub fn lease(generation: u64, step: u64, slots: impl IntoIterator<Item = u32>) -> Down {
    Down::Lease(v1::Lease {
        generation,
        step,
        kind: v1::PlanKind::Train as i32,
        slots: slots.into_iter().collect(),
    })
}

pub fn generation(
    number: u64,
    members: &[&v1::Member],
    step: u64,
    behind: &[u32],
) -> v1::Generation {
    v1::Generation {
        deadline_ms: 30_000,
        generation: number,
        members: members.iter().map(|member| (*member).clone()).collect(),
        rank: 0,
        step,
        behind: behind.to_vec(),
        ..v1::Generation::default()
    }
}

pub fn with_rank(generation: &v1::Generation, rank: u32) -> Down {
    let generation = generation.clone();
    Down::Generation(v1::Generation { rank, ..generation })
}

pub async fn finish(worker: Joined, peer: Peer) {
    peer.send(Down::Finish(v1::Finish::default())).await;
    let finished = worker.await.unwrap().unwrap();
    let reason = String::new();
    assert_eq!(finished, Finished::Job { reason });
}

/// Three steps by one worker: the digests that every other run must give.
pub async fn quiet_run() -> Vec<String> {
    let mut stage = stage().await;
    let (worker, mut peer, member, _) = stage.ready_worker().await;
    peer.send(with_rank(&generation(1, &[&member], 0, &[]), 0))
        .await;
    assert!(peer.entered().await.held.is_empty());
    let mut digests = Vec::new();
    for step in 0..3 {
        peer.send(Down::Plan(stage.plan(1, step))).await;
        peer.send(lease(1, step, 0..4)).await;
        for slot in 0..4 {
            let done = peer.slot_done().await;
            assert_eq!(
                (done.step, done.slot, done.trained_tokens),
                (step, slot, 15)
            );
            assert!(done.loss_sum.is_finite() && done.loss_sum > 0.0);
        }
        let generation = 1;
        peer.send(Down::Exchange(v1::Exchange { generation, step }))
            .await;
        let report = peer.reported().await;
        assert_eq!((report.step, report.skipped), (step + 1, false));
        assert!(report.grad_norm > 0.0);
        digests.push(report.weights_digest);
    }
    finish(worker, peer).await;
    assert!(digests[0] != digests[1] && digests[1] != digests[2]);
    digests
}

/// The engine says Ready before it obeys orders.
pub async fn while_it_is_ready() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}
