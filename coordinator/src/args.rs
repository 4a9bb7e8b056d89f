//! Command line of the coordinator.
