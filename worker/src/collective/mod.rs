//! The exchange of gradients between workers.
