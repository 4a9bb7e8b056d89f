//! What each layer of a model sees, and how it rotates: by its family and its `config.json`.

use serde_json::Value;

use super::family::{Family, Windows};
use crate::files::model::Architecture;

/// How a layer turns queries and keys by their positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    Usual,
    /// By the frequencies of layers with a window, where these have their own.
    Local,
    /// Not at all.
    None,
}

/// What differs from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerKind {
    /// Tokens that a query sees, itself among them, where that is limited.
    pub window: Option<usize>,
    pub rotation: Rotation,
}

/// What each layer of a model sees and how it rotates. `has_local` says whether layers with a window have frequencies of their own.
pub(super) fn layer_kinds(
    json: &Value,
    architecture: Architecture,
    layers: usize,
    has_local: bool,
) -> Vec<LayerKind> {
    let family = Family::of(architecture);
    let size = |key: &str| json[key].as_u64().map(|size| size as usize);
    let is_asked = json["use_sliding_window"].as_bool() == Some(true);
    let window = match (family.windows, &json["sliding_window"]) {
        (Windows::AllAsked | Windows::EveryOtherAsked, _) if !is_asked => None,
        (Windows::Never | Windows::Asked | Windows::AllWhereGiven, value) => {
            let size = value.as_u64().filter(|size| *size > 0);
            size.map(|size| size as usize)
        }
        // Null means none, and a key that is not there the family's own.
        (_, Value::Null) if json.get("sliding_window").is_some() => None,
        (_, value) => {
            let size = value.as_u64().map(|size| size as usize);
            Some(size.unwrap_or(family.default_window))
        }
    };
    let types = json["layer_types"].as_array();
    let is_limited = |layer: usize| {
        let said = types.and_then(|types| types.get(layer)?.as_str());
        let by_type = said.map(|kind| kind == "sliding_attention");
        match family.windows {
            Windows::Never => false,
            Windows::All => by_type.unwrap_or(true),
            Windows::AllWhereGiven | Windows::AllAsked => true,
            Windows::EveryOtherAsked => by_type.unwrap_or_else(|| {
                layer.is_multiple_of(2) && layer < size("max_window_layers").unwrap_or(28)
            }),
            Windows::Asked => by_type.unwrap_or_else(|| {
                is_asked
                    && layer >= size("max_window_layers").unwrap_or(0)
                    // SmolLM3 has windows on layers without positions alone.
                    && (architecture != Architecture::SmolLm3
                        || !is_rotated(json, architecture, layer))
            }),
            Windows::AllBut { every } => by_type.unwrap_or_else(|| {
                let every = size("sliding_window_pattern").unwrap_or(every).max(1);
                !(layer + 1).is_multiple_of(every)
            }),
            Windows::AllButSixthAndLast => {
                by_type.unwrap_or_else(|| !(layer + 1).is_multiple_of(6) && layer + 1 < layers)
            }
        }
    };
    (0..layers)
        .map(|layer| {
            let is_limited = is_limited(layer);
            LayerKind {
                window: window.filter(|_| is_limited),
                rotation: match (
                    is_rotated(json, architecture, layer),
                    has_local && is_limited,
                ) {
                    (false, _) => Rotation::None,
                    (true, true) => Rotation::Local,
                    (true, false) => Rotation::Usual,
                },
            }
        })
        .collect()
}

/// SmolLM3 leaves every fourth layer without positions, unless its list says which.
fn is_rotated(json: &Value, architecture: Architecture, layer: usize) -> bool {
    if architecture != Architecture::SmolLm3 {
        return true;
    }
    match json["no_rope_layers"].as_array() {
        // One is a layer with positions.
        Some(list) => list.get(layer).and_then(Value::as_u64) != Some(0),
        None => {
            let every = json["no_rope_layer_interval"].as_u64().unwrap_or(4).max(1);
            !(layer as u64 + 1).is_multiple_of(every)
        }
    }
}
