//! The newcomer's side of a feed: calls the source, checks what comes, and hands it on to the engine.
//!
//! It runs on a thread of its own and never holds more than a state and a few updates: while the engine takes none, the
//! source must wait. It ends by itself when the feed does, and at once when it is dropped.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::failpoint;
use common::files::layout::Layout;
use tokio::sync::mpsc;

use super::super::PeerAddress;
use super::super::frame::{FrameHeader, FrameKind, PIECE_SCALARS};
use super::super::greeting::FeedHello;
use super::super::link::{self, Link, LinkError};
use super::super::state::{Assembly, StateCopy, StateHeader};
use super::{Request, Update, UpdateHeader};
use crate::collective::generation_token;
use crate::collective::generation_token::GenerationToken;

/// Updates that may wait for the engine.
const AHEAD: usize = 2;
/// Longest reason for a feed's end that is accepted, in bytes.
const MAX_REASON_BYTES: usize = 1024;

/// How long a follower waits for its source.
#[derive(Clone, Copy, Debug)]
pub struct FeedTimeouts {
    /// How long to go without anything new, from a source that cannot be reached or breaks off.
    pub broken: Duration,
    /// How long to wait for the feed to begin: the source finishes the slots in its hand first.
    pub later: Duration,
    /// How long the source may be silent within a connection.
    pub silence: Duration,
}

impl Default for FeedTimeouts {
    fn default() -> Self {
        Self {
            broken: Duration::from_secs(15),
            later: Duration::from_secs(300),
            silence: Duration::from_secs(20),
        }
    }
}

/// The member to follow, and by which of the coordinator's orders.
#[derive(Clone, Debug)]
pub struct Source {
    /// Identifies the exchanges of job, run and term; see [`Membership`](super::super::Membership).
    pub run_id: [u8; 32],
    /// The follower's own number.
    pub worker: u64,
    pub attempt: u64,
    pub peer: PeerAddress,
}

/// What a feed brings, in this order: one state, then updates without a gap; at its end, why.
#[derive(Debug)]
pub enum News {
    State(Box<StateCopy>),
    Update(Update),
    Lost(String),
}

/// A feed that is being followed.
pub struct Follower {
    attempt: u64,
    news: mpsc::Receiver<News>,
    token: Arc<GenerationToken>,
}

impl Follower {
    /// Begins to follow, on a thread of its own.
    pub fn start(source: Source, layout: Arc<Layout>, timeouts: FeedTimeouts) -> Self {
        let (sender, news) = mpsc::channel(AHEAD);
        let token = Arc::<GenerationToken>::default();
        let following = Following {
            progress: Progress {
                assembly: None,
                step: None,
                at: Instant::now(),
            },
            token: token.clone(),
            attempt: source.attempt,
            news: sender,
            layout,
            timeouts,
            source,
        };
        let attempt = following.attempt;
        std::thread::spawn(move || following.run());
        Self {
            attempt,
            news,
            token,
        }
    }

    /// Number of the coordinator's order that this follower obeys.
    pub fn attempt(&self) -> u64 {
        self.attempt
    }

    /// Waits for what comes next; for ever once the feed is over.
    pub async fn next(&mut self) -> News {
        match self.news.recv().await {
            Some(news) => news,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.token.close();
    }
}

/// What a follower has received so far, over all connections.
struct Progress {
    /// The state in transfer, until all its pieces are here.
    assembly: Option<Assembly>,
    /// Updates that the weights handed on to the engine have seen.
    step: Option<u64>,
    /// When something new last arrived.
    at: Instant,
}

/// Why one connection came to its end.
enum End {
    /// This follower is not needed any more.
    Dropped,
    Later,
    Broken(String),
    /// Calling again would not help.
    Over(String),
}

impl From<LinkError> for End {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Closed => Self::Dropped,
            LinkError::Broken(reason) => Self::Broken(reason),
        }
    }
}

struct Following {
    source: Source,
    attempt: u64,
    layout: Arc<Layout>,
    timeouts: FeedTimeouts,
    progress: Progress,
    token: Arc<GenerationToken>,
    news: mpsc::Sender<News>,
}

impl Following {
    fn run(mut self) {
        let started = Instant::now();
        let mut pause = generation_token::GENERATION_CHECK_INTERVAL;
        loop {
            let before = self.progress.at;
            let reason = match self.attend() {
                End::Dropped => return,
                End::Over(reason) => return self.give_up(&reason),
                End::Later if started.elapsed() < self.timeouts.later => {
                    self.progress.at = Instant::now();
                    "has yet to begin".to_owned()
                }
                End::Later => return self.give_up("has not begun in time"),
                End::Broken(reason) => reason,
            };
            if self.progress.at.elapsed() >= self.timeouts.broken {
                return self.give_up(&reason);
            }
            tracing::debug!(
                "the feed of {} {reason}; calling again",
                self.source.peer.name
            );
            std::thread::sleep(pause);
            pause = match self.progress.at > before {
                true => generation_token::GENERATION_CHECK_INTERVAL,
                false => (pause * 2).min(Duration::from_secs(1)),
            };
        }
    }

    fn give_up(&self, reason: &str) {
        let _ = self.tell(News::Lost(reason.to_owned()));
    }

    fn tell(&self, news: News) -> Result<(), End> {
        self.news.blocking_send(news).map_err(|_| End::Dropped)
    }

    /// Serves one connection, from its beginning to its end.
    fn attend(&mut self) -> End {
        self.receive().err().unwrap_or(End::Dropped)
    }

    fn receive(&mut self) -> Result<(), End> {
        let failed = |error: std::io::Error| End::Broken(error.to_string());
        self.token.check().map_err(|_| End::Dropped)?;
        let stream =
            link::connect(&self.source.peer.address, self.timeouts.broken).map_err(|error| {
                let address = &self.source.peer.address;
                End::Broken(format!("cannot be reached at {address}: {error}"))
            })?;
        let hello = FeedHello {
            run_id: self.source.run_id,
            worker: self.source.worker,
            attempt: self.source.attempt,
        };
        (&stream).write_all(&hello.encode()).map_err(failed)?;
        link::prepare(&stream, self.timeouts.silence).map_err(failed)?;
        let token = self.token.clone();
        let link = Link::new(&stream, &token, self.timeouts.silence);
        link.send(FrameKind::FeedRequest, 0, &self.request().encode())?;
        loop {
            let header = link.receive_header()?;
            self.take(&link, &header)?;
        }
    }

    fn request(&self) -> Request {
        let assembly = self.progress.assembly.as_ref();
        Request {
            identity: assembly.map_or([0; 32], |assembly| assembly.header().identity()),
            pieces: assembly.map_or(0, |assembly| assembly.received() as u64),
            step: self.progress.step,
        }
    }

    fn take(&mut self, link: &Link<'_>, header: &FrameHeader) -> Result<(), End> {
        match FrameKind::of(header.kind) {
            Some(FrameKind::StateHeader) => self.take_state(link, header),
            Some(FrameKind::Update) => self.take_update(link, header),
            Some(FrameKind::Alive) => {
                link.receive_due(header, FrameKind::Alive, 0, &mut [])?;
                self.progress.at = Instant::now();
                Ok(())
            }
            Some(FrameKind::Later) => Err(End::Later),
            Some(FrameKind::Ended) => {
                let length = (header.length as usize).min(MAX_REASON_BYTES);
                let mut reason = vec![0; length];
                link.receive_due(header, FrameKind::Ended, 0, &mut reason)?;
                Err(End::Over(String::from_utf8_lossy(&reason).into_owned()))
            }
            _ => Err(End::Broken(format!(
                "sent a frame of kind {}, which no feed has",
                header.kind
            ))),
        }
    }

    /// Receives the pieces of the state that are missing: of the one begun here, if the source still has that one.
    fn take_state(&mut self, link: &Link<'_>, header: &FrameHeader) -> Result<(), End> {
        let bytes = link.receive_due_any_length(header, FrameKind::StateHeader, 0)?;
        let announced = StateHeader::decode(&bytes, &self.layout).map_err(End::Over)?;
        if self.progress.step.is_some() {
            return Err(End::Over("sent a second state".to_owned()));
        }
        let begun = self.progress.assembly.take();
        let assembly = begun.filter(|assembly| *assembly.header() == announced);
        let fresh = || Assembly::new(announced, self.layout.clone());
        // What has arrived stays, should this connection break.
        let assembly = self
            .progress
            .assembly
            .insert(assembly.unwrap_or_else(fresh));
        while let Some((index, piece)) = assembly.next_piece() {
            link.receive(FrameKind::State, index, piece)?;
            failpoint::reached("state-receive");
            assembly.advance();
            self.progress.at = Instant::now();
        }
        let Some(assembly) = self.progress.assembly.take() else {
            return Ok(());
        };
        let state = assembly.finish().map_err(End::Over)?;
        self.progress.at = Instant::now();
        self.progress.step = Some(state.snapshot.step);
        self.tell(News::State(Box::new(state)))?;
        Ok(link.send(FrameKind::Taken, 0, &[])?)
    }

    fn take_update(&mut self, link: &Link<'_>, header: &FrameHeader) -> Result<(), End> {
        let bytes = link.receive_due_any_length(header, FrameKind::Update, 0)?;
        let UpdateHeader {
            step,
            learning_rate,
            skipped,
            digest,
            slots,
        } = UpdateHeader::decode(&bytes).map_err(End::Over)?;
        if self.progress.step != Some(step) {
            return Err(End::Over(format!(
                "sent the update after step {step}, which was not due"
            )));
        }
        let scalars = if skipped { 0 } else { self.layout.scalars };
        let mut mean = vec![0f32; scalars];
        for (index, piece) in mean.chunks_mut(PIECE_SCALARS).enumerate() {
            link.receive(FrameKind::Mean, index, bytemuck::cast_slice_mut(piece))?;
        }
        self.progress.at = Instant::now();
        self.progress.step = Some(step + 1);
        self.tell(News::Update(Update {
            step,
            learning_rate,
            skipped,
            digest,
            slots,
            mean,
        }))?;
        Ok(link.send(FrameKind::Taken, 0, &[])?)
    }
}
