//! One run from a prepared job to its result: where it begins ([`resume`]), training ([`train`]) with the workers of this process
//! ([`local_workers`]), signals on the way, the test prompts, and workers that nobody told of the end ([`notify_finished`]).

#[cfg(feature = "single-node")]
pub mod local_workers;
pub mod notify_finished;
pub mod push;
pub mod resume;
pub mod signals;
pub mod test_prompts;
pub mod train;
