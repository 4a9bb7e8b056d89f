//! File lists with digests.
