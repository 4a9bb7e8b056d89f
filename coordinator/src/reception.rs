//! Where every call arrives, from the first second of the process: as long as there is no run, callers are told how far
//! its preparation is and to come back; then the [`Service`] answers. It also answers gRPC's health check.
//!
//! It decides nothing about the run. A call that has to wait is held for a moment, so that nobody comes back all the time.

use std::sync::Arc;
use std::time::Duration;

use common::progress::Progress;
use common::wire::PREPARING_KEY;
use proto::health::health_check_response::ServingStatus;
use proto::health::health_server::Health;
use proto::health::{HealthCheckRequest, HealthCheckResponse};
use proto::v1;
use proto::v1::coordinator_server::{Coordinator, SERVICE_NAME};
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};

use crate::service::{Downstream, Service, admit};

/// How long a call waits for the run before it is told to come back.
const HOLD: Duration = Duration::from_millis(500);

/// Shared by all connections.
#[derive(Clone)]
pub struct Reception(Arc<Shared>);

struct Shared {
    token: Option<String>,
    progress: Progress,
    service: watch::Sender<Option<Service>>,
}

impl Reception {
    /// Before there is a run; `progress` is that of its preparation.
    pub fn new(token: Option<String>, progress: Progress) -> Self {
        let (service, _) = watch::channel(None);
        Self(Arc::new(Shared {
            token,
            progress,
            service,
        }))
    }

    /// What callers must show.
    pub fn token(&self) -> Option<&str> {
        self.0.token.as_deref()
    }

    /// From now on this answers, also to those who wait.
    pub fn open(&self, service: Service) {
        self.0.service.send_replace(Some(service));
    }

    /// Who answers calls.
    async fn answering(&self) -> Result<Service, Status> {
        let mut service = self.0.service.subscribe();
        let opened = service.wait_for(Option::is_some);
        match tokio::time::timeout(HOLD, opened).await {
            Ok(Ok(service)) => service.clone().ok_or_else(|| self.preparing()),
            Ok(Err(_)) => Err(Status::unavailable("the run is over")),
            Err(_) => Err(self.preparing()),
        }
    }

    fn preparing(&self) -> Status {
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

/// The process as a whole serves as soon as it answers, since whoever comes is told to wait; the service of the run does
/// once there is one. Without the token, which probes do not have: nothing is told that a connection would not tell.
#[tonic::async_trait]
impl Health for Reception {
    type WatchStream = Downstream<HealthCheckResponse>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let is_open = self.0.service.borrow().is_some();
        let status = match (request.into_inner().service.as_str(), is_open) {
            ("", _) | (SERVICE_NAME, true) => ServingStatus::Serving,
            (SERVICE_NAME, false) => ServingStatus::NotServing,
            _ => return Err(Status::not_found("no such service")),
        };
        Ok(Response::new(HealthCheckResponse {
            status: status.into(),
        }))
    }

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("ask again with Check"))
    }
}
