//! Where every call arrives, from the first second of the process to its last: as long as there is no run, callers are told
//! how far its preparation is and to come back; then the [`Service`] answers; and at the end everybody hears why there is
//! nobody to answer any more. It also answers gRPC's health check.
//!
//! It decides nothing about the run. A call that has to wait is held for a moment, so that nobody comes back all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::progress::Progress;
use common::text;
use common::wire::PREPARING_KEY;
use proto::health::health_check_response::ServingStatus;
use proto::health::health_server::Health;
use proto::health::{HealthCheckRequest, HealthCheckResponse};
use proto::v1;
use proto::v1::coordinator_server::{Coordinator, SERVICE_NAME};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::{Request, Response, Status, Streaming};

use crate::rpc::service::{Downstream, Service, admit};

/// How long a call waits for the run before it is told to come back.
const HOLD: Duration = Duration::from_millis(500);
/// How long a closing server waits for callers that were told to come back, so that they hear how it ended.
const COMING_BACK: Duration = Duration::from_millis(300);
/// Most calls that watch the health at a time. They show no token.
const MAX_WATCHES: usize = 64;

/// Answers every call from the start of the process: before, during and after the run. Shared by all connections.
#[derive(Clone)]
pub struct Reception(Arc<Shared>);

struct Shared {
    token: Option<String>,
    progress: Progress,
    stage: watch::Sender<Stage>,
    /// Whether some caller was told to come back.
    awaited: AtomicBool,
    watches: Arc<Semaphore>,
}

/// Who answers calls now.
#[derive(Clone)]
enum Stage {
    Preparing,
    Open(Service),
    /// Nobody: the run is over, or will not begin, for this reason.
    Over(String),
}

impl Stage {
    /// What gRPC's health check says of a service; None where there is none of that name. The process as a whole serves as
    /// soon as it answers, since whoever comes is told to wait; the service of the run does once there is one.
    fn health(&self, service: &str) -> Option<ServingStatus> {
        let serves = match (service, self) {
            ("", Self::Over(_)) => false,
            ("", _) => true,
            (SERVICE_NAME, stage) => matches!(stage, Self::Open(_)),
            _ => return None,
        };
        Some(match serves {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        })
    }
}

impl Reception {
    /// A reception for the time before there is a run; `progress` is that of its preparation.
    pub fn new(token: Option<String>, progress: Progress) -> Self {
        let (stage, _) = watch::channel(Stage::Preparing);
        Self(Arc::new(Shared {
            token,
            progress,
            stage,
            awaited: AtomicBool::new(false),
            watches: Arc::new(Semaphore::new(MAX_WATCHES)),
        }))
    }

    /// The token that callers must show, if any.
    pub fn token(&self) -> Option<&str> {
        self.0.token.as_deref()
    }

    /// Lets `service` answer from now on, also those who wait.
    pub fn open(&self, service: Service) {
        self.0.stage.send_replace(Stage::Open(service));
    }

    /// Refuses all calls from now on with `reason`.
    pub fn end(&self, reason: &str) {
        let reason = text::reason(reason);
        self.0.stage.send_replace(Stage::Over(reason));
    }

    /// Waits until those who were told to come back have been here again, should there be any.
    pub async fn await_callers(&self) {
        if self.0.awaited.load(Ordering::SeqCst) {
            tokio::time::sleep(COMING_BACK).await;
        }
    }

    /// The service of the run; an error says how far its preparation is, or why there is none.
    async fn answering(&self) -> Result<Service, Status> {
        let mut stage = self.0.stage.subscribe();
        let settled = stage.wait_for(|stage| !matches!(stage, Stage::Preparing));
        match tokio::time::timeout(HOLD, settled).await {
            Ok(Ok(stage)) => match &*stage {
                Stage::Open(service) => Ok(service.clone()),
                Stage::Over(reason) => Err(Status::unavailable(reason.clone())),
                Stage::Preparing => Err(self.preparing()),
            },
            Ok(Err(_)) => Err(Status::unavailable("the run is over")),
            Err(_) => Err(self.preparing()),
        }
    }

    fn preparing(&self) -> Status {
        self.0.awaited.store(true, Ordering::SeqCst);
        let moment = self.0.progress.now().to_string();
        let mut status = Status::unavailable(format!(
            "the coordinator is still preparing ({moment}): come back"
        ));
        if let Ok(moment) = moment.parse() {
            status.metadata_mut().insert(PREPARING_KEY, moment);
        }
        status
    }
}

#[tonic::async_trait]
impl Coordinator for Reception {
    type SessionStream = Downstream<v1::CoordinatorMessage>;
    type FetchBlocksStream = Downstream<v1::BlockChunk>;
    type FetchFileStream = Downstream<v1::FileChunk>;

    async fn session(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        admit(self.token(), &request)?;
        self.answering().await?.session(request).await
    }

    async fn fetch_blocks(
        &self,
        request: Request<v1::FetchBlocksRequest>,
    ) -> Result<Response<Self::FetchBlocksStream>, Status> {
        admit(self.token(), &request)?;
        self.answering().await?.fetch_blocks(request).await
    }

    async fn fetch_file(
        &self,
        request: Request<v1::FetchFileRequest>,
    ) -> Result<Response<Self::FetchFileStream>, Status> {
        admit(self.token(), &request)?;
        self.answering().await?.fetch_file(request).await
    }

    async fn upload_state(
        &self,
        request: Request<Streaming<v1::UploadChunk>>,
    ) -> Result<Response<v1::UploadReply>, Status> {
        admit(self.token(), &request)?;
        self.answering().await?.upload_state(request).await
    }
}

/// gRPC's health check. It asks for no token, which probes do not have: nothing is told that a connection would not tell.
#[tonic::async_trait]
impl Health for Reception {
    type WatchStream = Downstream<HealthCheckResponse>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let status = self.0.stage.borrow().health(&request.get_ref().service);
        let status = status.ok_or_else(|| Status::not_found("no such service"))?;
        Ok(Response::new(response(status)))
    }

    /// Streams the health as it is now, and then each change; ends with the run.
    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let place = self.0.watches.clone().try_acquire_owned();
        let full =
            |_| Status::resource_exhausted("too many calls watch the health: ask with Check");
        let watching = Watching {
            service: request.into_inner().service,
            stage: self.0.stage.subscribe(),
            told: None,
            _place: place.map_err(full)?,
        };
        let changes = futures::stream::unfold(watching, Watching::next);
        Ok(Response::new(Box::pin(changes)))
    }
}

/// One call that watches the health.
struct Watching {
    service: String,
    stage: watch::Receiver<Stage>,
    told: Option<ServingStatus>,
    _place: OwnedSemaphorePermit,
}

impl Watching {
    async fn next(mut self) -> Option<(Result<HealthCheckResponse, Status>, Self)> {
        loop {
            let (health, is_over) = {
                let stage = self.stage.borrow_and_update();
                (
                    stage.health(&self.service),
                    matches!(*stage, Stage::Over(_)),
                )
            };
            // A service that is not known now may be later, so the protocol has it.
            let health = health.unwrap_or(ServingStatus::ServiceUnknown);
            if self.told.replace(health) != Some(health) {
                return Some((Ok(response(health)), self));
            }
            if is_over {
                return None;
            }
            self.stage.changed().await.ok()?;
        }
    }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse {
        status: status.into(),
    }
}
