//! Names, shapes and order of the trainable tensors.
