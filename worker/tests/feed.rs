//! A feed over the loopback: the whole state and every update after it, whatever happens to the connection; and nothing
//! for callers that do not belong.
#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::files::layout::Layout;
use common::files::snapshot::MAX_STATE_BYTES_PER_SCALAR;
use common::files::{Flat, Snapshot};
use futures::FutureExt;
use worker::collective::feed::{FeedLimits, FeedTimeouts, Feeds, Follower, News, Source, Update};
use worker::collective::frame::{FrameHeader, FrameKind, HEADER_BYTES};
use worker::collective::greeting::FeedHello;
use worker::collective::state::StateCopy;
use worker::collective::{Collective, PeerAddress};
use worker::engine::slot::SlotOutcome;

const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const RUN_ID: [u8; 32] = [7; 32];
const FEED_TIMEOUT: Duration = Duration::from_secs(30);
/// Four pieces in each of three buffers.
const SCALARS: usize = 200_000;
const STATE_BYTES: usize = MAX_STATE_BYTES_PER_SCALAR * SCALARS;
const TIMEOUTS: FeedTimeouts = FeedTimeouts {
    broken: Duration::from_secs(2),
    later: Duration::from_secs(20),
    silence: Duration::from_secs(20),
};

fn collective(limits: FeedLimits) -> Collective {
    Collective::bind_with(HOST, limits).unwrap()
}

fn layout() -> Arc<Layout> {
    Arc::new(Layout::new([("a".into(), vec![SCALARS])]))
}

fn state(step: u64) -> StateCopy {
    let flat = |seed: f32| (0..SCALARS).map(|i| seed + i as f32).collect::<Flat>();
    let snapshot = Snapshot {
        step,
        layout: layout(),
        weights: flat(step as f32).into(),
        moments: vec![flat(-0.5).into(), flat(0.25).into()],
    };
    StateCopy {
        snapshot,
        memory: vec![step as u8; 5],
    }
}

fn update(step: u64) -> Update {
    Update {
        step,
        learning_rate: 0.1 * step as f64,
        skipped: false,
        digest: step.is_multiple_of(2),
        slots: [(step as u32, SlotOutcome::default())].into(),
        mean: (0..SCALARS).map(|i| step as f32 - i as f32).collect(),
    }
}

fn follow(worker: u64, port: u16) -> Follower {
    let source = Source {
        run_id: RUN_ID,
        worker,
        attempt: 1,
        peer: PeerAddress {
            name: "source".into(),
            address: format!("127.0.0.1:{port}"),
        },
    };
    Follower::start(source, layout(), TIMEOUTS)
}

/// What the feed brings next.
fn next(follower: &mut Follower) -> Option<News> {
    let began = Instant::now();
    while began.elapsed() < FEED_TIMEOUT {
        if let Some(news) = follower.next().now_or_never() {
            return Some(news);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

fn state_of(follower: &mut Follower) -> StateCopy {
    match next(follower) {
        Some(News::State(state)) => *state,
        other => panic!("{other:?}"),
    }
}

fn update_of(follower: &mut Follower) -> Update {
    match next(follower) {
        Some(News::Update(update)) => update,
        other => panic!("{other:?}"),
    }
}

fn loss_of(follower: &mut Follower) -> String {
    loop {
        match next(follower) {
            Some(News::Lost(reason)) => return reason,
            Some(_) => {}
            None => panic!("the feed goes on"),
        }
    }
}

fn begin(feeds: &Arc<Feeds>, worker: u64, attempt: u64, copy: impl FnOnce() -> StateCopy) {
    begin_in(RUN_ID, feeds, worker, attempt, copy);
}

fn begin_in(
    run_id: [u8; 32],
    feeds: &Arc<Feeds>,
    worker: u64,
    attempt: u64,
    copy: impl FnOnce() -> StateCopy,
) {
    let Ok(()) = feeds.begin(run_id, worker, attempt, || Ok::<_, Infallible>(copy()));
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < FEED_TIMEOUT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_follower_gets_the_state_and_every_update_after_it() {
    let member = collective(FeedLimits::default());
    // It may call before the source knows of it.
    let mut follower = follow(9, member.port());
    begin(member.feeds(), 9, 1, || state(3));
    for step in 3..6 {
        member.feeds().publish(update(step));
    }
    let skipped = Update {
        skipped: true,
        mean: Vec::new(),
        ..update(6)
    };
    member.feeds().publish(skipped.clone());
    assert!(state_of(&mut follower) == state(3));
    for step in 3..6 {
        assert!(update_of(&mut follower) == update(step));
    }
    assert_eq!(update_of(&mut follower), skipped);
    until("all is let go", || member.feeds().kept_bytes() == 0);
    member.feeds().publish(update(7));
    assert!(update_of(&mut follower) == update(7));
    member.feeds().conclude(&[9], &[9], 8);
    until("the feed is over", || !member.feeds().is_followed());
}

#[test]
fn a_member_gets_its_last_updates_though_its_word_that_it_has_the_state_comes_late() {
    for fed in [&[9][..], &[]] {
        let member = collective(FeedLimits::default());
        let feeds = member.feeds();
        begin(feeds, 9, 1, || state(3));
        feeds.publish(update(3));
        // The coordinator may have heard it sooner.
        feeds.conclude(&[9], fed, 4);
        let mut follower = follow(9, member.port());
        if fed.is_empty() {
            // The generation brings the whole state.
            assert!(loss_of(&mut follower).contains("has become a member"));
            continue;
        }
        assert!(state_of(&mut follower) == state(3));
        assert!(update_of(&mut follower) == update(3));
        until("the feed is over", || !feeds.is_followed());
    }
}

#[test]
fn nothing_is_kept_where_nobody_follows() {
    let member = collective(FeedLimits::default());
    member.feeds().publish(update(0));
    assert_eq!(member.feeds().kept_bytes(), 0);
    assert!(!member.feeds().is_followed());
}

/// Passes bytes on in both directions and does to each connection's stream from the source what `harm` says.
struct Proxy {
    port: u16,
    /// From the source.
    bytes: Arc<AtomicUsize>,
    connections: Arc<AtomicUsize>,
}

#[derive(Clone, Copy)]
enum Harm {
    None,
    /// Ends the connection after so many bytes.
    Cut(usize),
    /// Turns one bit of the byte there.
    Flip(usize),
}

impl Proxy {
    fn start(target: u16, harms: &'static [Harm]) -> Self {
        let listener = TcpListener::bind((HOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (bytes, connections) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let (counted, calls) = (bytes.clone(), connections.clone());
        std::thread::spawn(move || {
            for caller in listener.incoming() {
                let caller = caller.unwrap();
                let source = TcpStream::connect((HOST, target)).unwrap();
                let call = calls.fetch_add(1, Ordering::SeqCst);
                let harm = harms.get(call).copied().unwrap_or(Harm::None);
                let (mut from, mut to) = (caller.try_clone().unwrap(), source.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Both);
                });
                let counted = counted.clone();
                std::thread::spawn(move || pass_on(source, caller, harm, &counted));
            }
        });
        Self {
            port,
            bytes,
            connections,
        }
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, harm: Harm, counted: &AtomicUsize) {
    let mut passed = 0;
    let mut buffer = [0; 16 << 10];
    while let Ok(read) = from.read(&mut buffer) {
        let mut sent = read;
        match harm {
            Harm::Cut(after) => sent = read.min(after - passed),
            Harm::Flip(at) if (passed..passed + read).contains(&at) => buffer[at - passed] ^= 4,
            _ => {}
        }
        passed += sent;
        counted.fetch_add(sent, Ordering::SeqCst);
        if read == 0 || to.write_all(&buffer[..sent]).is_err() || sent < read {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

#[test]
fn a_broken_connection_goes_on_at_the_first_piece_that_is_missing() {
    let member = collective(FeedLimits::default());
    let proxy = Proxy::start(
        member.port(),
        &[Harm::Cut(1_000_000), Harm::Cut(900_000), Harm::Cut(500_000)],
    );
    let feeds = member.feeds();
    begin(feeds, 9, 1, || state(3));
    let mut follower = follow(9, proxy.port);
    feeds.publish(update(3));
    assert!(state_of(&mut follower) == state(3));
    assert!(update_of(&mut follower) == update(3));
    assert_eq!(proxy.connections.load(Ordering::SeqCst), 4);
    // At most the piece in transit was sent again with each new connection.
    let least = STATE_BYTES + 4 * SCALARS;
    let sent = proxy.bytes.load(Ordering::SeqCst);
    assert!((least..least + 3 * (300 << 10)).contains(&sent), "{sent}");
}

#[test]
fn an_update_that_was_cut_off_comes_again() {
    let member = collective(FeedLimits::default());
    let proxy = Proxy::start(member.port(), &[Harm::Cut(STATE_BYTES + 300_000)]);
    begin(member.feeds(), 9, 1, || state(3));
    let mut follower = follow(9, proxy.port);
    for step in 3..6 {
        member.feeds().publish(update(step));
    }
    assert!(state_of(&mut follower) == state(3));
    for step in 3..6 {
        assert!(
            update_of(&mut follower) == update(step),
            "after step {step}"
        );
    }
    assert_eq!(proxy.connections.load(Ordering::SeqCst), 2);
}

#[test]
fn a_damaged_piece_is_asked_for_again() {
    let member = collective(FeedLimits::default());
    let harms = &[Harm::Flip(700_000), Harm::Flip(100), Harm::Flip(5)];
    let proxy = Proxy::start(member.port(), harms);
    begin(member.feeds(), 9, 1, || state(3));
    let mut follower = follow(9, proxy.port);
    assert!(state_of(&mut follower) == state(3));
    assert!(proxy.connections.load(Ordering::SeqCst) >= 3);
}

#[test]
fn the_copy_is_shared_by_all_who_come_while_it_is_needed() {
    let member = collective(FeedLimits::default());
    let feeds = member.feeds();
    begin(feeds, 9, 1, || state(3));
    // Takes it, but slowly.
    let (slow, _) = call(member.port(), hello(9));
    feeds.publish(update(3));
    begin(feeds, 10, 1, || panic!("a second copy"));
    assert_eq!(feeds.kept_bytes() / STATE_BYTES, 1);
    drop(slow);
    for worker in [9, 10] {
        let mut follower = follow(worker, member.port());
        assert!(state_of(&mut follower) == state(3));
        assert!(update_of(&mut follower) == update(3));
        std::mem::forget(follower);
    }
    until("all is let go", || feeds.kept_bytes() == 0);
    // A newer one begins where the member is by now.
    begin(feeds, 11, 1, || state(4));
    let mut third = follow(11, member.port());
    assert!(state_of(&mut third) == state(4));
}

#[test]
fn who_falls_too_far_behind_is_let_go_and_may_begin_anew() {
    let member = collective(FeedLimits {
        log_bytes: Some(3 * (4 * SCALARS + 100)),
        ..FeedLimits::default()
    });
    let feeds = member.feeds();
    begin(feeds, 9, 1, || state(0));
    begin(feeds, 10, 1, || state(0));
    let mut quick = follow(10, member.port());
    assert!(state_of(&mut quick) == state(0));
    for step in 0..8 {
        feeds.publish(update(step));
        assert!(update_of(&mut quick) == update(step));
        // Until the source knows it too.
        assert!(feeds.kept_bytes() <= STATE_BYTES + 4 * (4 * SCALARS + 100));
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut slow = follow(9, member.port());
    let reason = loss_of(&mut slow);
    assert!(reason.contains("too far behind"), "{reason}");
    feeds.publish(update(8));
    assert!(update_of(&mut quick) == update(8));
    until("all is let go", || feeds.kept_bytes() == 0);
}

#[test]
fn a_follower_that_does_not_come_costs_the_copy_only_for_a_while() {
    let member = collective(FeedLimits {
        absence: Duration::from_millis(100),
        ..FeedLimits::default()
    });
    begin(member.feeds(), 9, 1, || state(3));
    assert!(member.feeds().is_followed());
    until("it is let go", || !member.feeds().is_followed());
    assert_eq!(member.feeds().kept_bytes(), 0);
}

#[test]
fn a_source_that_dies_is_noticed() {
    let member = collective(FeedLimits::default());
    begin(member.feeds(), 9, 1, || state(3));
    let mut follower = follow(9, member.port());
    assert!(state_of(&mut follower) == state(3));
    drop(member);
    let reason = loss_of(&mut follower);
    assert!(reason.contains("cannot be reached"), "{reason}");
}

#[test]
fn an_update_that_is_missing_ends_the_feed() {
    let member = collective(FeedLimits::default());
    begin(member.feeds(), 9, 1, || state(3));
    let mut follower = follow(9, member.port());
    assert!(state_of(&mut follower) == state(3));
    // The member got a newer state from others.
    member.feeds().publish(update(5));
    let reason = loss_of(&mut follower);
    assert!(reason.contains("left behind"), "{reason}");
}

#[test]
fn one_that_died_with_a_part_of_the_state_leaves_no_old_copy_to_the_next() {
    let member = collective(FeedLimits::default());
    let feeds = member.feeds();
    begin(feeds, 9, 1, || state(3));
    let (dead, kind) = call(member.port(), hello(9));
    assert_eq!(kind, FrameKind::StateHeader as u8);
    feeds.publish(update(3));
    feeds.publish(update(4));
    drop(dead);
    until("the source has noticed", || {
        let copied = Cell::new(false);
        let copy = || {
            copied.set(true);
            state(5)
        };
        begin(feeds, 10, 1, copy);
        copied.get()
    });
    // Neither the old copy nor the updates after it.
    assert_eq!(feeds.kept_bytes(), STATE_BYTES);
    feeds.publish(update(5));
    // Had it only lost its connection, it would begin with the new one, too.
    for worker in [10, 9] {
        let mut follower = follow(worker, member.port());
        assert!(state_of(&mut follower) == state(5));
        assert!(update_of(&mut follower) == update(5));
        std::mem::forget(follower);
    }
}

#[test]
fn a_new_term_shares_nothing_of_the_one_before() {
    let member = collective(FeedLimits::default());
    let feeds = member.feeds();
    begin_in([8; 32], feeds, 8, 1, || state(5));
    let (_slow, _) = call(
        member.port(),
        FeedHello {
            run_id: [8; 32],
            ..hello(8)
        },
    );
    begin(feeds, 9, 1, || state(3));
    begin(feeds, 10, 1, || panic!("a second copy"));
    for worker in [9, 10] {
        assert!(state_of(&mut follow(worker, member.port())) == state(3));
    }
}

fn hello(worker: u64) -> FeedHello {
    FeedHello {
        run_id: RUN_ID,
        worker,
        attempt: 1,
    }
}

/// What a caller is answered first.
fn answer(port: u16, hello: FeedHello) -> u8 {
    call(port, hello).1
}

/// A caller that reads no further than the first answer.
fn call(port: u16, hello: FeedHello) -> (TcpStream, u8) {
    let mut stream = TcpStream::connect((HOST, port)).unwrap();
    stream.set_read_timeout(Some(FEED_TIMEOUT)).unwrap();
    let mut request = [0; 48];
    request[8..16].fill(0xff);
    stream.write_all(&hello.encode()).unwrap();
    let header = FrameHeader::of(FrameKind::FeedRequest, 0, &request);
    stream.write_all(&header.encode()).unwrap();
    stream.write_all(&request).unwrap();
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).unwrap();
    (stream, FrameHeader::decode(&header).kind)
}

#[test]
fn only_the_worker_that_the_coordinator_named_is_fed() {
    let member = collective(FeedLimits::default());
    begin(member.feeds(), 9, 2, || state(3));
    let named = FeedHello {
        run_id: RUN_ID,
        worker: 9,
        attempt: 2,
    };
    let strangers = [
        FeedHello {
            run_id: [8; 32],
            ..named
        },
        FeedHello { worker: 8, ..named },
        FeedHello {
            attempt: 3,
            ..named
        },
    ];
    for stranger in strangers {
        let kind = answer(member.port(), stranger);
        assert_eq!(kind, FrameKind::Later as u8, "{stranger:?}");
    }
    let earlier = FeedHello {
        attempt: 1,
        ..named
    };
    assert_eq!(answer(member.port(), earlier), FrameKind::Ended as u8);
    assert_eq!(answer(member.port(), named), FrameKind::StateHeader as u8);
}
