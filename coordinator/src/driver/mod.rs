//! The task that owns the cluster ([`control_loop`]), what workers may fetch and were asked to bring ([`transfers`]), who sends a file
//! to whom ([`sharing`]), and a state on its way in ([`uploads`]).

pub mod control_loop;
pub mod sharing;
pub mod transfers;
pub mod uploads;

pub use control_loop::{Driver, Input, Outgoing, StopRequest, WelcomeTemplate};
