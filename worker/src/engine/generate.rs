//! Text from a model.
