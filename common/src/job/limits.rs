//! The largest numbers that a job may name: far beyond what anybody uses, and safe to multiply.

/// Tokens of a block.
pub(super) const MAX_SEQUENCE_LEN: usize = 1 << 20;
/// Blocks of a step.
pub(super) const MAX_BATCH: usize = 1 << 20;
/// Blocks of a slot.
pub(super) const MAX_MICRO_BATCH: usize = 4096;
/// Slots of a step: who outlives a coordinator tells the next one of all of them in one message.
pub(super) const MAX_SLOTS: usize = 64 << 10;
pub(super) const MAX_STEPS: u64 = 1_000_000_000;
pub(super) const MAX_EPOCHS: f64 = 1e5;
/// Bytes of a chat template that a job brings: the job travels to every worker in one message.
pub(super) const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// Variables that a job gives the chat template.
pub(super) const MAX_TEMPLATE_VARIABLES: usize = 100;
/// Rank of an adapter.
pub(super) const MAX_RANK: usize = 4096;
/// Most rows of an embedding.
pub(super) const MAX_VOCABULARY: usize = 1 << 24;
