//! The parts of the cluster's state. Each owns its fields and keeps what must hold between them; none knows of
//! [`super::Cluster`] or of another part's inside.

pub mod best_weights;
pub mod checkpoint_interval;
pub mod evaluation;
pub mod failure_detector;
pub mod feeds;
pub mod generation;
pub mod ledger;
pub mod membership;
pub mod pending_commit;
pub mod probing;
pub mod progress;
pub mod queue;
pub mod reachability;
pub mod rejoin_window;
pub mod reply_deadlines;
pub mod saving;
pub mod slot_eta;
pub mod step_stats;
pub mod term;
pub mod transport;
