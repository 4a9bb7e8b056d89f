//! The driver: one task owns the cluster and carries out its commands.
