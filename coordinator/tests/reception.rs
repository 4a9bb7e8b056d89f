//! What callers hear of a coordinator from its first second to its last, over a real connection.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use common::data::block::Block;
use common::data::blockfile;
use common::progress::Progress;
use coordinator::driver::transfers::Transfers;
use coordinator::rpc::server::Server;
use coordinator::rpc::service::Service;
use proto::health::health_check_response::ServingStatus::{self, *};
use proto::health::health_client::HealthClient;
use proto::health::{HealthCheckRequest, HealthCheckResponse};
use proto::v1::coordinator_client::CoordinatorClient;
use proto::v1::coordinator_server::SERVICE_NAME;
use proto::v1::{self, worker_message::Message as Up};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

/// Longer than anything here takes on the busiest machine.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);

fn server() -> Server {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    Server::begin(listener, None, Progress::default()).unwrap()
}

async fn connect(server: &Server) -> Channel {
    let address = format!("http://{}", server.address());
    let endpoint = tonic::transport::Endpoint::from_shared(address).unwrap();
    endpoint.connect().await.unwrap()
}

fn shelf(folder: &TempDir) -> Arc<Transfers> {
    let block = Block {
        tokens: vec![1, 2],
        segments: vec![1, 1],
        trained: vec![false, true],
    };
    let path = folder.path().join("blocks");
    let blocks = std::iter::once(block);
    Arc::new(Transfers::new(
        blockfile::write(&path, 2, (1, 0), [0; 32], b"", blocks).unwrap(),
    ))
}

/// What is said next; None at the end.
async fn next(watch: &mut Streaming<HealthCheckResponse>) -> Option<ServingStatus> {
    let next = tokio::time::timeout(MESSAGE_TIMEOUT, watch.message())
        .await
        .unwrap();
    Some(next.unwrap()?.status())
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_watches_the_health_hears_it_at_once_and_then_each_change() {
    let folder = tempfile::tempdir().unwrap();
    let server = server();
    let mut client = HealthClient::new(connect(&server).await);
    let mut watch = async |service: &str| {
        let service = service.to_owned();
        let watch = client.watch(HealthCheckRequest { service }).await;
        watch.unwrap().into_inner()
    };
    let mut process = watch("").await;
    let mut run = watch(SERVICE_NAME).await;
    let mut other = watch("other").await;
    assert_eq!(next(&mut process).await, Some(Serving));
    assert_eq!(next(&mut run).await, Some(NotServing));
    assert_eq!(next(&mut other).await, Some(ServiceUnknown));

    let (inputs, _arrivals) = mpsc::channel(1);
    server.open(Service::new(inputs, shelf(&folder), None));
    assert_eq!(next(&mut run).await, Some(Serving));

    assert!(server.close("the run is over").await, "they keep it open");
    assert_eq!(next(&mut run).await, Some(NotServing));
    assert_eq!(next(&mut run).await, None);
    // What did not change was not said again.
    assert_eq!(next(&mut process).await, Some(NotServing));
    assert_eq!(next(&mut process).await, None);
    assert_eq!(next(&mut other).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_so_many_watch_the_health_at_a_time() {
    let server = server();
    let mut client = HealthClient::new(connect(&server).await);
    let mut watches = Vec::new();
    let refused = loop {
        match client.watch(HealthCheckRequest::default()).await {
            Ok(watch) => watches.push(watch.into_inner()),
            Err(status) => break status,
        }
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(watches.len(), 64);
    let check = client.check(HealthCheckRequest::default()).await;
    assert_eq!(check.unwrap().into_inner().status(), Serving);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_is_told_why_there_will_be_no_run() {
    let server = server();
    let mut client = CoordinatorClient::new(connect(&server).await);
    let mut join = async || {
        let (_up, messages) = mpsc::channel(1);
        client
            .session(ReceiverStream::new(messages))
            .await
            .unwrap_err()
    };
    let told = join().await;
    assert_eq!(told.code(), Code::Unavailable);
    assert!(told.metadata().contains_key(common::wire::PREPARING_KEY));
    let turning = server.clone();
    let turned = tokio::spawn(async move { turning.turn_away("no such data").await });
    let told = join().await;
    assert_eq!(
        (told.code(), told.message()),
        (Code::Unavailable, "no such data")
    );
    assert!(!told.metadata().contains_key(common::wire::PREPARING_KEY));
    turned.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_keeps_its_side_of_the_session_open_delays_no_end() {
    let folder = tempfile::tempdir().unwrap();
    let server = server();
    let (inputs, mut arrivals) = mpsc::channel(8);
    server.open(Service::new(inputs, shelf(&folder), None));
    let mut client = CoordinatorClient::new(connect(&server).await);
    let (up, messages) = mpsc::channel(1);
    let join = v1::Join {
        exchange_port: 1,
        ..v1::Join::default()
    };
    up.send(common::wire::up(Up::Join(join))).await.unwrap();
    let driver = tokio::spawn(async move {
        let Some(coordinator::driver::control_loop::Input::Opened { answer, outbox, .. }) =
            arrivals.recv().await
        else {
            panic!("no session");
        };
        answer.send(Ok(coordinator::cluster::WorkerId(1))).unwrap();
        // Both end here, as the driver's do.
        (outbox, arrivals)
    });
    let session = client.session(ReceiverStream::new(messages)).await;
    let mut down = session.unwrap().into_inner();
    drop(driver.await.unwrap());
    assert!(server.close("the run is over").await, "it is waited for");
    assert!(down.message().await.is_ok_and(|last| last.is_none()));
    drop((up, client));
}
