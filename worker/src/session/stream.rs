//! The session with the coordinator: everything that decides what is computed comes in here, in order, and everything
//! that was computed goes out.
//!
//! [`open`] gets as far as Welcome, [`Admission`] is Welcome checked, and a [`Forwarder`] passes on what the engine must
//! do until the session ends. Nothing here blocks a thread.

mod grouping;
mod probing;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::files::FileEntry;
use common::job::JobSpec;
use common::text;
use common::wire::{
    HEARTBEAT_INTERVAL, JOB_KEY, MAX_FILES, PREPARING_KEY, PlanKind, WireError, check_digest, up,
};
use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::collective::feed::Source;
use crate::collective::{Collective, Membership, PeerAddress};
use crate::rpc::blocks::Blocks;
use crate::rpc::connect::{Client, root_cause};
use crate::run::leases::{Leases, SlotKey};
use crate::run::orders::{Lease, Order};
use crate::{ComputeDevice, status};

/// How long the coordinator may take to answer Join.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the last message of a session may take to reach the coordinator.
pub const LAST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(3);
/// Messages to the coordinator that may wait for the network.
const OUTGOING: usize = 64;
/// Longest sequence that a worker accepts, in tokens: far beyond any real one, and safe to multiply.
const MAX_SEQUENCE_LEN: u32 = 1 << 24;
const MAX_MEMBERS: usize = 1024;
/// Most characters shown of what a coordinator that prepares says of itself.
const MAX_MOMENT_CHARACTERS: usize = 80;
/// Longest time that a peer may be silent, taken where the coordinator names none or a longer one; in milliseconds.
const MAX_SILENCE_MS: u64 = 60_000;

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEnd {
    /// The coordinator said Finish.
    Finished { failed: bool, reason: String },
    /// The coordinator said Finish, and is to be started again.
    Interrupted(String),
    /// The coordinator has no run yet, and says what it is at: it is asked again.
    Preparing(String),
    /// The coordinator will not have this worker.
    Refused {
        reason: String,
        /// The digest of the coordinator's job, if it said that.
        job: Option<String>,
    },
    /// This worker cannot work for that coordinator.
    Unusable(String),
    /// What the other side said is not the protocol: it is no coordinator, unless it has been one before.
    Foreign(String),
    /// The coordinator sent the worker away; it may come back as a newcomer, without the state it holds.
    Expelled(String),
    /// The connection broke.
    Lost(String),
}

impl SessionEnd {
    fn of(status: &Status) -> Self {
        use tonic::Code;
        // A status of our own making names the layer that failed; what happened is at the bottom.
        let source = std::error::Error::source(status);
        let reason = match source {
            Some(source) => format!("the connection broke: {}", root_cause(source)),
            None => text::reason(status.message()),
        };
        if let Some(moment) = preparing(status) {
            return Self::Preparing(moment);
        }
        match status.code() {
            Code::Aborted if source.is_none() => Self::Expelled(reason),
            Code::FailedPrecondition
            | Code::InvalidArgument
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::Unauthenticated => Self::Refused {
                reason,
                job: job_of(status),
            },
            Code::Unimplemented => Self::Foreign(reason),
            _ if breaks_the_protocol(status) => Self::Foreign(reason),
            _ => Self::Lost(reason),
        }
    }
}

impl SessionEnd {
    fn finished(finish: v1::Finish) -> Self {
        let reason = text::reason(&finish.reason);
        match finish.resumable {
            true => Self::Interrupted(reason),
            false => Self::Finished {
                failed: finish.failed,
                reason,
            },
        }
    }
}

fn preparing(status: &Status) -> Option<String> {
    let moment = status.metadata().get(PREPARING_KEY)?.to_str().ok()?;
    Some(moment.chars().take(MAX_MOMENT_CHARACTERS).collect())
}

fn job_of(status: &Status) -> Option<String> {
    let digest = status.metadata().get(JOB_KEY)?.to_str().ok()?;
    check_digest(JOB_KEY, digest).ok()?;
    Some(digest.to_owned())
}

/// Whether the bytes that came were no HTTP/2, such as those of a web or mail server.
fn breaks_the_protocol(status: &Status) -> bool {
    let first: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(status);
    std::iter::successors(first, |error| error.source())
        .filter_map(|error| error.downcast_ref::<h2::Error>()?.reason())
        .any(|reason| {
            [
                h2::Reason::FRAME_SIZE_ERROR,
                h2::Reason::HTTP_1_1_REQUIRED,
                h2::Reason::PROTOCOL_ERROR,
            ]
            .contains(&reason)
        })
}

/// A session that has been welcomed.
pub struct Session {
    pub admission: Admission,
    pub up: mpsc::Sender<v1::WorkerMessage>,
    pub down: Streaming<v1::CoordinatorMessage>,
}

/// Joins, within `limit` at most. An error is the coordinator's answer or the network's.
pub async fn open(client: &Client, join: v1::Join, limit: Duration) -> Result<Session, SessionEnd> {
    let (sender, receiver) = mpsc::channel(OUTGOING);
    // Never full: it is the first message.
    let _ = sender.try_send(up(Up::Join(join)));
    let mut client = client.clone();
    let welcome = async {
        let response = client.session(ReceiverStream::new(receiver)).await?;
        let mut down = response.into_inner();
        let first = down.message().await?;
        Ok::<_, Status>((first, down))
    };
    let (first, down) = match tokio::time::timeout(WELCOME_TIMEOUT.min(limit), welcome).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(status)) => return Err(SessionEnd::of(&status)),
        Err(_) => return Err(SessionEnd::Lost("no answer to Join".to_owned())),
    };
    match first.and_then(|first| first.message) {
        Some(Down::Welcome(welcome)) => match Admission::check(welcome) {
            Ok(admission) => Ok(Session {
                admission,
                up: sender,
                down,
            }),
            Err(reason) => {
                decline(sender, down, &reason).await;
                Err(SessionEnd::Unusable(reason))
            }
        },
        Some(Down::Finish(finish)) => Err(SessionEnd::finished(finish)),
        Some(_) => Err(SessionEnd::Unusable("it did not begin with Welcome".into())),
        None => Err(SessionEnd::Lost("it closed the session".to_owned())),
    }
}

/// Says why this worker goes, and waits a moment for it to be heard.
pub async fn decline(
    up: mpsc::Sender<v1::WorkerMessage>,
    mut down: Streaming<v1::CoordinatorMessage>,
    reason: &str,
) {
    let reason = reason.to_owned();
    let failed = true;
    let leaving = Up::Leaving(v1::Leaving { reason, failed });
    let _ = up.try_send(common::wire::up(leaving));
    drop(up);
    let heard = async { while let Ok(Some(_)) = down.message().await {} };
    let _ = tokio::time::timeout(LAST_MESSAGE_TIMEOUT, heard).await;
}

/// A Welcome whose content was checked.
#[derive(Clone, Debug)]
pub struct Admission {
    pub worker: u64,
    pub term: u64,
    /// Identifier of the run, drawn when it began; the same in every term of it.
    pub run: String,
    pub job: Arc<JobSpec>,
    /// Digest of the job as computed here; the coordinator's is equal.
    pub job_digest: String,
    pub model_files: Vec<FileEntry>,
    pub model_dir: PathBuf,
    pub start_step: u64,
    /// Files of the checkpoint of `start_step`, or at step 0 of the adapter to start from. Empty where there is neither.
    pub state_files: Vec<FileEntry>,
    pub state_dir: PathBuf,
    pub blocks: v1::BlockSet,
    /// Updates that the coordinator has on record.
    pub recorded: u64,
    /// Steps of the whole run; only shown.
    pub total_steps: u64,
}

impl Admission {
    fn check(welcome: v1::Welcome) -> Result<Self, String> {
        let job: JobSpec = serde_json::from_slice(&welcome.job)
            .map_err(|e| format!("its job cannot be read by this version: {e}"))?;
        let job_digest = job.digest();
        if job_digest != welcome.job_digest {
            return Err(format!(
                "job digests differ: {} there, {job_digest} here",
                text::reason(&welcome.job_digest)
            ));
        }
        job.check_received()
            .map_err(|fault| format!("its job is none that can be computed: {fault}"))?;
        let blocks = welcome.blocks.ok_or("Welcome names no blocks")?;
        check_digest("blocks.digest", &blocks.digest).map_err(|e| e.to_string())?;
        let sequence_len = blocks.sequence_len;
        if sequence_len == 0 || sequence_len > MAX_SEQUENCE_LEN || blocks.train_blocks == 0 {
            return Err("its blocks are empty or too long".to_owned());
        }
        if sequence_len as usize != job.sequence_len {
            return Err(format!(
                "its blocks hold {sequence_len} tokens, and its job says {}",
                job.sequence_len
            ));
        }
        Ok(Self {
            worker: welcome.worker,
            term: welcome.term,
            run: welcome.run,
            job: Arc::new(job),
            job_digest,
            model_files: check_files(welcome.model_files).map_err(|e| e.to_string())?,
            model_dir: welcome.model_dir.into(),
            start_step: welcome.start_step,
            state_files: check_files(welcome.state_files).map_err(|e| e.to_string())?,
            state_dir: welcome.state_dir.into(),
            blocks,
            recorded: welcome.recorded,
            total_steps: welcome.total_steps,
        })
    }
}

impl Admission {
    /// Identifies the exchanges of this job, run and term, so that they never mix with others.
    pub fn exchange_id(&self) -> [u8; 32] {
        exchange_id(&self.job_digest, &self.run, self.term)
    }
}

/// Identifies job, run and term to other workers: the run of every greeting.
pub fn exchange_id(job_digest: &str, run: &str, term: u64) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for part in [job_digest, run] {
        // With its length, so that no two pairs read alike.
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.update(&term.to_le_bytes());
    *hasher.finalize().as_bytes()
}

/// Converts a list of files. Paths are checked where they are used (`common::files::manifest::inside`).
fn check_files(files: Vec<v1::FileEntry>) -> Result<Vec<FileEntry>, WireError> {
    if files.len() > MAX_FILES {
        let (field, found) = ("files", files.len().to_string());
        return Err(WireError::Invalid { field, found });
    }
    let entries = files.into_iter().map(|file| {
        check_digest("file digest", &file.digest)?;
        Ok(FileEntry {
            path: file.path,
            size: file.size,
            digest: file.digest,
        })
    });
    entries.collect()
}

/// Passes what the coordinator says on to the engine.
pub struct Forwarder {
    pub orders: mpsc::Sender<Order>,
    pub up: mpsc::Sender<v1::WorkerMessage>,
    pub collective: Arc<Collective>,
    pub blocks: Arc<Blocks>,
    pub leases: Arc<Leases>,
    /// The newest generation heard of: what was leased under an earlier one need not be begun.
    pub newest_generation: Arc<AtomicU64>,
    /// Identifies the exchanges of job, run and term; see [`Membership`].
    pub run_id: [u8; 32],
    /// This worker's number.
    pub worker: u64,
    pub device: ComputeDevice,
    /// The reason for an exchange over TCP that was logged last.
    pub told: Mutex<String>,
    /// For people.
    pub status: status::Status,
}

impl Forwarder {
    /// Runs until the session ends; heartbeats go out meanwhile.
    pub async fn forward(self, mut down: Streaming<v1::CoordinatorMessage>) -> SessionEnd {
        let up = self.up.clone();
        let heartbeats = async {
            let mut interval = tokio::time::interval(HEARTBEAT_INTERVAL);
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                interval.tick().await;
                if up
                    .send(common::wire::up(Up::Heartbeat(v1::Heartbeat {})))
                    .await
                    .is_err()
                {
                    return SessionEnd::Lost("the connection broke".to_owned());
                }
            }
        };
        let messages = async {
            loop {
                let message = match down.message().await {
                    Ok(Some(message)) => message.message,
                    Ok(None) => return SessionEnd::Lost("it closed the session".to_owned()),
                    Err(status) => return SessionEnd::of(&status),
                };
                match self.pass_on(message).await {
                    Ok(None) => {}
                    Ok(Some(end)) => return end,
                    Err(error) => return SessionEnd::Unusable(error.to_string()),
                }
            }
        };
        tokio::select! {
            end = messages => end,
            end = heartbeats => end,
        }
    }

    async fn pass_on(&self, message: Option<Down>) -> Result<Option<SessionEnd>, WireError> {
        let order = match message.ok_or(WireError::Empty)? {
            Down::Generation(generation) => {
                // At once, not in turn: it ends the exchange that the engine may be waiting in.
                let membership = membership(&generation, self.run_id)?;
                self.newest_generation
                    .store(generation.generation, Ordering::SeqCst);
                self.leases.clear();
                self.collective.enter(membership.clone());
                self.group_up(&generation, &membership);
                Order::Enter(generation)
            }
            Down::NcclId(nccl_id) => {
                self.identify(&nccl_id);
                return Ok(None);
            }
            Down::Probe(probe) => {
                self.probe(probe)?;
                return Ok(None);
            }
            Down::Aside(aside) => {
                let reason = text::reason(&aside.reason);
                tracing::warn!(
                    "waiting: this worker takes no part for now, because {reason}; it is tried again from time to time"
                );
                self.status.set_aside(&reason);
                return Ok(None);
            }
            Down::Plan(plan) => Order::Plan(plan),
            Down::Lease(lease) => Order::Lease(self.prefetch(lease)?),
            Down::Withdraw(withdraw) => {
                self.give_back(withdraw).await?;
                return Ok(None);
            }
            Down::Exchange(exchange) => Order::Exchange(exchange),
            Down::SaveState(save) => Order::Save(save),
            Down::Follow(follow) => Order::Follow(source(follow, self.run_id)?),
            Down::Feed(feed) => Order::Feed {
                run_id: self.run_id,
                feed,
            },
            Down::Finish(finish) => {
                return Ok(Some(SessionEnd::finished(finish)));
            }
            Down::Welcome(_) => {
                let (field, found) = ("message", "a second Welcome".to_owned());
                return Err(WireError::Invalid { field, found });
            }
        };
        // A closed channel means that the engine has ended, which is noticed elsewhere.
        let _ = self.orders.send(order).await;
        Ok(None)
    }

    /// Answers a request to give slots back: at once, not in turn, because the engine may have a slot in hand for long.
    async fn give_back(&self, withdraw: v1::Withdraw) -> Result<(), WireError> {
        if let Some(withdrawn) = self.leases.give_back(withdraw)? {
            // Where it cannot be said, the session is over.
            let _ = self.up.send(up(Up::Withdrawn(withdrawn))).await;
        }
        Ok(())
    }

    fn prefetch(&self, lease: v1::Lease) -> Result<Lease, WireError> {
        let kind = PlanKind::from_wire(lease.kind)?;
        let (generation, step) = (lease.generation, lease.step);
        let slots = lease.slots.iter().copied();
        let fits = self.leases.add(slots.map(|slot| SlotKey {
            generation,
            kind,
            step,
            slot,
        }));
        if !fits {
            let (field, found) = ("lease", "more slots than anybody leases".to_owned());
            return Err(WireError::Invalid { field, found });
        }
        let request = |slot: u32| (slot, self.blocks.request(kind, step, slot));
        Ok(Lease {
            generation: lease.generation,
            step,
            kind,
            slots: lease.slots.into_iter().map(request).collect(),
        })
    }
}

fn source(follow: v1::Follow, run_id: [u8; 32]) -> Result<Source, WireError> {
    let field = "source";
    let member = follow.source.ok_or(WireError::Missing { field })?;
    Ok(Source {
        run_id,
        worker: follow.worker,
        attempt: follow.attempt,
        peer: PeerAddress {
            name: member.name,
            address: member.address,
        },
    })
}

fn membership(generation: &v1::Generation, run_id: [u8; 32]) -> Result<Membership, WireError> {
    let members = generation.members.len();
    let known = |rank: &u32| (*rank as usize) < members;
    let ranks = generation
        .behind
        .iter()
        .chain(&generation.fed)
        .chain([&generation.rank, &generation.source]);
    if members > MAX_MEMBERS || !ranks.into_iter().all(known) {
        let (field, found) = ("generation", format!("{members} members"));
        return Err(WireError::Invalid { field, found });
    }
    let silence_ms = match generation.deadline_ms {
        0 => MAX_SILENCE_MS,
        stated => stated.min(MAX_SILENCE_MS),
    };
    let address = |member: &v1::Member| PeerAddress {
        name: member.name.clone(),
        address: member.address.clone(),
    };
    Ok(Membership {
        run_id,
        generation: generation.generation,
        rank: generation.rank,
        members: generation.members.iter().map(address).collect(),
        silence: Duration::from_millis(silence_ms),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_coordinator_says_at_the_end_is_one_visible_line() {
        let reason = format!("\x1b[2Jgone\n{}", "x".repeat(3_000_000));
        let finish = |resumable| {
            let reason = reason.clone();
            SessionEnd::finished(v1::Finish {
                failed: false,
                reason,
                resumable,
            })
        };
        let of_status = SessionEnd::of(&Status::aborted(reason.clone()));
        for end in [finish(true), finish(false), of_status] {
            let (SessionEnd::Interrupted(told)
            | SessionEnd::Expelled(told)
            | SessionEnd::Finished { reason: told, .. }) = end
            else {
                panic!("another end")
            };
            assert!(told.starts_with("␛[2Jgone xxx"), "{told}");
            assert!(told.len() < 1000 && !told.chars().any(char::is_control));
        }
    }

    #[test]
    fn exchanges_of_different_jobs_runs_and_terms_are_kept_apart() {
        let id = exchange_id;
        let own = id("job", "run", 2);
        assert_eq!(own, id("job", "run", 2));
        for other in [id("job", "run", 1), id("job", "r", 2), id("jobr", "un", 2)] {
            assert_ne!(own, other);
        }
    }
}
