//! What a toy worker gets and hands over beside its session: blocks, the state it starts from, states that were asked for.

use common::files::snapshot::OPTIMIZER;
use proto::v1;
use proto::v1::upload_chunk::Chunk;
use tokio::sync::mpsc;
use tonic::Status;

use crate::engine::Snapshot;
use crate::net::Node;
use crate::rpc::Client;
use crate::truth::hex;
use crate::world::World;

pub const WEIGHTS: &str = "model.safetensors";

pub async fn fetch_blocks(
    mut client: Client,
    request: v1::FetchBlocksRequest,
) -> Result<Vec<u8>, Status> {
    let expected = request.blocks.clone();
    let mut chunks = client.fetch_blocks(request).await?.into_inner();
    let mut data = Vec::new();
    let mut received = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        received.push(chunk.block);
        data.extend_from_slice(&chunk.data);
    }
    match received == expected {
        true => Ok(data),
        false => Err(Status::data_loss("other blocks than those asked for")),
    }
}

/// The checkpoint that Welcome names.
pub async fn fetch_state(
    world: &World,
    mut client: Client,
    welcome: &v1::Welcome,
) -> Result<Snapshot, Status> {
    let (mut step, mut weights) = (welcome.start_step, world.model.initial());
    if step > 0 {
        let file = welcome.state_files.iter().find(|file| file.path == WEIGHTS);
        let digest = file.map(|file| file.digest.clone()).unwrap_or_default();
        let request = v1::FetchFileRequest { digest, offset: 0 };
        let mut chunks = client.fetch_file(request).await?.into_inner();
        let mut data = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            data.extend_from_slice(&chunk.data);
        }
        (step, weights) = decode(&data).ok_or_else(|| Status::data_loss("no checkpoint"))?;
    }
    Ok(Snapshot { step, weights })
}

pub fn encode(state: &Snapshot) -> Vec<u8> {
    [&state.step.to_le_bytes()[..], &state.weights].concat()
}

pub fn decode(bytes: &[u8]) -> Option<(u64, [u8; 32])> {
    let (step, weights) = bytes.split_first_chunk()?;
    Some((u64::from_le_bytes(*step), weights.try_into().ok()?))
}

/// Hands states over, one after the other, until no more can come.
pub async fn upload_all(
    world: &World,
    node: Node,
    mut client: Client,
    worker: u64,
    mut waiting: mpsc::UnboundedReceiver<Snapshot>,
) {
    while let Some(mut state) = waiting.recv().await {
        if world.spoils(state.step) {
            state.weights[0] ^= 1;
        }
        let file = |path: &str, size: usize, digest: blake3::Hash| {
            Chunk::File(v1::FileEntry {
                path: path.into(),
                size: size as u64,
                digest: digest.to_hex().to_string(),
            })
        };
        let weights = encode(&state);
        let chunks = [
            Chunk::Header(v1::UploadHeader {
                worker,
                step: state.step,
                weights_digest: hex(&state.weights),
            }),
            file(WEIGHTS, weights.len(), blake3::hash(&weights)),
            Chunk::Data(weights[..9].to_vec().into()),
            Chunk::Data(weights[9..].to_vec().into()),
            file(OPTIMIZER, 1, blake3::hash(b"o")),
            Chunk::Data(b"o"[..].into()),
        ];
        let chunks = chunks.map(|chunk| v1::UploadChunk { chunk: Some(chunk) });
        let sent = client.upload_state(futures::stream::iter(chunks)).await;
        world.net.note(|| {
            let result = sent.map(drop).map_err(|status| status.message().to_owned());
            format!("w{node} uploaded {}: {result:?}", state.step)
        });
    }
}
