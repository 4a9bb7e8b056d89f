//! Model files and checkpoints on their way to the worker, and its state on its way to the coordinator.

use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use worker::join;

use super::coordinator::*;

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
        ["model.safetensors", "config.json", "optimizer.safetensors"]
    );
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

/// A stage whose coordinator has the model where this machine has not, and a snapshot in the hub's cache with the model's files.
async fn stage_with_snapshot() -> (Stage, PathBuf) {
    let mut stage = stage().await;
    stage.welcome.model_dir = "/nowhere".to_owned();
    let commit = "0".repeat(40);
    let snapshot = format!("hub/models--org--tiny/snapshots/{commit}");
    let snapshot = stage.folder.path().join(snapshot);
    std::fs::create_dir_all(&snapshot).unwrap();
    for entry in &stage.welcome.model_files {
        let from = stage.folder.path().join("model").join(&entry.path);
        std::fs::copy(from, snapshot.join(&entry.path)).unwrap();
    }
    (stage, snapshot)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_in_the_hubs_cache_does_not_travel() {
    let (mut stage, _) = stage_with_snapshot().await;
    let (worker, peer, ..) = stage.ready_worker().await;
    finish(worker, peer).await;
    assert_eq!(stage.fake.fetched_bytes.load(Ordering::SeqCst), 0);
    assert!(!stage.folder.path().join("cache/models").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_model_in_the_hubs_cache_only_what_differs_travels() {
    let (mut stage, snapshot) = stage_with_snapshot().await;
    // Of the right size, with one other byte.
    let config = CONFIG.replace("0.02", "0.03");
    std::fs::write(snapshot.join("config.json"), &config).unwrap();
    let (worker, peer, ..) = stage.ready_worker().await;
    finish(worker, peer).await;
    let fetched = stage.fake.fetched_bytes.load(Ordering::SeqCst);
    assert_eq!(fetched, CONFIG.len());
    // What is in the hub's cache is nobody's to mend.
    let left = std::fs::read_to_string(snapshot.join("config.json")).unwrap();
    assert_eq!(left, config);
    let models = stage.folder.path().join("cache/models");
    let copies = std::fs::read_dir(models)
        .unwrap()
        .flat_map(|entry| std::fs::read_dir(entry.unwrap().path()))
        .flatten();
    let mut names: Vec<_> = copies.map(|file| file.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "notes.txt"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_of_one_machine_fetch_a_model_once() {
    let mut stage = stage().await;
    stage.welcome.model_dir = "/nowhere".to_owned();
    let mut workers = Vec::new();
    for _ in 0..2 {
        let worker = tokio::spawn(join(stage.options(), CancellationToken::new()));
        let mut peer = stage.session().await;
        peer.joined().await;
        workers.push((worker, peer));
    }
    for (_, peer) in &workers {
        peer.send(Down::Welcome(stage.welcome.clone())).await;
    }
    for (worker, mut peer) in workers {
        peer.ready().await;
        finish(worker, peer).await;
    }
    let files = stage.fake.files.lock().unwrap();
    let size: usize = files.values().map(Vec::len).sum();
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
