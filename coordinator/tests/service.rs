//! The bulk calls, over a real connection, as a worker and as somebody who is up to no good.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use common::data::block::Block;
use common::data::blockfile;
use common::files::FileEntry;
use common::files::atomic::AtomicDir;
use coordinator::cluster::{Event, WorkerId};
use coordinator::driver::control_loop::Input;
use coordinator::driver::transfers::{Expected, Transfers};
use coordinator::rpc::connections;
use coordinator::rpc::service::Service;
use proto::v1::coordinator_client::CoordinatorClient;
use proto::v1::coordinator_server::CoordinatorServer;
use proto::v1::upload_chunk::Chunk;
use proto::v1::{self, UploadChunk};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tonic::transport::{Channel, Server};
use tonic::{Code, Status};

const WORKER: WorkerId = WorkerId(7);
const STEP: u64 = 3;

struct Site {
    folder: TempDir,
    shelf: Arc<Transfers>,
    client: CoordinatorClient<Channel>,
    inputs: mpsc::Receiver<Input>,
}

async fn site() -> Site {
    let folder = tempfile::tempdir().unwrap();
    let block = Block {
        tokens: vec![1, 2],
        segments: vec![1, 1],
        trained: vec![false, true],
    };
    let path = folder.path().join("blocks");
    let blocks = vec![block; 3].into_iter();
    let file = blockfile::write(&path, 2, (2, 1), [0; 32], b"", blocks).unwrap();
    let shelf = Arc::new(Transfers::new(file));
    let (sender, inputs) = mpsc::channel(16);
    let service = CoordinatorServer::new(Service::new(sender, shelf.clone(), None));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = connections::accept(listener, 4);
    let server = Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(incoming));
    let client = CoordinatorClient::connect(format!("http://{address}"))
        .await
        .unwrap();
    Site {
        folder,
        shelf,
        client,
        inputs,
    }
}

impl Site {
    fn expect_state(&self, max_bytes: u64) -> std::path::PathBuf {
        let target = self.folder.path().join("checkpoint-3");
        let folder = AtomicDir::create(&target).unwrap();
        let path = folder.path().to_owned();
        let expected = Expected { folder, max_bytes };
        self.shelf.expect(WORKER, STEP, expected);
        path
    }

    async fn upload(&mut self, chunks: Vec<Chunk>) -> Result<(), Status> {
        let header = Chunk::Header(v1::UploadHeader {
            worker: WORKER.0,
            step: STEP,
            weights_digest: "weights".into(),
        });
        let chunks = std::iter::once(header).chain(chunks);
        let chunks: Vec<UploadChunk> = chunks
            .map(|chunk| UploadChunk { chunk: Some(chunk) })
            .collect();
        let sent = self.client.upload_state(futures::stream::iter(chunks));
        sent.await.map(drop)
    }
}

fn file(path: &str, content: &[u8]) -> Chunk {
    Chunk::File(v1::FileEntry {
        path: path.into(),
        size: content.len() as u64,
        digest: blake3::hash(content).to_hex().to_string(),
    })
}

fn data(content: &[u8]) -> Chunk {
    Chunk::Data(content.to_vec().into())
}

#[tokio::test]
async fn only_this_runs_blocks_are_served() {
    let mut site = site().await;
    let digest = site.shelf.blocks.digest().to_owned();
    let fetch = |digest: &str, blocks: Vec<u64>| v1::FetchBlocksRequest {
        digest: digest.into(),
        blocks,
    };
    let served = site.client.fetch_blocks(fetch(&digest, vec![2, 0])).await;
    let mut chunks = served.unwrap().into_inner();
    for expected in [2, 0] {
        let chunk = chunks.message().await.unwrap().unwrap();
        assert_eq!(chunk.block, expected);
        assert_eq!(
            &chunk.data[..],
            site.shelf.blocks.block_bytes(expected).unwrap()
        );
    }
    assert!(chunks.message().await.unwrap().is_none());

    let other = site.client.fetch_blocks(fetch("other", vec![0])).await;
    assert_eq!(other.unwrap_err().code(), Code::FailedPrecondition);
    let beyond = site.client.fetch_blocks(fetch(&digest, vec![3])).await;
    let mut chunks = beyond.unwrap().into_inner();
    assert_eq!(chunks.message().await.unwrap_err().code(), Code::OutOfRange);
    let many = site
        .client
        .fetch_blocks(fetch(&digest, vec![0; 5000]))
        .await;
    assert_eq!(many.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_file_is_named_by_digest_and_resumes_where_the_fetch_broke() {
    let mut site = site().await;
    let content: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let model = site.folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    std::fs::write(model.join("weights"), &content).unwrap();
    let entry = FileEntry::of(&model, "weights").unwrap();
    site.shelf.offer(&model, std::slice::from_ref(&entry));

    let of = |digest: &str, offset| v1::FetchFileRequest {
        digest: digest.to_owned(),
        offset,
        ..v1::FetchFileRequest::default()
    };
    let digest = entry.digest;
    let offset = 1_234_567;
    let served = site.client.fetch_file(of(&digest, offset));
    let mut chunks = served.await.unwrap().into_inner();
    let mut rest = Vec::new();
    while let Some(chunk) = chunks.message().await.unwrap() {
        assert!(chunk.data.len() <= 1 << 20);
        rest.extend_from_slice(&chunk.data);
    }
    assert!(rest == content[offset as usize..]);

    let digest = "../../etc/passwd".to_owned();
    let unknown = site.client.fetch_file(of(&digest, 0));
    assert_eq!(unknown.await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn of_many_callers_some_get_a_large_file_from_a_worker_that_has_it() {
    let mut site = site().await;
    let model = site.folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    std::fs::write(model.join("weights"), vec![1; 20 << 20]).unwrap();
    let entry = FileEntry::of(&model, "weights").unwrap();
    site.shelf.offer(&model, std::slice::from_ref(&entry));
    let mut call = async |worker, unusable: &[u64]| {
        let request = v1::FetchFileRequest {
            digest: entry.digest.clone(),
            offset: 0,
            worker,
            unusable: unusable.to_vec(),
        };
        site.client.fetch_file(request).await.unwrap().into_inner()
    };
    let next = async |chunks: &mut tonic::Streaming<v1::FileChunk>| {
        chunks.message().await.unwrap().unwrap()
    };
    // Two are served, and take their time.
    let mut served = [call(1, &[]).await, call(2, &[]).await];
    for chunks in &mut served {
        assert_eq!(next(chunks).await.data.len(), 1 << 20);
    }
    let mut third = call(3, &[]).await;
    assert_eq!(next(&mut third).await, v1::FileChunk::default());
    let holder = v1::Member {
        worker: 1,
        name: "one".to_owned(),
        address: "127.0.0.1:9".to_owned(),
    };
    let digests = ["f".repeat(64), entry.digest.clone()];
    site.shelf.hold(&holder, &digests);
    let chunk = next(&mut third).await;
    assert_eq!((chunk.data.len(), chunk.from), (0, Some(holder)));
    // Whoever did not get it there waits until one of the two is done.
    drop(third);
    let mut again = call(3, &[1]).await;
    assert_eq!(next(&mut again).await, v1::FileChunk::default());
    drop(served);
    assert_eq!(next(&mut again).await.data.len(), 1 << 20);
    // Whoever names no number of its own, as where the file that came was another, is served at once.
    let mut nobody = call(0, &[]).await;
    assert_eq!(next(&mut nobody).await.data.len(), 1 << 20);
}

#[tokio::test]
async fn a_state_that_was_asked_for_arrives_whole() {
    let mut site = site().await;
    let folder = site.expect_state(100);
    let parts = vec![
        file("a.safetensors", b"weights"),
        data(b"weig"),
        data(b"hts"),
    ];
    site.upload(parts.clone()).await.unwrap();
    let Some(Input::Uploaded(received)) = site.inputs.recv().await else {
        panic!("nothing arrived");
    };
    assert_eq!((received.worker, received.step), (WORKER, STEP));
    assert_eq!(
        std::fs::read(folder.join("a.safetensors")).unwrap(),
        b"weights"
    );
    // Once is enough.
    let again = site.upload(parts).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn a_state_that_is_not_what_it_says_leaves_nothing() {
    let mut site = site().await;
    let hostile: [(&str, Vec<Chunk>); 7] = [
        ("changed", vec![file("a", b"weights"), data(b"Weights")]),
        ("cut short", vec![file("a", b"weights"), data(b"weig")]),
        (
            "too long",
            vec![file("a", b"weights"), data(b"weights and more")],
        ),
        (
            "over the budget",
            vec![file("a", &[0; 101]), data(&[0; 101])],
        ),
        ("outside", vec![file("../a", b"x"), data(b"x")]),
        ("twice", vec![file("a", b""), file("a", b"")]),
        ("nothing", vec![]),
    ];
    for (name, chunks) in hostile {
        let folder = site.expect_state(100);
        assert!(site.upload(chunks).await.is_err(), "{name}");
        let told = site.inputs.recv().await;
        let failed = matches!(
            told,
            Some(Input::Happened(Event::StateFailed {
                worker: WORKER,
                step: STEP,
                ..
            }))
        );
        assert!(failed, "{name}");
        assert!(!folder.exists(), "{name}");
    }
    assert!(!Path::new("../a").exists());
}
