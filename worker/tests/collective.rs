//! The exchange between workers, over the loopback: exact for any number of members, quick to notice a lost one, and
//! deaf to callers that do not belong.
#![allow(clippy::unwrap_used)]

mod mesh;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::exact::{FixedPoint, dequantize};
use common::rng::CounterRng;
use mesh::{HOST, RUN_ID, SILENCE, addresses, collectives, enter, enter_with};
use worker::collective::frame::{FrameHeader, FrameKind};
use worker::collective::greeting::Hello;
use worker::collective::tcp::Mesh;
use worker::collective::{
    AllReduced, Collective, CollectiveError, Contribution, LocalSums, Membership, PeerAddress,
};
use worker::engine::slot::{HeldSlots, SlotOutcome};

/// One worker's share of a step.
#[derive(Clone, Default)]
struct Share {
    held: HeldSlots,
    exact: Vec<i64>,
    fast: Vec<f32>,
    invalid: u64,
}

impl Share {
    fn contribution(&self, slots: u32, fast: bool) -> Contribution<'_> {
        Contribution {
            step: 3,
            slots,
            held: &self.held,
            sums: match fast {
                true => LocalSums::Fast(&self.fast),
                false => LocalSums::Exact(&self.exact),
            },
            invalid: self.invalid,
        }
    }
}

/// Any that differs from slot to slot.
fn outcome(slot: u32) -> SlotOutcome {
    SlotOutcome {
        loss_sum: f64::from(slot),
        trained_tokens: 1,
        ..SlotOutcome::default()
    }
}

/// Slot gradients dealt out to `size` workers as `rng` decides; some get none.
fn deal(size: usize, slots: u32, scalars: usize, rng: &mut CounterRng) -> Vec<Share> {
    let rule = FixedPoint::new(1000, slots as usize);
    let mut shares = vec![
        Share {
            exact: vec![0; scalars],
            fast: vec![0.0; scalars],
            ..Share::default()
        };
        size
    ];
    for slot in 0..slots {
        // The gradient of a slot does not depend on who computes it.
        let mut gradient = CounterRng::new(11, &[u64::from(slot)]);
        let gradient: Vec<f32> = (0..scalars).map(|_| gradient.normal() as f32).collect();
        let share = &mut shares[rng.below(size as u64) as usize];
        share.held.insert(slot, outcome(slot));
        share.invalid += rule.accumulate(&mut share.exact, &gradient);
        for (sum, g) in share.fast.iter_mut().zip(&gradient) {
            *sum += g / 1000.0;
        }
    }
    shares
}

fn exchange(
    meshes: &[Arc<Collective>],
    generation: u64,
    shares: &[Share],
    slots: u32,
    fast: bool,
) -> Vec<Result<AllReduced, CollectiveError>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = meshes
            .iter()
            .zip(shares)
            .map(|(collective, share)| {
                scope.spawn(move || {
                    let mesh = collective.mesh(generation)?;
                    mesh.all_reduce(&share.contribution(slots, fast))
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

#[test]
fn any_number_of_workers_gives_the_bits_of_one() {
    let mut rng = CounterRng::new(5, &[]);
    // Fewer scalars than workers, an odd number, and several pieces per chunk.
    for scalars in [1usize, 5, 1001, 300_000] {
        let alone = deal(1, 6, scalars, &mut rng);
        let one = collectives(1);
        enter(&one, 1);
        let expected = exchange(&one, 1, &alone, 6, false).remove(0).unwrap();
        assert!(expected.mean.values.iter().any(|mean| *mean != 0.0));
        for size in 2..=8 {
            let members = collectives(size);
            enter(&members, 1);
            // A mesh serves many exchanges.
            for _ in 0..2 {
                let shares = deal(size, 6, scalars, &mut rng);
                for reduced in exchange(&members, 1, &shares, 6, false) {
                    assert!(
                        reduced.unwrap() == expected,
                        "{size} workers, {scalars} scalars"
                    );
                }
            }
        }
    }
}

#[test]
fn the_fast_sum_is_equal_on_all_workers_and_close_to_the_exact_one() {
    let mut rng = CounterRng::new(6, &[]);
    let members = collectives(3);
    enter(&members, 1);
    let shares = deal(3, 9, 200_000, &mut rng);
    let exact = exchange(&members, 1, &shares, 9, false).remove(0).unwrap();
    let fast: Vec<AllReduced> = exchange(&members, 1, &shares, 9, true)
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert!(fast.windows(2).all(|pair| pair[0] == pair[1]));
    for (fast, exact) in fast[0].mean.values.iter().zip(&exact.mean.values) {
        assert!((fast - exact).abs() < 1e-6);
    }
}

#[test]
fn sums_of_more_pieces_than_may_wait_are_exact_too() {
    const SCALARS: usize = 2_000_003;
    let members = collectives(3);
    enter(&members, 1);
    let mut shares = deal(3, 3, 1, &mut CounterRng::new(2, &[]));
    for (rank, share) in (1i64..).zip(&mut shares) {
        let exact = (0..SCALARS as i64).map(|i| (i * i * rank * 7919) % (1 << 40) - (1 << 39));
        share.exact = exact.collect();
        share.fast = share.exact.iter().map(|sum| dequantize(*sum)).collect();
    }
    let [first, second, third] = &shares[..] else {
        unreachable!("three were dealt")
    };
    for fast in [false, true] {
        let total = |i: usize| match fast {
            false => dequantize(first.exact[i] + second.exact[i] + third.exact[i]),
            // By rank.
            true => first.fast[i] + second.fast[i] + third.fast[i],
        };
        let expected: Vec<f32> = (0..SCALARS).map(total).collect();
        for reduced in exchange(&members, 1, &shares, 3, fast) {
            assert!(reduced.unwrap().mean.values == expected, "fast: {fast}");
        }
    }
}

#[test]
fn invalid_elements_are_counted_over_all_workers() {
    let members = collectives(3);
    enter(&members, 1);
    let mut shares = deal(3, 4, 10, &mut CounterRng::new(1, &[]));
    shares[0].invalid = 2;
    shares[2].invalid = 3;
    for reduced in exchange(&members, 1, &shares, 4, false) {
        assert_eq!(reduced.unwrap().mean.invalid, 5);
    }
}

#[test]
fn a_slot_held_twice_or_by_nobody_is_an_error() {
    let members = collectives(2);
    enter(&members, 1);
    let mut shares = deal(2, 4, 10, &mut CounterRng::new(1, &[]));
    let held = |slots: &[u32]| slots.iter().map(|slot| (*slot, outcome(*slot))).collect();
    shares[0].held = held(&[0, 1, 2, 3]);
    shares[1].held = held(&[2]);
    for reduced in exchange(&members, 1, &shares, 4, false) {
        let message = reduced.unwrap_err().to_string();
        assert!(message.contains("slot 2 is held twice"), "{message}");
    }
    shares[0].held = held(&[0, 3]);
    for reduced in exchange(&members, 1, &shares, 4, false) {
        let message = reduced.unwrap_err().to_string();
        assert!(message.contains("slot 1 is missing"), "{message}");
    }
}

#[test]
fn a_lost_peer_is_named_at_once_and_the_next_generation_goes_on() {
    let mut members = collectives(4);
    enter(&members, 1);
    let shares = deal(4, 8, 300_000, &mut CounterRng::new(2, &[]));
    let meshes: Vec<Arc<Mesh>> = members.iter().map(|m| m.mesh(1).unwrap()).collect();
    drop(meshes);
    // The last one dies while the others wait for its part.
    let lost = members.pop().unwrap();
    let started = Instant::now();
    let failures = std::thread::scope(|scope| {
        let exchanging = scope.spawn(|| exchange(&members, 1, &shares[..3], 8, false));
        std::thread::sleep(Duration::from_millis(100));
        drop(lost);
        exchanging.join().unwrap()
    });
    assert!(started.elapsed() < Duration::from_secs(5), "by time-out");
    for failure in failures {
        match failure.unwrap_err() {
            CollectiveError::Peer { rank, name, .. } => {
                assert_eq!((rank, name.as_str()), (3, "worker-3"));
            }
            other => panic!("{other}"),
        }
    }
    // The survivors still have what they held.
    enter(&members, 2);
    let mut rest = shares[..3].to_vec();
    rest[0].held.extend(&shares[3].held);
    for (sum, lost) in rest[0].exact.iter_mut().zip(&shares[3].exact) {
        *sum += lost;
    }
    let expected = {
        let one = collectives(1);
        enter(&one, 1);
        let alone = deal(1, 8, 300_000, &mut CounterRng::new(2, &[]));
        exchange(&one, 1, &alone, 8, false).remove(0).unwrap()
    };
    for reduced in exchange(&members, 2, &rest, 8, false) {
        assert!(reduced.unwrap() == expected);
    }
}

/// Far more than connections hold that nobody reads from.
fn wide_shares(size: usize) -> Vec<Share> {
    const SCALARS: i64 = 3_000_000;
    let mut shares = deal(size, 2, 1, &mut CounterRng::new(2, &[]));
    for (rank, share) in (1..).zip(&mut shares) {
        share.exact = (0..SCALARS)
            .map(|i| i * rank * (i64::MAX / 4 / SCALARS))
            .collect();
    }
    shares
}

#[test]
fn whoever_comes_late_to_an_exchange_is_waited_for() {
    const SILENCE: Duration = Duration::from_secs(1);
    let exchange_with_late = |size: usize, late: usize| {
        let members = collectives(size);
        enter_with(&members, 1, SILENCE);
        let shares = wide_shares(size);
        let results: Vec<_> = std::thread::scope(|scope| {
            let begin = |rank: usize| {
                let (member, share) = (&members[rank], &shares[rank]);
                scope.spawn(move || {
                    let mesh = member.mesh(1)?;
                    if rank == late {
                        std::thread::sleep(2 * SILENCE);
                    }
                    mesh.all_reduce(&share.contribution(2, false))
                })
            };
            let threads: Vec<_> = (0..size).map(begin).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let total = |i: usize| {
            let parts = shares.iter().map(|share| share.exact[i]);
            dequantize(parts.fold(0, i64::wrapping_add))
        };
        for reduced in results {
            let mean = reduced.unwrap().mean.values;
            assert!((0..mean.len()).all(|i| mean[i] == total(i)), "of {size}");
        }
    };
    std::thread::scope(|scope| {
        for (size, late) in [(2, 1), (3, 0)] {
            scope.spawn(move || exchange_with_late(size, late));
        }
    });
}

#[test]
fn a_lost_peer_is_named_while_another_is_waited_for() {
    let members = collectives(3);
    enter(&members, 1);
    let shares = wide_shares(3);
    let started = Instant::now();
    // The third comes to the mesh and not to the exchange.
    let _late = members[2].mesh(1).unwrap();
    let failures = std::thread::scope(|scope| {
        let exchanging = scope.spawn(|| exchange(&members[..2], 1, &shares, 2, false));
        std::thread::sleep(Duration::from_millis(500));
        members[1].close();
        exchanging.join().unwrap()
    });
    assert!(started.elapsed() < Duration::from_secs(5), "by time-out");
    match &failures[0] {
        Err(CollectiveError::Peer { rank: 1, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_new_generation_ends_an_exchange_at_once() {
    let members = collectives(2);
    enter(&members, 1);
    let shares = deal(2, 2, 1000, &mut CounterRng::new(3, &[]));
    let started = Instant::now();
    let failure = std::thread::scope(|scope| {
        // The other member never comes to the exchange.
        let waiting = scope.spawn(|| exchange(&members[..1], 1, &shares, 2, false).remove(0));
        std::thread::sleep(Duration::from_millis(100));
        enter(&members, 2);
        waiting.join().unwrap()
    });
    assert!(matches!(failure, Err(CollectiveError::Superseded)));
    assert!(started.elapsed() < Duration::from_secs(5));
    for reduced in exchange(&members, 2, &shares, 2, false) {
        reduced.unwrap();
    }
}

#[test]
fn a_member_that_cannot_be_reached_is_named() {
    let collective = Collective::bind(HOST).unwrap();
    let vacant = TcpListener::bind((HOST, 0)).unwrap().local_addr().unwrap();
    let members = vec![
        PeerAddress {
            name: "gone".into(),
            address: vacant.to_string(),
        },
        PeerAddress {
            name: "here".into(),
            address: String::new(),
        },
    ];
    collective.enter(Membership {
        run_id: RUN_ID,
        generation: 1,
        rank: 1,
        members,
        silence: Duration::from_millis(300),
    });
    let message = collective.mesh(1).err().unwrap().to_string();
    for part in ["gone (rank 0)", &vacant.to_string(), "over the loopback"] {
        assert!(message.contains(part), "{message}");
    }
}

/// Answers a hostile caller's `bytes` with the end of the connection.
fn is_turned_away(port: u16, bytes: &[u8]) -> bool {
    let mut stream = TcpStream::connect((HOST, port)).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    stream.write_all(bytes).unwrap();
    matches!(stream.read(&mut [0; 64]), Ok(0))
}

#[test]
fn hostile_callers_are_turned_away_and_delay_nobody() {
    let members = collectives(2);
    let port = members[0].port();
    enter(&members, 2);
    let hello = Hello {
        run_id: RUN_ID,
        generation: 1,
        from: 1,
        to: 0,
    };
    assert!(is_turned_away(port, &hello.encode()), "an older generation");
    assert!(is_turned_away(port, &[b'G'; 60]), "another protocol");
    let _silent = TcpStream::connect((HOST, port)).unwrap();
    let foreign = Hello {
        run_id: [8; 32],
        generation: 2,
        ..hello
    };
    let mut stranger = TcpStream::connect((HOST, port)).unwrap();
    stranger.write_all(&foreign.encode()).unwrap();
    let shares = deal(2, 2, 1000, &mut CounterRng::new(3, &[]));
    let started = Instant::now();
    for reduced in exchange(&members, 2, &shares, 2, false) {
        reduced.unwrap();
    }
    assert!(started.elapsed() < Duration::from_secs(3));
}

/// An exchange with a peer that says Hello properly and then sends `bytes`.
fn exchange_with_impostor(bytes: Vec<u8>) -> String {
    let collective = Arc::new(Collective::bind(HOST).unwrap());
    let mut members = addresses(std::slice::from_ref(&collective));
    members.push(PeerAddress {
        name: "impostor".into(),
        address: "127.0.0.1:1".into(),
    });
    collective.enter(Membership {
        run_id: RUN_ID,
        generation: 1,
        rank: 0,
        members,
        silence: SILENCE,
    });
    let mut stream = TcpStream::connect((HOST, collective.port())).unwrap();
    let hello = Hello {
        run_id: RUN_ID,
        generation: 1,
        from: 1,
        to: 0,
    };
    stream.write_all(&hello.encode()).unwrap();
    stream.write_all(&bytes).unwrap();
    let shares = deal(1, 2, 1000, &mut CounterRng::new(3, &[]));
    let message = exchange(&[collective], 1, &shares, 2, false).remove(0);
    message.unwrap_err().to_string()
}

#[test]
fn hostile_frames_are_refused() {
    let mut huge = FrameHeader::of(FrameKind::Start, 0, &[]);
    huge.length = u32::MAX;
    let mut damaged = FrameHeader::of(FrameKind::Start, 0, &[0; 40])
        .encode()
        .to_vec();
    damaged.extend([1; 40]);
    let mut other_step = vec![0; 40];
    other_step[0] = 9;
    let mut wrong_start = FrameHeader::of(FrameKind::Start, 0, &other_step)
        .encode()
        .to_vec();
    wrong_start.extend(other_step);
    for (bytes, expected) in [
        (huge.encode().to_vec(), "more than"),
        (
            FrameHeader::of(FrameKind::Part, 0, &[]).encode().to_vec(),
            "was due",
        ),
        (vec![0xff; 24], "was due"),
        (damaged, "damaged"),
        (wrong_start, "differs in step: 9 there, 3 here"),
    ] {
        let message = exchange_with_impostor(bytes);
        assert!(
            message.contains("impostor (rank 1)") && message.contains(expected),
            "{message}"
        );
    }
}

fn frame(kind: FrameKind, index: usize, payload: &[u8]) -> Vec<u8> {
    let header = FrameHeader::of(kind, index, payload).encode();
    [&header, payload].concat()
}

#[test]
fn hostile_parts_are_refused() {
    // Step, scalars, invalid ones, exact sums, slots; none held.
    let words = [3u64, 1000, 0, 1, 2].map(u64::to_le_bytes);
    let start = frame(FrameKind::Start, 0, &words.concat());
    // Of 500 scalars in four groups, a byte each.
    let part = [vec![1; 4], vec![7; 500]].concat();
    let means = [0; 2000];
    let due = |index| frame(FrameKind::Part, index, &part);
    let finished = |index, bytes| frame(FrameKind::Finished, index, &means[..bytes]);
    let mut damaged = due(0);
    *damaged.last_mut().unwrap() ^= 1;
    for (frames, expected) in [
        (damaged, "damaged"),
        (due(1), "was due"),
        (due(0).repeat(2), "was due"),
        (finished(1, 2000), "was due"),
        (finished(0, 2000).repeat(2), "was due"),
        (finished(0, 1996), "1996 bytes where 2000 were due"),
        (frame(FrameKind::Part, 0, &part[..503]), "no sums"),
        (frame(FrameKind::Part, 0, &[]), "no sums"),
        (frame(FrameKind::Part, 0, &[9; 4504]), "no sums"),
        (frame(FrameKind::Part, 0, &[8; 1 << 20]), "more than"),
    ] {
        let message = exchange_with_impostor([&start[..], &frames].concat());
        assert!(
            message.contains("impostor (rank 1)") && message.contains(expected),
            "{message}"
        );
    }
}
