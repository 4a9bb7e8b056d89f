//! A worker against a coordinator that the test plays: joining, fetching, training, leaving, and everything that can
//! go wrong on the way.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::data::block::Block;
use common::files::manifest::file_digest;
use common::job::{JobSources, JobSpec};
use common::plan::{Schedule, learning_rate};
use common::wire::{TOKEN_KEY, down, token_matches};
use futures::Stream;
use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use proto::v1::worker_message::Message as Up;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use worker::{Finished, JoinOptions, WorkerError, join};

const TOKEN: &str = "secret";
const SEQUENCE_LEN: usize = 16;
const LIMIT: Duration = Duration::from_secs(60);

/// The bulk half of a coordinator; sessions are handed to the test.
struct Fake {
    sessions: mpsc::Sender<Peer>,
    /// By digest.
    files: Mutex<HashMap<String, Vec<u8>>>,
    blocks: Vec<Block>,
    /// File calls that break off half-way, before the others do not.
    breaks: AtomicUsize,
    fetched_bytes: AtomicUsize,
    uploads: Mutex<Vec<v1::UploadChunk>>,
    /// Whoever writes holds the blocks back.
    gate: tokio::sync::RwLock<()>,
}

/// One worker, as the coordinator sees it.
struct Peer {
    up: Streaming<v1::WorkerMessage>,
    down: mpsc::Sender<Result<v1::CoordinatorMessage, Status>>,
}

impl Peer {
    async fn send(&self, message: Down) {
        self.down.send(Ok(down(message))).await.unwrap();
    }

    /// The next message that is no heartbeat; None at the end.
    async fn next(&mut self) -> Option<Up> {
        loop {
            let next = tokio::time::timeout(LIMIT, self.up.message());
            match next.await.unwrap().ok()??.message.unwrap() {
                Up::Heartbeat(_) => {}
                message => return Some(message),
            }
        }
    }

    async fn joined(&mut self) -> v1::Join {
        match self.next().await.unwrap() {
            Up::Join(join) => join,
            other => panic!("{other:?}"),
        }
    }

    async fn ready(&mut self) -> v1::Ready {
        match self.next().await.unwrap() {
            Up::Ready(ready) => ready,
            other => panic!("{other:?}"),
        }
    }

    async fn entered(&mut self) -> v1::Entered {
        match self.next().await.unwrap() {
            Up::Entered(entered) => entered,
            other => panic!("{other:?}"),
        }
    }

    async fn synced(&mut self) -> v1::Synced {
        match self.next().await.unwrap() {
            Up::Synced(synced) => synced,
            other => panic!("{other:?}"),
        }
    }

    async fn slot_done(&mut self) -> v1::SlotDone {
        match self.next().await.unwrap() {
            Up::SlotDone(done) => done,
            other => panic!("{other:?}"),
        }
    }

    async fn reported(&mut self) -> v1::StepReport {
        match self.next().await.unwrap() {
            Up::StepReport(report) => report,
            other => panic!("{other:?}"),
        }
    }
}

type Downstream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

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
        let v1::FetchFileRequest { digest, offset } = request.into_inner();
        let rest = &self.files.lock().unwrap()[&digest][offset as usize..];
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
                Ok(v1::FileChunk { data })
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
struct Stage {
    fake: Arc<Fake>,
    sessions: mpsc::Receiver<Peer>,
    server: JoinHandle<()>,
    address: String,
    job: JobSpec,
    welcome: v1::Welcome,
    folder: tempfile::TempDir,
}

const CONFIG: &str = r#"{
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

async fn stage() -> Stage {
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

type Joined = JoinHandle<Result<Finished, WorkerError>>;

impl Stage {
    fn options(&self) -> JoinOptions {
        JoinOptions {
            threads: Some(1),
            token: Some(TOKEN.to_owned()),
            cache_dir: Some(self.folder.path().join("cache")),
            connect_timeout: Duration::from_secs(5),
            ..JoinOptions::new(&self.address)
        }
    }

    async fn session(&mut self) -> Peer {
        let session = tokio::time::timeout(LIMIT, self.sessions.recv());
        session.await.unwrap().unwrap()
    }

    /// A worker that has joined and is ready, and where its peers reach it.
    async fn ready_worker(&mut self) -> (Joined, Peer, v1::Member, v1::Ready) {
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
    fn uploaded(&self) -> (v1::UploadHeader, Vec<(v1::FileEntry, Vec<u8>)>) {
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

    fn plan(&self, generation: u64, step: u64) -> v1::Plan {
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

fn slots(entered: &v1::Entered) -> Vec<u32> {
    entered.held.iter().map(|held| held.slot).collect()
}

fn lease(generation: u64, step: u64, slots: impl IntoIterator<Item = u32>) -> Down {
    Down::Lease(v1::Lease {
        generation,
        step,
        kind: v1::PlanKind::Train as i32,
        slots: slots.into_iter().collect(),
    })
}

fn generation(number: u64, members: &[&v1::Member], step: u64, behind: &[u32]) -> v1::Generation {
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

fn with_rank(generation: &v1::Generation, rank: u32) -> Down {
    let generation = generation.clone();
    Down::Generation(v1::Generation { rank, ..generation })
}

async fn finish(worker: Joined, peer: Peer) {
    peer.send(Down::Finish(v1::Finish::default())).await;
    let finished = worker.await.unwrap().unwrap();
    let reason = String::new();
    assert_eq!(finished, Finished::Job { reason });
}

/// Three steps by one worker: the digests that every other run must give.
async fn quiet_run() -> Vec<String> {
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

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_leaves_and_one_that_comes_change_nothing() {
    let expected = quiet_run().await;
    let mut stage = stage().await;
    let (first, mut one, member_one, _) = stage.ready_worker().await;
    let (second, mut two, member_two, _) = stage.ready_worker().await;
    let both = generation(1, &[&member_one, &member_two], 0, &[]);
    for (rank, peer) in [&mut one, &mut two].into_iter().enumerate() {
        peer.send(with_rank(&both, rank as u32)).await;
        peer.entered().await;
        peer.send(Down::Plan(stage.plan(1, 0))).await;
    }
    one.send(lease(1, 0, [0, 1, 2])).await;
    two.send(lease(1, 0, [3])).await;
    for _ in 0..3 {
        one.slot_done().await;
    }
    two.slot_done().await;
    let exchange = |generation, step| Down::Exchange(v1::Exchange { generation, step });
    for peer in [&mut one, &mut two] {
        // The next step is planned ahead.
        peer.send(exchange(1, 0)).await;
        peer.send(Down::Plan(stage.plan(1, 1))).await;
    }
    one.send(lease(1, 1, [0, 1])).await;
    two.send(lease(1, 1, [2])).await;
    for peer in [&mut one, &mut two] {
        assert_eq!(peer.reported().await.weights_digest, expected[0]);
    }
    for _ in 0..2 {
        one.slot_done().await;
    }
    two.slot_done().await;
    // The second goes with what it holds; a third comes, with the weights of the start.
    drop(two);
    second.abort();
    let (third, mut three, member_three, ready) = stage.ready_worker().await;
    assert_eq!(ready.step, 0);
    let changed = generation(2, &[&member_one, &member_three], 1, &[1]);
    for (rank, peer) in [&mut one, &mut three].into_iter().enumerate() {
        peer.send(with_rank(&changed, rank as u32)).await;
    }
    let entered = one.entered().await;
    assert_eq!((entered.step, slots(&entered)), (1, vec![0, 1]));
    let entered = three.entered().await;
    assert_eq!((entered.step, slots(&entered)), (1, vec![]));
    for peer in [&mut one, &mut three] {
        peer.send(Down::Plan(stage.plan(2, 1))).await;
    }
    // What names the old generation is void.
    three.send(lease(1, 1, [0])).await;
    three.send(lease(2, 1, [2, 3])).await;
    assert_eq!(three.slot_done().await.slot, 2);
    three.slot_done().await;
    for peer in [&mut one, &mut three] {
        peer.send(exchange(2, 1)).await;
    }
    for peer in [&mut one, &mut three] {
        assert_eq!(peer.reported().await.weights_digest, expected[1]);
    }
    finish(first, one).await;
    finish(third, three).await;
}

/// A newcomer copies the state of a member that goes on, and then takes part: after step 2 at once, or with the update
/// that leads there still on its way.
async fn join_by_feed(last_update_is_late: bool) {
    let expected = quiet_run().await;
    let mut stage = stage().await;
    let (first, mut one, mut member_one, _) = stage.ready_worker().await;
    let (second, mut two, mut member_two, _) = stage.ready_worker().await;
    (member_one.worker, member_two.worker) = (7, 8);
    let alone = generation(1, &[&member_one], 0, &[]);
    one.send(with_rank(&alone, 0)).await;
    one.entered().await;
    let (attempt, worker) = (1, 8);
    two.send(Down::Follow(v1::Follow {
        attempt,
        worker,
        step: 1,
        source: Some(member_one.clone()),
    }))
    .await;
    let exchange = |generation, step| Down::Exchange(v1::Exchange { generation, step });
    let mut both = generation(2, &[&member_one, &member_two], 2, &[]);
    for step in 0..2 {
        one.send(Down::Plan(stage.plan(1, step))).await;
        one.send(lease(1, step, 0..4)).await;
        for _ in 0..4 {
            one.slot_done().await;
        }
        if step == 1 && last_update_is_late {
            both.fed = vec![1];
            two.send(with_rank(&both, 1)).await;
        }
        one.send(exchange(1, step)).await;
        let report = one.reported().await;
        assert_eq!(report.weights_digest, expected[step as usize]);
        if step == 0 {
            one.send(Down::Feed(v1::Feed { attempt, worker })).await;
        }
        let synced = two.synced().await;
        assert_eq!((synced.attempt, synced.step), (1, step + 1));
        let repeated = synced
            .report
            .map(|report| (report.weights_digest, report.grad_norm));
        let made = (step == 1).then_some((report.weights_digest, report.grad_norm));
        assert_eq!(repeated, made);
    }
    one.send(with_rank(&both, 0)).await;
    if !last_update_is_late {
        two.send(with_rank(&both, 1)).await;
    }
    for (peer, slots) in [(&mut one, 0..2), (&mut two, 2..4)] {
        assert_eq!(peer.entered().await.step, 2);
        peer.send(Down::Plan(stage.plan(2, 2))).await;
        peer.send(lease(2, 2, slots)).await;
        peer.slot_done().await;
        peer.slot_done().await;
    }
    for peer in [&mut one, &mut two] {
        peer.send(exchange(2, 2)).await;
    }
    // Weights and moments are those of one that was there from the start.
    for peer in [&mut one, &mut two] {
        assert_eq!(peer.reported().await.weights_digest, expected[2]);
    }
    finish(first, one).await;
    finish(second, two).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_repeats_the_updates_of_its_source_to_the_bit() {
    join_by_feed(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_enters_with_its_last_update_on_the_way() {
    join_by_feed(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_obeys_while_it_follows() {
    let mut stage = stage().await;
    let (worker, mut peer, _, _) = stage.ready_worker().await;
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let follow = |attempt, address: String| {
        Down::Follow(v1::Follow {
            attempt,
            worker: 1,
            step: 1,
            source: Some(v1::Member {
                address,
                ..v1::Member::default()
            }),
        })
    };
    // One that accepts and says nothing, then one that ends the feed at once.
    peer.send(follow(1, silent.local_addr().unwrap().to_string()))
        .await;
    peer.send(Down::SaveState(v1::SaveState {
        step: 0,
        r#final: false,
    }))
    .await;
    while stage.fake.uploads.lock().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let ended = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    peer.send(follow(2, ended.local_addr().unwrap().to_string()))
        .await;
    tokio::task::spawn_blocking(move || {
        use std::io::Write;
        use worker::collective::frame::{FrameHeader, FrameKind};
        let (mut stream, _) = ended.accept().unwrap();
        let header = FrameHeader::of(FrameKind::Ended, 0, b"has had enough");
        stream.write_all(&header.encode()).unwrap();
        stream.write_all(b"has had enough").unwrap();
        // Closing while unread bytes wait would reset the connection, and the answer might be lost.
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    })
    .await
    .unwrap();
    match peer.next().await.unwrap() {
        Up::FeedLost(lost) => {
            assert_eq!(lost.attempt, 2);
            assert_eq!(lost.reason, "has had enough");
        }
        other => panic!("{other:?}"),
    }
    peer.send(follow(3, silent.local_addr().unwrap().to_string()))
        .await;
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_begun_is_given_back_at_once_and_never_computed() {
    let mut stage = stage().await;
    let fake = stage.fake.clone();
    let gate = fake.gate.write().await;
    let (worker, mut peer, member, _) = stage.ready_worker().await;
    peer.send(with_rank(&generation(1, &[&member], 0, &[]), 0))
        .await;
    peer.entered().await;
    peer.send(Down::Plan(stage.plan(1, 0))).await;
    peer.send(lease(1, 0, 0..3)).await;
    let withdraw = |generation, slots: &[u32]| {
        Down::Withdraw(v1::Withdraw {
            generation,
            step: 0,
            kind: v1::PlanKind::Train as i32,
            slots: slots.to_vec(),
        })
    };
    // Those of another generation are not what was leased.
    peer.send(withdraw(2, &[0, 1, 2])).await;
    peer.send(withdraw(1, &[0, 2, 3])).await;
    match peer.next().await.unwrap() {
        Up::Withdrawn(withdrawn) => assert_eq!(withdrawn.slots, [0, 2]),
        other => panic!("{other:?}"),
    }
    drop(gate);
    peer.send(lease(1, 0, [2])).await;
    for slot in [1, 2] {
        assert_eq!(peer.slot_done().await.slot, slot);
    }
    // What is done is not given back.
    peer.send(withdraw(1, &[1])).await;
    peer.send(with_rank(&generation(2, &[&member], 0, &[]), 0))
        .await;
    assert_eq!(slots(&peer.entered().await), [1, 2]);
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_peer_is_reported_and_the_survivor_keeps_its_slots() {
    let expected = quiet_run().await;
    let mut stage = stage().await;
    let (first, mut one, member_one, _) = stage.ready_worker().await;
    // A peer that connects and then dies in the exchange.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ghost = v1::Member {
        worker: 2,
        name: "ghost".to_owned(),
        address: silent.local_addr().unwrap().to_string(),
    };
    let both = generation(1, &[&ghost, &member_one], 0, &[]);
    one.send(with_rank(&both, 1)).await;
    one.entered().await;
    one.send(Down::Plan(stage.plan(1, 0))).await;
    one.send(lease(1, 0, [1, 2])).await;
    one.slot_done().await;
    one.slot_done().await;
    let generation_one = 1;
    let step = 0;
    one.send(Down::Exchange(v1::Exchange {
        generation: generation_one,
        step,
    }))
    .await;
    tokio::task::spawn_blocking(move || {
        use std::io::{Read, Write};
        let (mut stream, _) = silent.accept().unwrap();
        let mut hello = [0; worker::collective::frame::HELLO_BYTES];
        stream.read_exact(&mut hello).unwrap();
        let hello = worker::collective::frame::Hello::decode(&hello).unwrap();
        let answer = worker::collective::frame::Hello {
            from: hello.to,
            to: hello.from,
            ..hello
        };
        stream.write_all(&answer.encode()).unwrap();
    })
    .await
    .unwrap();
    match one.next().await.unwrap() {
        Up::PeerLost(lost) => assert_eq!((lost.generation, lost.rank), (1, 0)),
        other => panic!("{other:?}"),
    }
    one.send(with_rank(&generation(2, &[&member_one], 0, &[]), 0))
        .await;
    assert_eq!(slots(&one.entered().await), [1, 2]);
    one.send(Down::Plan(stage.plan(2, 0))).await;
    one.send(lease(2, 0, [0, 3])).await;
    one.slot_done().await;
    one.slot_done().await;
    let generation = 2;
    one.send(Down::Exchange(v1::Exchange { generation, step }))
        .await;
    assert_eq!(one.reported().await.weights_digest, expected[0]);
    finish(first, one).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_is_uploaded_file_by_file() {
    let mut stage = stage().await;
    let (worker, peer, _, ready) = stage.ready_worker().await;
    peer.send(Down::SaveState(v1::SaveState {
        step: 0,
        r#final: true,
    }))
    .await;
    while stage.fake.uploads.lock().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    finish(worker, peer).await;
    let (header, files) = stage.uploaded();
    assert_eq!(header.weights_digest, ready.weights_digest);
    for (entry, bytes) in &files {
        assert_eq!(entry.digest, blake3::hash(bytes).to_hex().to_string());
    }
    let names: Vec<&str> = files.iter().map(|(entry, _)| entry.path.as_str()).collect();
    assert_eq!(
        names,
        ["config.json", "model.safetensors", "optimizer.safetensors"]
    );
    // Nothing stays behind on this machine.
    let left = std::fs::read_dir(stage.folder.path().join("cache/uploads")).unwrap();
    assert_eq!(left.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_is_not_here_is_fetched_and_gone_on_from() {
    let expected = quiet_run().await;
    let mut stage = stage().await;
    let exchange = |generation, step| Down::Exchange(v1::Exchange { generation, step });
    let train = async |peer: &mut Peer, member: &v1::Member, plan: v1::Plan| {
        let step = plan.step;
        peer.send(with_rank(&generation(1, &[member], step, &[]), 0))
            .await;
        peer.entered().await;
        peer.send(Down::Plan(plan)).await;
        peer.send(lease(1, step, 0..4)).await;
        for _ in 0..4 {
            peer.slot_done().await;
        }
        let r#final = false;
        let step = step + 1;
        peer.send(Down::SaveState(v1::SaveState { step, r#final }))
            .await;
        peer.send(exchange(1, plan.step)).await;
        peer.reported().await.weights_digest
    };
    let (worker, mut peer, member, _) = stage.ready_worker().await;
    let digest = train(&mut peer, &member, stage.plan(1, 0)).await;
    assert_eq!(digest, expected[0]);
    finish(worker, peer).await;
    for (entry, bytes) in stage.uploaded().1 {
        let mut files = stage.fake.files.lock().unwrap();
        files.insert(entry.digest.clone(), bytes);
        stage.welcome.state_files.push(entry);
    }
    stage.welcome.start_step = 1;
    stage.welcome.state_dir = "/nowhere".to_owned();
    let (worker, mut peer, member, ready) = stage.ready_worker().await;
    assert_eq!((ready.step, ready.weights_digest), (1, digest));
    let digest = train(&mut peer, &member, stage.plan(1, 1)).await;
    assert_eq!(digest, expected[1]);
    finish(worker, peer).await;
    // It is of use only once.
    let left = std::fs::read_dir(stage.folder.path().join("cache/states")).unwrap();
    assert_eq!(left.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_not_here_is_fetched_once_and_a_broken_fetch_goes_on() {
    let mut stage = stage().await;
    stage.welcome.model_dir = "/nowhere".to_owned();
    stage.fake.breaks.store(3, Ordering::SeqCst);
    let (worker, peer, ..) = stage.ready_worker().await;
    finish(worker, peer).await;
    let size: usize = stage
        .fake
        .files
        .lock()
        .unwrap()
        .values()
        .map(Vec::len)
        .sum();
    // Each break costs nothing: the next call begins where the last one ended.
    assert_eq!(stage.fake.fetched_bytes.load(Ordering::SeqCst), size);
    let (worker, peer, ..) = stage.ready_worker().await;
    finish(worker, peer).await;
    assert_eq!(stage.fake.fetched_bytes.load(Ordering::SeqCst), size);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_name_that_leads_out_of_the_cache_is_refused() {
    let mut stage = stage().await;
    stage.welcome.model_dir = "/nowhere".to_owned();
    stage.welcome.model_files[0].path = "../../evil".to_owned();
    let worker = tokio::spawn(join(stage.options(), CancellationToken::new()));
    let mut peer = stage.session().await;
    peer.joined().await;
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    match peer.next().await.unwrap() {
        Up::Leaving(leaving) => assert!(leaving.failed, "{}", leaving.reason),
        other => panic!("{other:?}"),
    }
    drop(peer);
    let message = worker.await.unwrap().unwrap_err().to_string();
    assert!(message.contains("../../evil"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_with_another_digest_is_refused() {
    let mut stage = stage().await;
    stage.welcome.model_dir = "/nowhere".to_owned();
    let right = stage.welcome.model_files[0].digest.clone();
    let wrong = "1".repeat(64);
    stage.welcome.model_files[0].digest = wrong.clone();
    {
        let mut files = stage.fake.files.lock().unwrap();
        let bytes = files[&right].clone();
        files.insert(wrong, bytes);
    }
    let worker = tokio::spawn(join(stage.options(), CancellationToken::new()));
    let mut peer = stage.session().await;
    peer.joined().await;
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    peer.next().await;
    drop(peer);
    let message = worker.await.unwrap().unwrap_err().to_string();
    assert!(
        message.contains("config.json") && message.contains("digest"),
        "{message}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_asked_to_stop_says_goodbye() {
    let mut stage = stage().await;
    let shutdown = CancellationToken::new();
    let worker = tokio::spawn(join(stage.options(), shutdown.clone()));
    let mut peer = stage.session().await;
    peer.joined().await;
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    peer.ready().await;
    while_it_is_ready().await;
    shutdown.cancel();
    match peer.next().await.unwrap() {
        Up::Draining(draining) => assert_eq!(draining.reason, "it was asked to stop"),
        other => panic!("{other:?}"),
    }
    let finish = v1::Finish {
        failed: false,
        reason: "its work is counted".into(),
        resumable: false,
    };
    peer.send(Down::Finish(finish)).await;
    drop(peer);
    assert_eq!(worker.await.unwrap().unwrap(), Finished::Left);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_still_loads_says_goodbye_at_once() {
    let mut stage = stage().await;
    let shutdown = CancellationToken::new();
    let worker = tokio::spawn(join(stage.options(), shutdown.clone()));
    let mut peer = stage.session().await;
    peer.joined().await;
    // Without the model's files it cannot begin.
    stage.welcome.model_dir = "/nowhere".into();
    let gate = stage.fake.clone();
    let _held = gate.gate.write().await;
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    // The first heartbeat says that it has read the Welcome.
    let first = peer.up.message().await.unwrap().unwrap();
    assert!(matches!(first.message, Some(Up::Heartbeat(_))), "{first:?}");
    shutdown.cancel();
    match peer.next().await.unwrap() {
        Up::Leaving(leaving) => assert!(!leaving.failed),
        other => panic!("{other:?}"),
    }
    drop(peer);
    assert_eq!(worker.await.unwrap().unwrap(), Finished::Left);
}

/// The engine says Ready before it obeys orders.
async fn while_it_is_ready() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}

impl Stage {
    /// A worker alone that has made the first step and holds slots 0 and 1 of the second.
    async fn one_step_further(&mut self) -> (Joined, Peer, v1::Member) {
        let (worker, mut peer, member, _) = self.ready_worker().await;
        self.make_first_step(&mut peer, &member).await;
        peer.send(Down::Plan(self.plan(1, 1))).await;
        peer.send(lease(1, 1, [0, 1])).await;
        peer.slot_done().await;
        peer.slot_done().await;
        (worker, peer, member)
    }

    async fn make_first_step(&self, peer: &mut Peer, member: &v1::Member) {
        peer.send(with_rank(&generation(1, &[member], 0, &[]), 0))
            .await;
        peer.entered().await;
        peer.send(Down::Plan(self.plan(1, 0))).await;
        peer.send(lease(1, 0, 0..4)).await;
        for _ in 0..4 {
            peer.slot_done().await;
        }
        let (generation, step) = (1, 0);
        peer.send(Down::Exchange(v1::Exchange { generation, step }))
            .await;
        assert_eq!(peer.reported().await.step, 1);
    }

    /// The worker comes back to a new term.
    async fn rejoined(&mut self) -> (Peer, v1::Join, v1::Ready) {
        let mut peer = self.session().await;
        let join = peer.joined().await;
        self.welcome.term += 1;
        peer.send(Down::Welcome(self.welcome.clone())).await;
        let ready = peer.ready().await;
        (peer, join, ready)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_goes_on_under_a_new_term_with_what_it_holds() {
    let expected = quiet_run().await;
    let mut stage = stage().await;
    stage.welcome.run = "run".to_owned();
    let (worker, peer, member) = stage.one_step_further().await;
    // A lease that is in hand when the coordinator dies is computed all the same.
    peer.send(lease(1, 1, [2])).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(peer);

    let (mut peer, join, ready) = stage.rejoined().await;
    assert_eq!(
        (join.job_digest, join.run),
        (stage.job.digest(), "run".to_owned())
    );
    assert_eq!((ready.step, &ready.weights_digest), (1, &expected[0]));
    let update = ready.updates.last().unwrap();
    assert_eq!(update.report.as_ref().unwrap().weights_digest, expected[0]);
    assert_eq!(update.slots.len(), 4);
    assert!(update.slots.iter().all(|slot| slot.loss_sum > 0.0));

    // The same number as under the last term, which did not write its generation down.
    peer.send(with_rank(&generation(1, &[&member], 1, &[]), 0))
        .await;
    let entered = peer.entered().await;
    assert_eq!(slots(&entered), [0, 1, 2]);
    assert!(entered.held.iter().all(|held| held.trained_tokens == 15));
    peer.send(Down::Plan(stage.plan(1, 1))).await;
    peer.send(lease(1, 1, [3])).await;
    assert_eq!(peer.slot_done().await.slot, 3);
    let (generation, step) = (1, 1);
    peer.send(Down::Exchange(v1::Exchange { generation, step }))
        .await;
    assert_eq!(peer.reported().await.weights_digest, expected[1]);
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_accumulator_that_cannot_be_counted_is_emptied() {
    let expected = quiet_run().await;
    let mut stage = stage().await;
    let (worker, peer, member) = stage.one_step_further().await;
    drop(peer);
    let (mut peer, ..) = stage.rejoined().await;
    peer.send(with_rank(&generation(2, &[&member], 1, &[]), 0))
        .await;
    assert_eq!(slots(&peer.entered().await), [0, 1]);
    let clear = true;
    peer.send(Down::Plan(v1::Plan {
        clear,
        ..stage.plan(2, 1)
    }))
    .await;
    // Computed again: were they still in the sum, it would be another.
    peer.send(lease(2, 1, 0..4)).await;
    for _ in 0..4 {
        peer.slot_done().await;
    }
    let (generation, step) = (2, 1);
    peer.send(Down::Exchange(v1::Exchange { generation, step }))
        .await;
    assert_eq!(peer.reported().await.weights_digest, expected[1]);
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_expelled_comes_back_without_its_state() {
    let mut stage = stage().await;
    let (worker, peer, _) = stage.one_step_further().await;
    let status = Status::aborted("this machine computes wrongly");
    peer.down.send(Err(status)).await.unwrap();
    let (peer, join, ready) = stage.rejoined().await;
    assert!(join.job_digest.is_empty() && join.run.is_empty());
    assert_eq!(ready.step, 0);
    assert!(ready.updates.is_empty());
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_of_an_earlier_run_is_dropped() {
    let mut stage = stage().await;
    let (worker, peer, _) = stage.one_step_further().await;
    drop(peer);
    stage.welcome.run = "anew".to_owned();
    let mut peer = stage.session().await;
    assert!(!peer.joined().await.job_digest.is_empty());
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    assert!(matches!(peer.next().await, Some(Up::Leaving(_))));
    drop(peer);
    let (peer, join, ready) = stage.rejoined().await;
    assert!(join.job_digest.is_empty());
    assert_eq!(ready.step, 0);
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_stops_to_be_resumed_is_waited_for() {
    let mut stage = stage().await;
    let (worker, peer, _) = stage.one_step_further().await;
    peer.send(Down::Finish(v1::Finish {
        failed: false,
        reason: "terminated by a signal".to_owned(),
        resumable: true,
    }))
    .await;
    let (peer, _, ready) = stage.rejoined().await;
    assert_eq!(ready.step, 1);
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_of_another_job_is_named_with_both_digests() {
    let mut stage = stage().await;
    let (worker, peer, _) = stage.one_step_further().await;
    drop(peer);
    let other = JobSpec {
        seed: stage.job.seed + 1,
        ..stage.job.clone()
    };
    stage.welcome.job = serde_json::to_vec(&other).unwrap().into();
    stage.welcome.job_digest = other.digest();
    let mut peer = stage.session().await;
    assert_eq!(peer.joined().await.job_digest, stage.job.digest());
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    assert!(matches!(peer.next().await, Some(Up::Leaving(_))));
    drop(peer);
    let error = worker.await.unwrap().unwrap_err().to_string();
    for part in [&stage.job.digest(), &other.digest(), &stage.address] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(error.lines().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_does_not_come_back_is_given_up() {
    let mut stage = stage().await;
    let mut options = stage.options();
    options.reconnect_timeout = Duration::from_secs(1);
    let worker = tokio::spawn(join(options, CancellationToken::new()));
    let mut peer = stage.session().await;
    peer.joined().await;
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    peer.ready().await;
    stage.server.abort();
    drop(peer);
    let started = Instant::now();
    let error = worker.await.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::Unreachable { .. }), "{error}");
    let error = error.to_string();
    assert!(error.contains(&stage.address) && error.lines().count() == 1);
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_no_coordinator_is_given_up_at_once() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut heard = [0; 24];
            stream.read_exact(&mut heard).await.unwrap();
            let answer = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";
            stream.write_all(answer).await.unwrap();
            // Closing while unread bytes wait would reset the connection, and the answer might be lost.
            stream.shutdown().await.unwrap();
            tokio::io::copy(&mut stream, &mut tokio::io::sink())
                .await
                .ok();
        }
    });
    let started = Instant::now();
    let joined = join(JoinOptions::new(&address), CancellationToken::new()).await;
    assert_eq!(
        joined.unwrap_err().to_string(),
        format!("{address} answers, but is no Muster coordinator")
    );
    assert!(started.elapsed() < Duration::from_secs(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_coordinator_says_against_a_worker_is_the_error() {
    let mut stage = stage().await;
    let mut options = stage.options();
    options.token = None;
    let error = join(options, CancellationToken::new()).await.unwrap_err();
    assert!(matches!(&error, WorkerError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("token"), "{error}");

    let worker = tokio::spawn(join(stage.options(), CancellationToken::new()));
    let mut peer = stage.session().await;
    assert_eq!(peer.joined().await.version, common::VERSION);
    let refusal = "this run is of another numerics class";
    let status = Err(Status::failed_precondition(refusal));
    peer.down.send(status).await.unwrap();
    let error = worker.await.unwrap().unwrap_err();
    assert!(error.to_string().contains(refusal), "{error}");

    let (worker, peer, ..) = stage.ready_worker().await;
    let reason = "three steps in a row were skipped".to_owned();
    let failed = true;
    peer.send(Down::Finish(v1::Finish {
        failed,
        reason,
        resumable: false,
    }))
    .await;
    let error = worker.await.unwrap().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the job failed: three steps in a row were skipped"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_reads_differently_here_names_both_digests() {
    let mut stage = stage().await;
    stage.welcome.job_digest = "5".repeat(64);
    let worker = tokio::spawn(join(stage.options(), CancellationToken::new()));
    let mut peer = stage.session().await;
    peer.joined().await;
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    let heard = match peer.next().await.unwrap() {
        Up::Leaving(leaving) => leaving.reason,
        other => panic!("{other:?}"),
    };
    drop(peer);
    let message = worker.await.unwrap().unwrap_err().to_string();
    for message in [message, heard] {
        assert!(
            message.contains(&"5".repeat(64)) && message.contains(&stage.job.digest()),
            "{message}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_is_not_there_is_given_up_in_time() {
    let vacant = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = vacant.local_addr().unwrap().to_string();
    drop(vacant);
    let started = Instant::now();
    let error = join(
        JoinOptions {
            connect_timeout: Duration::from_secs(1),
            ..JoinOptions::new(&address)
        },
        CancellationToken::new(),
    )
    .await
    .unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(error.to_string().contains(&address), "{error}");
    for wrong in ["localhost", ":7077", "host:port", "http://host:7077"] {
        let joined = join(JoinOptions::new(wrong), CancellationToken::new()).await;
        assert!(
            matches!(joined, Err(WorkerError::Address { .. })),
            "{wrong}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_cannot_save_the_state_leaves_it_to_another() {
    let mut stage = stage().await;
    let (worker, mut peer, ..) = stage.ready_worker().await;
    // A file where the folder for uploads should be.
    let cache = stage.folder.path().join("cache");
    std::fs::create_dir_all(&cache).unwrap();
    std::fs::write(cache.join("uploads"), "").unwrap();
    let save = v1::SaveState {
        step: 0,
        r#final: true,
    };
    peer.send(Down::SaveState(save)).await;
    match peer.next().await.unwrap() {
        Up::Leaving(leaving) => assert!(leaving.failed && leaving.reason.contains("uploads")),
        other => panic!("{other:?}"),
    }
    drop(peer);
    let message = worker.await.unwrap().unwrap_err().to_string();
    assert!(message.contains("could not be saved"), "{message}");
}
