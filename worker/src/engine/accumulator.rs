//! Slot gradients on their way to the exact sum.
