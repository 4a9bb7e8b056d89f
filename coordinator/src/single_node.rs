//! `--single-node`: coordinator and workers in one process.
