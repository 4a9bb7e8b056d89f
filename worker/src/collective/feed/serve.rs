//! One connection of one follower, from its request to the end of the feed or of the connection.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::failpoint;

use super::super::frame::FrameKind;
use super::super::greeting::FeedHello;
use super::super::link::{self, Link, LinkError, broken};
use super::super::state::{piece, piece_count};
use super::source::{Deed, Feeds, Offer};
use super::{REQUEST_BYTES, Request, Update};
use crate::collective::generation_token::GENERATION_CHECK_INTERVAL;

/// Time between two signs of life while there is nothing to send.
const ALIVE: Duration = Duration::from_secs(1);

impl Feeds {
    /// Serves a follower that has said Hello.
    pub(in super::super) fn serve(
        &self,
        stream: &TcpStream,
        hello: &FeedHello,
    ) -> Result<(), String> {
        self.answer(stream, hello).map_err(|error| match error {
            LinkError::Closed => "this worker has left".to_owned(),
            LinkError::Broken(reason) => reason,
        })
    }

    fn answer(&self, stream: &TcpStream, hello: &FeedHello) -> Result<(), LinkError> {
        link::prepare(stream, self.limits.silence).map_err(|error| broken(&error.to_string()))?;
        let link = Link::new(stream, &self.token, self.limits.silence);
        let mut request = [0; REQUEST_BYTES];
        link.receive(FrameKind::FeedRequest, 0, &mut request)?;
        let request = Request::decode(&request);
        let asked = Instant::now();
        let connection = loop {
            match self.connect(hello, &request) {
                Ok(connection) => break connection,
                Err(Deed::End(reason)) => return link.send(FrameKind::Ended, 0, reason.as_bytes()),
                Err(_) if asked.elapsed() < ALIVE => std::thread::sleep(GENERATION_CHECK_INTERVAL),
                Err(_) => return link.send(FrameKind::Later, 0, &[]),
            }
        };
        let served = self.feed(&link, hello.worker, connection, &request);
        self.disconnect(hello.worker, connection);
        served
    }

    fn feed(
        &self,
        link: &Link<'_>,
        worker: u64,
        connection: u64,
        request: &Request,
    ) -> Result<(), LinkError> {
        let mut last_sent = Instant::now();
        loop {
            match self.next(worker, connection, ALIVE / 4) {
                Deed::SendState(offer) => {
                    send_state(link, &offer, request)?;
                    taken(link)?;
                    self.advance(worker, connection, offer.state.snapshot.step);
                }
                Deed::SendUpdate(update) => {
                    send_update(link, &update)?;
                    taken(link)?;
                    self.advance(worker, connection, update.step + 1);
                }
                Deed::Wait if last_sent.elapsed() < ALIVE => continue,
                Deed::Wait => link.send(FrameKind::Alive, 0, &[])?,
                Deed::Later => return link.send(FrameKind::Later, 0, &[]),
                Deed::End(reason) => return link.send(FrameKind::Ended, 0, reason.as_bytes()),
            }
            last_sent = Instant::now();
        }
    }
}

/// Sends the state, from the first piece that the follower lacks.
fn send_state(link: &Link<'_>, offer: &Offer, request: &Request) -> Result<(), LinkError> {
    let header = offer.header();
    link.send(FrameKind::StateHeader, 0, &header.encode())?;
    let snapshot = &offer.state.snapshot;
    let pieces = piece_count(&snapshot.layout);
    let first = match request.identity == header.identity() {
        true => request.pieces.min(pieces as u64) as usize,
        false => 0,
    };
    for index in first..pieces {
        link.send(FrameKind::State, index, piece(snapshot, index))?;
        failpoint::reached("state-send");
    }
    Ok(())
}

fn send_update(link: &Link<'_>, update: &Update) -> Result<(), LinkError> {
    link.send(FrameKind::Update, 0, &update.header().encode())?;
    for (index, piece) in update.pieces().enumerate() {
        link.send(FrameKind::Mean, index, piece)?;
    }
    Ok(())
}

/// Waits until the follower says that it has checked all that was sent. Until then, what it lacks is kept.
fn taken(link: &Link<'_>) -> Result<(), LinkError> {
    link.receive(FrameKind::Taken, 0, &mut [])
}
