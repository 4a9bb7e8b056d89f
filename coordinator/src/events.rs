//! What a run tells its observers: the terminal and the metrics files.
