//! Whom a worker reaches, before an exchange depends on it.

use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;

use super::coordinator::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_says_whom_it_does_not_reach_and_why() {
    let mut stage = stage().await;
    let (worker, mut peer, member, _) = stage.ready_worker().await;
    let vacant = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = vacant.local_addr().unwrap().to_string();
    drop(vacant);
    let at = |worker, address: &str| v1::Member {
        worker,
        name: format!("w{worker}"),
        address: address.to_owned(),
    };
    let own = stage.welcome.worker;
    // It answers for itself and for nobody else.
    let members = vec![
        at(own, &member.address),
        at(own + 1, &member.address),
        at(own + 2, &address),
    ];
    peer.send(Down::Probe(v1::Probe { number: 7, members }))
        .await;
    let Some(Up::Probed(probed)) = peer.next().await else {
        panic!("a probe is answered")
    };
    assert_eq!(probed.number, 7);
    let mut unreached = probed.unreached.into_iter();
    let another = unreached.next().unwrap();
    assert_eq!(another.worker, own + 1);
    assert!(another.reason.contains("another worker"), "{another:?}");
    let nobody = unreached.next().unwrap();
    assert_eq!(nobody.worker, own + 2);
    assert_eq!(nobody.reason, "connection refused");
    assert_eq!(unreached.next(), None);
    finish(worker, peer).await;
}
