//! The exchange of gradients and state between the workers of a generation, over TCP; of gradients over NCCL where all are
//! on GPUs.
//!
//! In: a [`Membership`], then each worker's own accumulator ([`Contribution`]). Out: the same mean gradient on every
//! worker ([`AllReduced`]), or an error that names the peer at fault. An accumulator is only ever read here, so a failed
//! exchange is repeated in the next generation without computing anything again.
//!
//! [`Collective`] is what the step uses. [`listener`] and [`tcp`] form the mesh, [`greeting`] how they begin, [`frame`] is the encoding
//! ([`sum_codec`] that of sums), [`all_reduce`] the sum, and [`exchange`] how it is made (of [`reduce_input`], exact or fast, cut
//! into [`piece`]s), [`probe`] tries beforehand who can be reached, [`state`] the transfer of weights and optimizer state to a
//! member that is behind, [`feed`] the same to a newcomer while the members go on, and [`files`] that of the model's files. `nccl` (feature `cuda`) sums what GPUs
//! hold, beside the mesh.

mod all_reduce;
mod buffers;
mod contribution;
mod error;
mod exchange;
pub mod feed;
pub mod files;
pub mod frame;
pub mod generation_token;
pub mod greeting;
mod link;
pub mod listener;
mod lock;
mod membership;
#[cfg(feature = "cuda")]
pub mod nccl;
mod piece;
pub mod probe;
mod reduce_input;
mod start;
pub mod state;
mod state_transfer;
mod sum_codec;
pub mod tcp;

use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use proto::v1;

pub use self::contribution::{AllReduced, Contribution, LocalSums};
pub use self::error::CollectiveError;
use self::feed::{FeedLimits, Feeds};
use self::files::SharedFiles;
use self::generation_token::{GENERATION_CHECK_INTERVAL, GenerationToken};
use self::listener::Listener;
use self::lock::lock;
pub use self::membership::{Membership, PeerAddress};
use self::tcp::Mesh;
use crate::engine::device::ComputeDevice;

/// What the coordinator must know of a GPU to choose how gradients are exchanged; None for a processor.
pub fn introduce(device: &ComputeDevice) -> Option<v1::Gpu> {
    match device {
        ComputeDevice::Cpu => None,
        #[cfg(feature = "cuda")]
        ComputeDevice::Cuda { gpu, .. } => Some(nccl::introduce(gpu)),
    }
}

/// This worker's end of the exchange: one listener for its whole life, one mesh per generation.
pub struct Collective {
    listener: Arc<Listener>,
    feeds: Arc<Feeds>,
    files: Arc<SharedFiles>,
    current: Mutex<Option<Arc<Forming>>>,
}

/// A mesh that is being connected, or is.
struct Forming {
    generation: u64,
    token: Arc<GenerationToken>,
    result: Mutex<Option<Result<Arc<Mesh>, CollectiveError>>>,
    changed: Condvar,
    /// The NCCL group, where gradients are exchanged over NCCL.
    #[cfg(feature = "cuda")]
    group: std::sync::OnceLock<Arc<nccl::Group>>,
}

impl Collective {
    /// Listens on a free port of `host`.
    pub fn bind(host: IpAddr) -> Result<Self, CollectiveError> {
        Self::bind_at(host, 0)
    }

    /// Listens on this port of `host`; on a free one where it is 0.
    pub fn bind_at(host: IpAddr, port: u16) -> Result<Self, CollectiveError> {
        Self::bind_to(host, port, FeedLimits::default())
    }

    pub fn bind_with(host: IpAddr, feed_limits: FeedLimits) -> Result<Self, CollectiveError> {
        Self::bind_to(host, 0, feed_limits)
    }

    fn bind_to(host: IpAddr, port: u16, feed_limits: FeedLimits) -> Result<Self, CollectiveError> {
        let feeds = Arc::new(Feeds::new(feed_limits));
        let files = Arc::<SharedFiles>::default();
        let listener = Listener::bind(host, port, feeds.clone(), files.clone())?;
        Ok(Self {
            listener: Arc::new(listener),
            feeds,
            files,
            current: Mutex::new(None),
        })
    }

    /// The feeds by which newcomers follow this worker.
    pub fn feeds(&self) -> &Arc<Feeds> {
        &self.feeds
    }

    /// The files that this worker passes on to others.
    pub fn shared_files(&self) -> &Arc<SharedFiles> {
        &self.files
    }

    pub fn port(&self) -> u16 {
        self.listener.port()
    }

    /// Sets the run and the number with which this worker answers the probes of others.
    pub fn identify(&self, run_id: [u8; 32], worker: u64) {
        self.listener.identify(run_id, worker);
    }

    /// Enters a generation: ends the one before at once, whatever it is waiting for, and starts to connect the new one in the
    /// background.
    pub fn enter(&self, membership: Membership) {
        let forming = Arc::new(Forming {
            generation: membership.generation,
            token: Arc::new(GenerationToken::default()),
            result: Mutex::new(None),
            changed: Condvar::new(),
            #[cfg(feature = "cuda")]
            group: std::sync::OnceLock::new(),
        });
        if let Some(previous) = lock(&self.current).replace(forming.clone()) {
            previous.token.close();
        }
        // Here and not on the thread, so that it happens in the order of the generations.
        self.listener.begin(&membership);
        let listener = self.listener.clone();
        std::thread::spawn(move || {
            let token = forming.token.clone();
            let mesh = Mesh::form(&listener, &membership, token).map(Arc::new);
            *lock(&forming.result) = Some(mesh);
            forming.changed.notify_all();
        });
    }

    /// Waits for the mesh of `generation`, until all its members are connected.
    pub fn mesh(&self, generation: u64) -> Result<Arc<Mesh>, CollectiveError> {
        let forming = lock(&self.current)
            .clone()
            .filter(|forming| forming.generation == generation)
            .ok_or(CollectiveError::Superseded)?;
        // `Mesh::form` always comes to an end, but where the generation is over it is not waited for: it may be about to
        // connect, or to look up a name.
        let mut result = lock(&forming.result);
        loop {
            if let Some(result) = &*result {
                return result.clone();
            }
            forming.token.check()?;
            result = forming
                .changed
                .wait_timeout(result, GENERATION_CHECK_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Begins to form an NCCL group for the generation that was just entered. `tell` takes what the coordinator must know.
    #[cfg(feature = "cuda")]
    pub fn group_up(
        &self,
        membership: &Membership,
        gpu: Arc<crate::engine::cuda::Gpu>,
        timeouts: nccl::NcclTimeouts,
        tell: impl Fn(nccl::NcclEvent) + Send + 'static,
    ) {
        let forming = lock(&self.current).clone();
        let Some(forming) = forming.filter(|forming| forming.generation == membership.generation)
        else {
            return;
        };
        let options = nccl::GroupOptions {
            gpu,
            rank: membership.rank,
            size: membership.members.len(),
            token: forming.token.clone(),
            timeouts,
            tell: Box::new(tell),
        };
        forming
            .group
            .get_or_init(|| Arc::new(nccl::Group::form(options)));
    }

    /// The NCCL group of `generation`, which may still be forming. None where that exchanges over the mesh.
    #[cfg(feature = "cuda")]
    pub fn group(&self, generation: u64) -> Option<Arc<nccl::Group>> {
        let forming = lock(&self.current).clone()?;
        let is_current = forming.generation == generation;
        forming.group.get().filter(|_| is_current).cloned()
    }

    /// Ends the current generation at once.
    pub fn close(&self) {
        if let Some(previous) = lock(&self.current).take() {
            previous.token.close();
        }
    }
}

impl Drop for Collective {
    fn drop(&mut self) {
        self.close();
        self.feeds.close();
        self.files.close();
    }
}
