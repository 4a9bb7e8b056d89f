//! State on its way to the coordinator.
