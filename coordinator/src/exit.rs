//! What the process says when it ends: its exit codes.

/// The job is done, or the check found nothing wrong.
pub const DONE: u8 = 0;
/// The job failed, or could not begin because of something that passes: the port or the output folder is in use.
pub const JOB_FAILED: u8 = 1;
/// The command line or the job file is wrong.
pub const USAGE: u8 = 2;
/// The job is well written, but model, data or machine do not allow it.
pub const PREFLIGHT: u8 = 3;
/// Stopped (SIGTERM, a closed terminal, no room for the result); the same command goes on from the last checkpoint.
pub const RESUMABLE: u8 = 75;
/// Ctrl-C, after a checkpoint was saved.
pub const INTERRUPTED: u8 = 130;
