//! The coordinator's process: everything of a run but its preparation and its files.

use std::io::Write;
use std::sync::Arc;

use common::data::block::Block;
use common::data::blockfile;
use common::files::model::ModelFolder;
use common::job::{InitWeights, JobSources, JobSpec};
use common::progress::Progress;
use coordinator::cluster::run_event::RunEvent;
use coordinator::cluster::{BlockTokens, Cluster, PreviousTerms, RunSchedule, Settings};
use coordinator::driver::control_loop::{Driver, WelcomeTemplate};
use coordinator::driver::transfers::Transfers;
use coordinator::rpc::reception::Reception;
use coordinator::rpc::server::serve;
use coordinator::rpc::service::Service;
use coordinator::store::checkpoints::{State, Store};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub const SEQUENCE_LEN: usize = 128;
const STEPS: u64 = 1_000_000;

/// Serves until it is killed. Says its address in the first line of its output.
pub fn run(min_workers: usize, slots: usize) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime needs no more than the system gives every process");
    runtime.block_on(drive(min_workers, slots));
}

async fn drive(min_workers: usize, slots: usize) {
    let folder = tempfile::tempdir().expect("there is a place for temporary files");
    // The first token of a segment is never trained.
    let block = Block {
        tokens: vec![1; SEQUENCE_LEN],
        segments: vec![1; SEQUENCE_LEN],
        trained: (0..SEQUENCE_LEN).map(|token| token > 0).collect(),
    };
    let blocks = std::iter::repeat_n(block, slots);
    let path = folder.path().join("blocks");
    let counts = (slots as u64, 0);
    let file = blockfile::write(&path, SEQUENCE_LEN, counts, [0; 32], b"", blocks)
        .expect("the temporary folder has room");
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}"#;
    std::fs::write(folder.path().join("config.json"), config).expect("it has room for this too");
    let job = Arc::new(job(folder.path(), min_workers, slots));
    let job_digest = job.digest();
    let (inputs, arrivals) = mpsc::channel(1024);
    let (observer, mut events) = mpsc::channel::<RunEvent>(4096);
    let shelf = Arc::new(Transfers::new(file));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("the loopback has a free port");
    let address = listener.local_addr().expect("it is bound");
    println!("http://{address}");
    std::io::stdout().flush().expect("somebody reads this");
    let service = Service::new(inputs.clone(), shelf.clone(), None);
    let reception = Reception::new(None, Progress::default());
    reception.open(service);
    tokio::spawn(serve(reception, listener, CancellationToken::new()));
    // Nobody is told, but the driver must not wait.
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    let greeting = WelcomeTemplate {
        term: 1,
        run: String::new(),
        job: serde_json::to_vec(&*job).expect("a job is plain data"),
        job_digest: job_digest.clone(),
        model_dir: folder.path().to_owned(),
        model_files: Vec::new(),
        total_steps: STEPS,
    };
    let store = Store {
        output_dir: folder.path().to_owned(),
        model: ModelFolder::open(folder.path(), InitWeights::Random).expect("it was just written"),
        job_digest,
        base_model_digest: String::new(),
        save_total_limit: None,
        write_trainer_state: Box::new(|_, _| Ok(())),
        template: None,
        eos_token: None,
        tokens: Vec::new(),
        renamed_tokens: Default::default(),
        end_tokens: Vec::new(),
        record_result: Box::new(|_, _| Ok(())),
        saved: Box::new(|_| ()),
    };
    let driver = Driver::new(
        cluster(job, slots),
        greeting,
        State::default(),
        Arc::new(store),
        shelf,
        observer,
        inputs,
    );
    let outcome = driver.drive(arrivals).await;
    println!("the run ended: {outcome:?}");
}

fn job(folder: &std::path::Path, min_workers: usize, slots: usize) -> JobSpec {
    let text = format!(
        "base_model: {0}\ndatasets: [{0}/data.jsonl]\noutput_dir: {0}/out\nadapter: none\nsequence_len: {SEQUENCE_LEN}\n\
         micro_batch_size: 1\nglobal_batch_size: {slots}\nmax_steps: {STEPS}\ncluster:\n  min_workers: {min_workers}\n",
        folder.display()
    );
    let file = folder.join("job.yaml");
    std::fs::write(&file, text).expect("the temporary folder has room");
    let sources = JobSources {
        file: Some(file),
        ..JobSources::default()
    };
    common::job::load(sources).expect("the job is right")
}

fn cluster(job: Arc<JobSpec>, slots: usize) -> Cluster {
    let settings = Settings {
        version: common::VERSION.to_owned(),
        job_digest: job.digest(),
        run: String::new(),
        earlier: PreviousTerms::default(),
        start_step: 0,
        start_weights_digest: None,
        start_numerics_class: None,
        last_evaluated: None,
        best: None,
        best_saved: None,
        min_workers: job.cluster.min_workers,
        max_workers: None,
        max_skipped_steps: 5,
        frozen_bytes: 0,
        flop_per_token: None,
    };
    let tokens = BlockTokens {
        used: SEQUENCE_LEN as u32,
        trained: SEQUENCE_LEN as u32 - 1,
    };
    Cluster::new(
        settings,
        RunSchedule::new(job, slots as u64, vec![tokens; slots]),
    )
}
