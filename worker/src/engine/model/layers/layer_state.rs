//! What a layer knows of the tokens of a text that goes on.

use super::gated_delta_net::DeltaState;

/// What a layer knows of the tokens of a text.
#[derive(Default)]
pub struct LayerState<E> {
    /// Of attention, `[tokens][2 * key_value_heads * head_dim]`; of a layer that has those of another none.
    pub keys_values: Vec<E>,
    pub linear: DeltaState<E>,
}
