//! The state of a trainer.
