//! What files and folders in `output_dir` are called.

/// Folder in `output_dir` for what this job needs while it runs: packed data, the journal, the lock.
pub const WORK_FOLDER: &str = ".muster";
/// In the work folder: what of the run was pushed to the hub.
pub const PUSHED: &str = "pushed.json";
pub const RUN: &str = "run.json";
pub const METRICS: &str = "metrics.jsonl";
pub const TRAINER_STATE: &str = "trainer_state.json";
