//! The one thread that calls NCCL for a communicator, from its making to its end.
//!
//! In: tasks of the engine, one at a time, and the generation's token. Out: an answer to each. NCCL works without blocking:
//! every call is begun and then asked after, so that a deadline or the end of the generation aborts whatever it is at. What
//! was aborted no longer touches the engine's memory when the answer is given.

use std::collections::VecDeque;
use std::ffi::c_int;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use cudarc::driver::CudaEvent;

use super::library::{Call, Comm, IN_PROGRESS, Nccl, SUCCESS, UniqueId, nccl};
use super::options::{GroupOptions, NcclEvent, Task, Work};
use crate::collective::CollectiveError;
use crate::collective::generation_token::{GENERATION_CHECK_INTERVAL, GenerationToken};
use crate::engine::cuda::Gpu;

/// Buckets on the stream at a time: the next ones are begun while the first is on its way.
const BUCKETS_AHEAD: usize = 2;
/// Longest pause between two looks at a call in progress.
const LONGEST_CALL_POLL: Duration = Duration::from_millis(1);
const SHORTEST_CALL_POLL: Duration = Duration::from_micros(10);

/// Why the communicator ends.
enum End {
    /// The generation is over.
    Over,
    Failed(String),
}

/// The thread that forms a communicator and makes every call to NCCL for it.
pub struct Owner {
    nccl: &'static Nccl,
    comm: Comm,
    gpu: Arc<Gpu>,
    token: Arc<GenerationToken>,
    /// How long each bucket may take.
    call_timeout: Duration,
    /// Events at the ends of the buckets on the stream, oldest first.
    ends: VecDeque<CudaEvent>,
}

impl Owner {
    /// Forms the communicator and carries out tasks until the generation ends or NCCL fails, and tells of that.
    pub fn live(options: GroupOptions, ids: &Receiver<UniqueId>, tasks: &Receiver<Task>) {
        let mut waiting = None;
        let end = Self::form(&options, ids).and_then(|mut owner| {
            loop {
                let task = match tasks.recv_timeout(GENERATION_CHECK_INTERVAL) {
                    Ok(task) => task,
                    Err(RecvTimeoutError::Timeout) if owner.token.check().is_ok() => continue,
                    Err(_) => return Err(End::Over),
                };
                match owner.carry_out(&task.work) {
                    // Where nobody waits any more, the generation is over.
                    Ok(()) => drop(task.answer.send(Ok(()))),
                    Err(end) => {
                        // Once the communicator is aborted, see below.
                        waiting = Some(task.answer);
                        return Err(end);
                    }
                }
            }
        });
        let end: Result<(), End> = end;
        if let Err(End::Failed(reason)) = end
            && options.token.check().is_ok()
        {
            tracing::warn!("NCCL failed: {reason}");
            (options.tell)(NcclEvent::Failed(reason));
        }
        if let Some(waiting) = waiting {
            let _ = waiting.send(Err(CollectiveError::Superseded));
        }
    }

    fn form(options: &GroupOptions, ids: &Receiver<UniqueId>) -> Result<Self, End> {
        let nccl = nccl().map_err(|fault| End::Failed(fault.to_owned()))?;
        let bound = options.gpu.context().bind_to_thread();
        bound.map_err(|error| End::Failed(error.to_string()))?;
        let deadline = Instant::now() + options.timeouts.forming;
        if options.rank == 0 {
            let id = nccl.unique_id();
            let id = id.map_err(|code| End::Failed(nccl.explain(std::ptr::null_mut(), code)))?;
            (options.tell)(NcclEvent::IdCreated(id.0.to_vec()));
        }
        let id = loop {
            options.token.check().map_err(|_| End::Over)?;
            match ids.recv_timeout(GENERATION_CHECK_INTERVAL) {
                Ok(id) => break id,
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(End::Failed("rank 0 sent no identifier in time".to_owned()));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(End::Over),
            }
        };
        let (comm, code) = nccl.init(options.size, id, options.rank);
        let owner = Self {
            nccl,
            comm,
            gpu: options.gpu.clone(),
            token: options.token.clone(),
            call_timeout: options.timeouts.call,
            ends: VecDeque::new(),
        };
        let left = deadline.saturating_duration_since(Instant::now());
        owner.settle(code, left, "the forming of the communicator")?;
        tracing::debug!(
            "NCCL connects {} GPUs, this one as rank {}",
            options.size,
            options.rank
        );
        Ok(owner)
    }

    fn carry_out(&mut self, work: &Work) -> Result<(), End> {
        self.token.check().map_err(|_| End::Over)?;
        match work {
            Work::Begin(call) => self.begin(call),
            Work::Pace => {
                let end = self.gpu.mark(self.gpu.exchange_stream());
                self.ends
                    .push_back(end.map_err(|error| End::Failed(error.to_string()))?);
                self.await_all_but(BUCKETS_AHEAD)
            }
            Work::Finish => self.await_all_but(0),
        }
    }

    fn begin(&self, call: &Call) -> Result<(), End> {
        let stream = self.gpu.exchange_stream().cu_stream().cast();
        // SAFETY: the communicator is ours and not aborted. The engine waits for the answer with the memory in its hands, and
        // frees it in the order of its own stream, which goes on after the end of this one.
        let code = unsafe { self.nccl.begin(self.comm, stream, call) };
        self.settle(code, self.call_timeout, "a call")
    }

    /// Waits until the call that answered `code` is done or failed.
    fn settle(&self, code: c_int, timeout: Duration, what: &str) -> Result<(), End> {
        if code != IN_PROGRESS && code != SUCCESS {
            return Err(self.failure(what, code));
        }
        if self.comm.is_null() {
            return Err(End::Failed(format!("{what} gave none")));
        }
        self.wait(timeout, what, || match self.state() {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            code => Err(self.failure(what, code)),
        })
    }

    /// Waits for the oldest buckets on the stream, until so many are `left`.
    fn await_all_but(&mut self, left: usize) -> Result<(), End> {
        while self.ends.len() > left
            && let Some(end) = self.ends.pop_front()
        {
            let what = "an exchange";
            self.wait(self.call_timeout, what, || match self.state() {
                SUCCESS | IN_PROGRESS => Ok(end.is_complete()),
                code => Err(self.failure(what, code)),
            })?;
        }
        Ok(())
    }

    fn state(&self) -> c_int {
        // SAFETY: the communicator is ours, not null and not aborted.
        unsafe { self.nccl.async_error(self.comm) }
    }

    fn wait(
        &self,
        timeout: Duration,
        what: &str,
        mut is_done: impl FnMut() -> Result<bool, End>,
    ) -> Result<(), End> {
        let began = Instant::now();
        while !is_done()? {
            self.token.check().map_err(|_| End::Over)?;
            let waited = began.elapsed();
            if waited > timeout {
                let seconds = timeout.as_secs_f64();
                return Err(End::Failed(format!(
                    "{what} did not end within {seconds:.1} s"
                )));
            }
            std::thread::sleep((waited / 8).clamp(SHORTEST_CALL_POLL, LONGEST_CALL_POLL));
        }
        Ok(())
    }

    fn failure(&self, what: &str, code: c_int) -> End {
        let meaning = self.nccl.explain(self.comm, code);
        End::Failed(format!("{what} failed: {meaning}"))
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if !self.comm.is_null() {
            // SAFETY: the last use of the communicator.
            unsafe { self.nccl.abort(self.comm) };
        }
        // What was aborted may take a moment to leave the GPU; the engine's memory is free for others only then.
        self.gpu.follow_exchange();
    }
}
