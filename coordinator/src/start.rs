//! `coordinator start`.
