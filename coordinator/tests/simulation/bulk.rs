//! What a toy worker gets and hands over beside its session: blocks, the state it starts from, states that were asked for.

use common::data::block::Block;
use common::files::snapshot::OPTIMIZER;
use proto::v1;
use proto::v1::upload_chunk::Chunk;
use tokio::sync::mpsc;
use tonic::Status;
use worker::rpc::upload::State;

use crate::mesh::SCALARS;
use crate::net::Node;
use crate::rpc::Client;
use crate::truth::{SEQUENCE_LEN, Weights, digest, weights};
use crate::world::World;

pub const WEIGHTS: &str = "model.safetensors";

pub async fn fetch_blocks(
    mut client: Client,
    request: v1::FetchBlocksRequest,
) -> Result<Vec<Block>, Status> {
    let expected = request.blocks.clone();
    let mut chunks = client.fetch_blocks(request).await?.into_inner();
    let mut blocks = Vec::new();
    let mut received = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        received.push(chunk.block);
        let block = Block::decode(&chunk.data, SEQUENCE_LEN);
        blocks.push(block.map_err(|error| Status::data_loss(error.to_string()))?);
    }
    match received == expected {
        true => Ok(blocks),
        false => Err(Status::data_loss("other blocks than those asked for")),
    }
}

/// The checkpoint that Welcome names.
pub async fn fetch_state(
    world: &World,
    mut client: Client,
    welcome: &v1::Welcome,
) -> Result<(u64, Weights), Status> {
    let (mut step, mut weights) = (welcome.start_step, world.model.initial());
    if step > 0 {
        let file = welcome.state_files.iter().find(|file| file.path == WEIGHTS);
        let digest = file.map(|file| file.digest.clone()).unwrap_or_default();
        let request = v1::FetchFileRequest {
            digest,
            ..v1::FetchFileRequest::default()
        };
        let mut chunks = client.fetch_file(request).await?.into_inner();
        let mut data = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            data.extend_from_slice(&chunk.data);
        }
        (step, weights) = decode(&data).ok_or_else(|| Status::data_loss("no checkpoint"))?;
    }
    Ok((step, weights))
}

fn encode(step: u64, weights: &Weights) -> Vec<u8> {
    [&step.to_le_bytes()[..], weights].concat()
}

fn decode(bytes: &[u8]) -> Option<(u64, Weights)> {
    let (step, weights) = bytes.split_first_chunk()?;
    Some((u64::from_le_bytes(*step), weights.try_into().ok()?))
}

/// Hands states over, one after the other, until no more can come.
pub async fn upload_all(
    world: &World,
    node: Node,
    mut client: Client,
    worker: u64,
    mut waiting: mpsc::UnboundedReceiver<State>,
) {
    while let Some(state) = waiting.recv().await {
        let step = state.snapshot.step;
        let mut weights = weights(&state.snapshot.weights.widened(0..SCALARS));
        if world.spoils(step) {
            weights[0] ^= 1;
        }
        let file = |path: &str, size: usize, digest: blake3::Hash| {
            Chunk::File(v1::FileEntry {
                path: path.into(),
                size: size as u64,
                digest: digest.to_hex().to_string(),
            })
        };
        let weights_digest = digest(&weights);
        let weights = encode(step, &weights);
        let chunks = [
            Chunk::Header(v1::UploadHeader {
                worker,
                step,
                weights_digest,
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
            format!("w{node} uploaded {step}: {result:?}")
        });
    }
}
