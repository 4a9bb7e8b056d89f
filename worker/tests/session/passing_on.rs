//! Workers that pass the model on to each other, and what becomes of one who does not.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::sync::atomic::Ordering;

use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;
use tokio_util::sync::CancellationToken;
use worker::collective::Collective;
use worker::collective::files::digest_of;
use worker::session::stream::exchange_id;
use worker::{JoinOptions, join};

use super::coordinator::*;

const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A stage whose model has a file so large that workers pass it on.
async fn stage_with_large_model() -> Stage {
    let mut stage = stage().await;
    stage.welcome.model_dir = "/nowhere".to_owned();
    let large: Vec<u8> = (0..17u32 << 20).map(|i| (i % 251) as u8).collect();
    let digest = blake3::hash(&large).to_hex().to_string();
    let entry = stage.welcome.model_files.last_mut().unwrap();
    let mut files = stage.fake.files.lock().unwrap();
    files.remove(&entry.digest);
    entry.size = large.len() as u64;
    entry.digest = digest.clone();
    files.insert(digest, large);
    drop(files);
    stage
}

impl Stage {
    /// A worker with a cache of its own, as on another machine, that was welcomed as `number`.
    async fn elsewhere(&mut self, number: u64) -> (Joined, Peer, v1::Join) {
        let options = JoinOptions {
            cache_dir: Some(self.folder.path().join(format!("cache-{number}"))),
            ..self.options()
        };
        let worker = tokio::spawn(join(options, CancellationToken::new()));
        let mut peer = self.session().await;
        let join = peer.joined().await;
        let welcome = v1::Welcome {
            worker: number,
            ..self.welcome.clone()
        };
        peer.send(Down::Welcome(welcome)).await;
        (worker, peer, join)
    }

    fn fetched(&self) -> usize {
        self.fake.fetched_bytes.load(Ordering::SeqCst)
    }
}

fn holder(worker: u64, port: u32) -> v1::Member {
    v1::Member {
        worker,
        name: format!("w{worker}"),
        address: format!("{HOST}:{port}"),
    }
}

/// Waits until the worker is ready; which digests it said to hold before that.
async fn held(peer: &mut Peer) -> Vec<String> {
    let mut held = Vec::new();
    loop {
        match peer.next().await.unwrap() {
            Up::Holds(v1::Holds { digests }) => held = digests,
            Up::Ready(_) => return held,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_gets_a_large_file_from_one_that_has_it() {
    let mut stage = stage_with_large_model().await;
    let (first, mut first_peer, first_join) = stage.elsewhere(1).await;
    let large = &stage.welcome.model_files[1];
    let (digest, size) = (large.digest.clone(), large.size as usize);
    assert_eq!(held(&mut first_peer).await, std::slice::from_ref(&digest));
    assert_eq!(stage.fetched(), CONFIG.len() + size);

    let port = first_join.exchange_port;
    *stage.fake.holder.lock().unwrap() = Some(holder(1, port));
    let (second, mut second_peer, _) = stage.elsewhere(2).await;
    assert_eq!(held(&mut second_peer).await, [digest]);
    assert_eq!(stage.fetched(), 2 * CONFIG.len() + size);
    finish(first, first_peer).await;
    finish(second, second_peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_sends_something_else_or_nothing_costs_time_only() {
    let mut stage = stage_with_large_model().await;
    let large = stage.welcome.model_files[1].clone();
    // One has a file of that size that is another.
    let path = stage.folder.path().join("other");
    std::fs::write(&path, vec![7; large.size as usize]).unwrap();
    let liar = Collective::bind(HOST).unwrap();
    let welcome = &stage.welcome;
    liar.identify(
        exchange_id(&welcome.job_digest, &welcome.run, welcome.term),
        5,
    );
    let digest = digest_of(&large.digest).unwrap();
    liar.shared_files().share(digest, path, large.size);
    // At another's address nobody is.
    let vacant = TcpListener::bind((HOST, 0)).unwrap();
    let port = vacant.local_addr().unwrap().port();
    drop(vacant);
    let holders = [holder(5, liar.port().into()), holder(6, port.into())];
    for (number, sender) in (1..).zip(holders) {
        let before = stage.fetched();
        *stage.fake.holder.lock().unwrap() = Some(sender);
        let (worker, mut peer, _) = stage.elsewhere(number).await;
        assert_eq!(held(&mut peer).await, std::slice::from_ref(&large.digest));
        let fetched = stage.fetched() - before;
        assert_eq!(fetched, CONFIG.len() + large.size as usize);
        finish(worker, peer).await;
    }
}
