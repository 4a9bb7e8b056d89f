//! The life of a worker ([`join()`](join::join)): one session after the other ([`worker_session`]), of which everything that
//! decides what is computed comes in over one [`stream`], in order.

mod context;
pub(crate) mod exchange_address;
pub mod join;
pub mod stream;
mod waits;
pub(crate) mod worker_session;
