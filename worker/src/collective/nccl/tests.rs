//! Ranks of one process over the emulator's stand-in for NCCL: the bits of the mesh and of one worker, and an end to whatever
//! hangs. NCCL itself refuses two ranks on one GPU, so where there is a real one these are skipped.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{CString, c_char};
use std::net::{IpAddr, Ipv4Addr};
use std::ptr;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use common::exact::dequantize;
use common::job::{JobSpec, Method, Reduction, TargetModules};
use common::rng::CounterRng;

use super::reduce::{exact_mean, exact_mean_in, fast_mean};
use super::*;
use crate::ComputeDevice;
use crate::collective::{
    Collective, CollectiveError, Contribution, LocalSums, Membership, PeerAddress,
};
use crate::engine::MeanGradient;
use crate::engine::accumulator;
use crate::engine::cuda::testing::open;
use crate::engine::testing::{block, config, job, load_on, lora, write_model};

const GENERATION: u64 = 1;
const LONG_TIMEOUTS: NcclTimeouts = NcclTimeouts {
    forming: Duration::from_secs(60),
    call: Duration::from_secs(60),
};
const SHORT: Duration = Duration::from_millis(300);

/// A GPU of each rank's own, as far as the stand-ins can tell. None where there are none.
fn gpus(size: usize) -> Option<Vec<Arc<Gpu>>> {
    let gpus: Option<Vec<_>> = (0..size).map(|_| open().map(Arc::new)).collect();
    let gpus = gpus?;
    let is_emulated = gpus.iter().all(|gpu| gpu.name() == "emulated GPU");
    is_emulated.then_some(gpus)
}

struct Rank {
    gpu: Arc<Gpu>,
    collective: Collective,
    words: Mutex<mpsc::Receiver<NcclEvent>>,
}

impl Rank {
    fn group(&self) -> Arc<Group> {
        self.collective.group(GENERATION).unwrap()
    }

    /// What the coordinator would be told next.
    fn told(&self) -> Option<NcclEvent> {
        self.words
            .lock()
            .unwrap()
            .recv_timeout(LONG_TIMEOUTS.call)
            .ok()
    }
}

/// Members of one generation, all but those `absent` with their groups on the way.
fn ranks(size: usize, timeouts: NcclTimeouts, absent: &[usize]) -> Option<Vec<Rank>> {
    let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let gpus = gpus(size)?;
    let collectives: Vec<_> = gpus
        .iter()
        .map(|_| Collective::bind(host).unwrap())
        .collect();
    let address = |collective: &Collective| PeerAddress {
        name: "a member".to_owned(),
        address: format!("127.0.0.1:{}", collective.port()),
    };
    let members: Vec<_> = collectives.iter().map(address).collect();
    let mut ranks = Vec::new();
    for (rank, (collective, gpu)) in collectives.into_iter().zip(gpus).enumerate() {
        let membership = Membership {
            run_id: [1; 32],
            generation: GENERATION,
            rank: rank as u32,
            members: members.clone(),
            silence: Duration::from_secs(20),
        };
        let (tell, words) = mpsc::channel();
        collective.enter(membership.clone());
        if !absent.contains(&rank) {
            collective.group_up(&membership, gpu.clone(), timeouts, move |word| {
                tell.send(word).unwrap_or_default();
            });
        }
        ranks.push(Rank {
            gpu,
            collective,
            words: Mutex::new(words),
        });
    }
    if !absent.contains(&0) {
        // The coordinator's part.
        let Some(NcclEvent::IdCreated(id)) = ranks[0].told() else {
            panic!("NCCL has no identifier");
        };
        for (rank, member) in ranks.iter().enumerate() {
            if !absent.contains(&rank) {
                member.group().identify(&id);
            }
        }
    }
    Some(ranks)
}

fn on_each<R: Send>(ranks: &[Rank], work: impl Fn(usize, &Rank) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads = ranks.iter().enumerate();
        let threads: Vec<_> = threads
            .map(|(rank, member)| scope.spawn(move || work(rank, member)))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Of all magnitudes; sums of them leave the range and come back.
fn random_sums(scalars: usize, rank: usize) -> Vec<i64> {
    let mut rng = CounterRng::new(3, &[rank as u64]);
    let random = |_| (rng.below(u64::MAX) as i64) >> rng.below(60);
    (0..scalars).map(random).collect()
}

#[test]
fn exact_sums_are_those_of_integers_in_buckets_of_any_size() {
    for size in [2, 3] {
        let Some(ranks) = ranks(size, LONG_TIMEOUTS, &[]) else {
            return;
        };
        for scalars in [1, 2, 5, 255, 256, 1000, 4099] {
            let expected: Vec<f32> = (0..size)
                .map(|rank| random_sums(scalars, rank))
                .reduce(|a, b| a.iter().zip(b).map(|(a, b)| a.wrapping_add(b)).collect())
                .unwrap()
                .into_iter()
                .map(dequantize)
                .collect();
            for bucket in [1, 256, 1 << 20] {
                if scalars / bucket > 300 {
                    continue;
                }
                let means = on_each(&ranks, |rank, member| {
                    let sums = random_sums(scalars, rank);
                    let before = member.gpu.upload(&sums).unwrap();
                    let (gpu, group) = (&member.gpu, &member.group());
                    let mean = exact_mean_in(bucket, gpu, group, &before, scalars).unwrap();
                    assert!(
                        gpu.download(&before, scalars).unwrap() == sums,
                        "they are kept"
                    );
                    gpu.download(&mean, scalars).unwrap()
                });
                for mean in means {
                    assert!(mean == expected, "{size} ranks, {scalars} in {bucket}");
                }
            }
        }
    }
}

/// What was called on a GPU's streams, in order, and after which of those calls each one begins.
fn calls(gpu: &Gpu, history: &str) -> Vec<(String, BTreeSet<usize>)> {
    let streams = [gpu.stream(), gpu.exchange_stream()];
    let streams = streams.map(|stream| format!("{:?}", stream.cu_stream()));
    let (mut calls, mut known) = (Vec::new(), HashMap::<&str, BTreeSet<usize>>::new());
    for line in history.lines() {
        let [stream, verb, what] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        if !streams.iter().any(|ours| ours == stream) {
            continue;
        }
        let before = known.get(stream).cloned().unwrap_or_default();
        match verb {
            "call" => {
                known.entry(stream).or_default().insert(calls.len());
                calls.push((what.to_owned(), before));
            }
            "record" => drop(known.insert(what, before)),
            _ => {
                let earlier = known.get(what).cloned().unwrap_or_default();
                known.entry(stream).or_default().extend(earlier);
            }
        }
    }
    calls
}

#[test]
fn a_bucket_is_summed_while_the_means_of_the_one_before_are_computed() {
    let Some(ranks) = ranks(2, LONG_TIMEOUTS, &[]) else {
        return;
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = CString::new(file.path().to_str().unwrap()).unwrap();
    // SAFETY: the stand-in for the driver is loaded, and its function has this type.
    let (driver, note) = unsafe {
        let driver = libloading::Library::new("libcuda.so.1").unwrap();
        let note = driver.get::<unsafe extern "C" fn(*const c_char)>(b"emulated_history");
        let note = *note.unwrap();
        note(path.as_ptr());
        (driver, note)
    };
    on_each(&ranks, |rank, member| {
        let sums = member.gpu.upload(&random_sums(4096, rank)).unwrap();
        exact_mean_in(1024, &member.gpu, &member.group(), &sums, 4096).unwrap();
    });
    // SAFETY: as above.
    unsafe { note(ptr::null()) };
    drop(driver);
    let history = std::fs::read_to_string(file.path()).unwrap();
    for rank in &ranks {
        let calls = calls(&rank.gpu, &history);
        let of = |name: &str| -> Vec<usize> {
            let found = calls.iter().enumerate();
            let found = found.filter(|(_, (called, _))| called == name);
            found.map(|(index, _)| index).collect()
        };
        let (sums, means, gathered) = (of("ReduceScatter"), of("exact_means"), of("AllGather"));
        assert_eq!([sums.len(), means.len(), gathered.len()], [4; 3]);
        let is_after = |later: usize, earlier: usize| calls[later].1.contains(&earlier);
        for bucket in 0..4 {
            assert!(is_after(means[bucket], sums[bucket]));
            assert!(is_after(gathered[bucket], means[bucket]));
            if let Some(next) = sums.get(bucket + 1) {
                let either = is_after(*next, means[bucket]) || is_after(means[bucket], *next);
                assert!(!either, "bucket {bucket}");
            }
            // Which takes its memory.
            if let Some(next) = sums.get(bucket + 2) {
                assert!(is_after(*next, means[bucket]));
            }
        }
    }
}

#[test]
fn fast_sums_are_added() {
    let Some(ranks) = ranks(2, LONG_TIMEOUTS, &[]) else {
        return;
    };
    let means = on_each(&ranks, |rank, member| {
        let sums = member.gpu.upload(&[0.5 + rank as f32, -1.0]).unwrap();
        let mean = fast_mean(&member.gpu, &member.group(), &sums, 2).unwrap();
        member.gpu.download(&mean, 2).unwrap()
    });
    assert_eq!(means, [[2.0, -2.0], [2.0, -2.0]]);
}

/// Two steps of four slots, dealt out to all members. Gives back each one's digest, and the mean gradient of the last step over
/// NCCL and over the mesh.
fn train(
    ranks: &[Rank],
    dir: &std::path::Path,
    job: &JobSpec,
) -> Vec<(String, Vec<f32>, Vec<f32>)> {
    on_each(ranks, |rank, member| {
        let device = ComputeDevice::Cuda {
            ordinal: 0,
            gpu: member.gpu.clone(),
        };
        let mut trainer = load_on(device, dir, job.clone(), 1);
        let (mut over_nccl, mut over_mesh) = (Vec::new(), Vec::new());
        for step in 0..2 {
            let blocks = [[20, 17], [40, 3], [9, 30], [8, 8]];
            let blocks = blocks.map(|lengths| block(&lengths, step + lengths[0] as u64));
            let tokens = blocks.iter().map(|block| block.trained_tokens()).sum();
            trainer.begin_step(step, tokens, blocks.len()).unwrap();
            for (slot, block) in blocks.iter().enumerate() {
                if slot % ranks.len() == rank {
                    let block = std::slice::from_ref(block);
                    trainer.train_slot(slot as u32, block).unwrap();
                }
            }
            if ranks.len() == 1 {
                trainer.apply_held(1e-2).unwrap();
                continue;
            }
            let mesh = member.collective.mesh(GENERATION).unwrap();
            trainer.collect().unwrap();
            let accumulator::Sums::Exact { sums, .. } = trainer.accumulator().sums() else {
                panic!("the job's sums are exact");
            };
            let sums = LocalSums::Packed(sums);
            let contribution = Contribution {
                step,
                slots: 4,
                held: trainer.held(),
                sums,
                invalid: 0,
            };
            over_mesh = mesh.all_reduce(&contribution).unwrap().mean.values;
            let scalars = trainer.layout().scalars;
            let (slots, invalid) = mesh.agree(&contribution, scalars).unwrap();
            assert_eq!((slots.len(), invalid), (4, 0));
            let mean = all_reduce(&member.group(), &trainer.sums_on_gpu()).unwrap();
            over_nccl = trainer.download_mean(&mean).unwrap();
            let reduced = MeanGradient {
                values: over_mesh.clone(),
                invalid,
            };
            match step {
                0 => trainer.apply(&reduced, 1e-2).unwrap(),
                _ => trainer.apply_on_gpu(&mean, invalid, 1e-2).unwrap(),
            };
        }
        (trainer.weights_digest().unwrap(), over_nccl, over_mesh)
    })
}

#[test]
fn any_number_of_ranks_gives_the_bits_of_the_mesh_and_of_one() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &config("Qwen3ForCausalLM"), 7);
    for method in [Method::Full, lora(TargetModules::AllLinear, 0.1)] {
        let job = JobSpec {
            reduction: Reduction::Exact,
            ..job(method)
        };
        let mut digests = Vec::new();
        for size in 1..=3 {
            let Some(ranks) = ranks(size, LONG_TIMEOUTS, &[]) else {
                return;
            };
            for (digest, over_nccl, over_mesh) in train(&ranks, dir.path(), &job) {
                assert!(over_nccl == over_mesh, "{size} ranks");
                assert_eq!(over_nccl.iter().any(|mean| *mean != 0.0), size > 1);
                digests.push(digest);
            }
        }
        assert!(digests.iter().all(|digest| *digest == digests[0]));
    }
}

/// Sums that the other rank never brings.
fn reduce_alone(rank: &Rank) -> NcclError {
    let sums = rank.gpu.upload(&[1i64, 2, 3, 4]).unwrap();
    let reduced = exact_mean(&rank.gpu, &rank.group(), &sums, 4);
    let error = reduced.map(drop).unwrap_err();
    assert_eq!(rank.gpu.download(&sums, 4).unwrap(), [1, 2, 3, 4]);
    error
}

#[test]
fn the_end_of_the_generation_aborts_a_call_that_hangs() {
    let Some(ranks) = ranks(2, LONG_TIMEOUTS, &[]) else {
        return;
    };
    std::thread::scope(|scope| {
        let hanging = scope.spawn(|| (reduce_alone(&ranks[0]), Instant::now()));
        std::thread::sleep(SHORT);
        assert!(!hanging.is_finished());
        let closed = Instant::now();
        ranks[0].collective.close();
        let (error, ended) = hanging.join().unwrap();
        let is_over = matches!(error, NcclError::Collective(CollectiveError::Superseded));
        assert!(is_over, "{error}");
        assert!(ended - closed < Duration::from_secs(5));
    });
    assert!(ranks[0].words.lock().unwrap().try_recv().is_err());
}

#[test]
fn a_call_that_hangs_is_told_at_its_deadline() {
    let timeouts = NcclTimeouts {
        call: SHORT,
        ..LONG_TIMEOUTS
    };
    let Some(ranks) = ranks(2, timeouts, &[]) else {
        return;
    };
    reduce_alone(&ranks[0]);
    let Some(NcclEvent::Failed(reason)) = ranks[0].told() else {
        panic!("it is not told");
    };
    assert!(reason.contains("did not end within 0.3 s"), "{reason}");
}

#[test]
fn a_communicator_that_does_not_form_is_told_at_its_deadline() {
    let timeouts = NcclTimeouts {
        forming: SHORT,
        ..LONG_TIMEOUTS
    };
    let Some(ranks) = ranks(2, timeouts, &[1]) else {
        return;
    };
    let Some(NcclEvent::Failed(reason)) = ranks[0].told() else {
        panic!("it is not told");
    };
    assert!(reason.contains("forming"), "{reason}");
    // Whoever comes then is not left waiting.
    let is_over = matches!(
        reduce_alone(&ranks[0]),
        NcclError::Collective(CollectiveError::Superseded)
    );
    assert!(is_over);
}

#[test]
fn an_identifier_that_never_comes_is_told() {
    let timeouts = NcclTimeouts {
        forming: SHORT,
        ..LONG_TIMEOUTS
    };
    let Some(ranks) = ranks(2, timeouts, &[0]) else {
        return;
    };
    let reason = "rank 0 sent no identifier in time".to_owned();
    assert_eq!(ranks[1].told(), Some(NcclEvent::Failed(reason)));
}
