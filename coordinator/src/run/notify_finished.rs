//! The end of a run whose coordinator died just after it had recorded the result: its workers still wait for a next one,
//! and are told that the job is done. In: the journal of the run, and the server. Out: a word to each worker that comes
//! within a moment. It computes and stores nothing.

use std::sync::Arc;
use std::time::Duration;

use common::files::FileError;
use common::job::Resume;
use common::wire::down;
use proto::v1::{self, coordinator_message::Message as Down};
use thiserror::Error;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tonic::Status;

use crate::cluster::{Outcome, WorkerId};
use crate::driver::control_loop::{Input, Outgoing};
use crate::driver::transfers::Transfers;
use crate::prepare::Prepared;
use crate::rpc::server::Server;
use crate::rpc::service::Service;
use crate::store::journal;
use crate::store::journal::{History, Journal};
use crate::store::lock::{LockError, OUTPUT_LOCK_TIMEOUT, lock};

/// How long the workers may take to come: several of their attempts.
const WORKERS_RETURN_TIMEOUT: Duration = Duration::from_secs(15);
/// Most inputs that may wait.
const INPUTS: usize = 1024;

/// Why workers cannot be told that the run is done.
#[derive(Debug, Error)]
pub enum NotifyError {
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("the journal cannot be used: {0}")]
    Journal(FileError),
}

/// Tells the workers that the journal knows of, if it does not say that they were told.
pub fn let_workers_go(
    prepared: Prepared,
    server: Server,
    runtime: &Runtime,
    say: &mut dyn FnMut(&str),
) -> Result<(), NotifyError> {
    if prepared.job.resume != Resume::Auto || waiting(&prepared).is_none() {
        return Ok(());
    }
    let output_dir = prepared.job.output_dir.clone();
    // Whoever holds it may be telling them at this moment.
    let _lock = lock(&output_dir, OUTPUT_LOCK_TIMEOUT, say)?;
    let Some((history, workers)) = waiting(&prepared) else {
        return Ok(());
    };
    say(&format!(
        "the coordinator before this one could not tell its workers ({workers}): waiting up to {} s for them",
        WORKERS_RETURN_TIMEOUT.as_secs()
    ));
    let term = history.term().cloned();
    let job_digest = prepared.job_digest.clone();
    let shelf = Arc::new(Transfers::new(prepared.data.file));
    runtime.block_on(tell(server, shelf, &job_digest, workers));
    if let Some(mut term) = term {
        term.term += 1;
        let (observer, _) = mpsc::channel(1);
        let journal = Journal::begin(&output_dir, history, term, 0, observer);
        let outcome = Outcome::Finished {
            step: prepared.schedule.total_steps(),
            weights_digest: String::new(),
        };
        journal.map_err(NotifyError::Journal)?.end(&outcome);
    }
    Ok(())
}

/// The history of this job, where some of its workers wait. A journal that cannot be read keeps no result back.
fn waiting(prepared: &Prepared) -> Option<(History, usize)> {
    let history = journal::read(&prepared.job.output_dir).ok()?.history;
    let is_ours = history.term()?.identity.job_digest == prepared.job_digest;
    let workers = history.earlier().workers;
    (is_ours && workers > 0).then_some((history, workers))
}

/// Tells workers that come that the run is done, until all have been told or time is up.
async fn tell(server: Server, shelf: Arc<Transfers>, job_digest: &str, workers: usize) {
    let (inputs, mut arrivals) = mpsc::channel(INPUTS);
    let token = server.token().map(str::to_owned);
    server.open(Service::new(inputs, shelf, token));
    let all = async {
        let mut told = 0;
        while told < workers {
            match arrivals.recv().await {
                Some(input) => told += usize::from(release(input, job_digest, told)),
                None => return,
            }
        }
    };
    let _ = tokio::time::timeout(WORKERS_RETURN_TIMEOUT, all).await;
    server.close("the run is over").await;
}

/// Lets a worker go. True where it was one of the job, and it is told.
fn release(input: Input, job_digest: &str, told: usize) -> bool {
    let Input::Opened {
        join,
        outbox,
        answer,
        ..
    } = input
    else {
        return false;
    };
    if join.job_digest != job_digest {
        let _ = answer.send(Err(Status::unavailable("the run is over")));
        return false;
    }
    let finish = down(Down::Finish(v1::Finish::default()));
    let is_told = outbox.try_send(Outgoing::Message(Box::new(finish))).is_ok();
    answer.send(Ok(WorkerId(told as u64 + 1))).is_ok() && is_told
}
