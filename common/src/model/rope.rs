//! Rotary positions of a model: their frequencies, and how a `config.json` says them in older and newer spelling.

use serde_json::Value;

use super::error::ModelError;
use super::fields::Fields;
use crate::files::model::Architecture;

/// Rotary position frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    /// Llama 3.1's: low frequencies are slowed down, high ones kept, those between blended.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_positions: f64,
    },
    /// YaRN (Peng et al., 2023): low frequencies are slowed down, high ones kept, those between blended by their place.
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_positions: f64,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
    },
}

impl Rope {
    /// Radians per position of each pair of so many dimensions, rounded to float32 where Transformers does.
    pub fn frequencies(&self, dimensions: usize) -> Vec<f32> {
        (0..dimensions / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f32 / dimensions as f32;
                let frequency = 1.0 / self.theta.powf(f64::from(exponent)) as f32;
                self.scaling
                    .apply(frequency, (pair, dimensions), self.theta)
            })
            .collect()
    }

    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        }
    }
}

impl RopeScaling {
    /// As `transformers/modeling_rope_utils.py`.
    fn apply(&self, frequency: f32, (pair, dimensions): (usize, usize), theta: f64) -> f32 {
        match *self {
            Self::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_positions,
                ..
            } => {
                // The pair that turns so many times over the original positions.
                let pair_of = |turns: f64| {
                    let positions = original_positions / (turns * 2.0 * std::f64::consts::PI);
                    dimensions as f64 * positions.ln() / (2.0 * theta.ln())
                };
                let low = pair_of(beta_fast).floor().max(0.0);
                let high = pair_of(beta_slow).ceil().min(dimensions as f64 - 1.0);
                let high = if high == low { high + 0.001 } else { high };
                let slowed = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                frequency / factor as f32 * slowed + frequency * (1.0 - slowed)
            }
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor as f32,
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            } => {
                let wavelength = 2.0 * std::f64::consts::PI / f64::from(frequency);
                if wavelength > original_positions / low_freq_factor {
                    frequency / factor as f32
                } else if wavelength < original_positions / high_freq_factor {
                    frequency
                } else {
                    let smooth = (original_positions / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    let frequency = f64::from(frequency);
                    ((1.0 - smooth) * frequency / factor + smooth * frequency) as f32
                }
            }
        }
    }
}

impl Fields<'_> {
    /// The frequencies of all layers, and those of layers with a window where these have their own: `rope_parameters` by type
    /// of layer, or in older spelling `rope_local_base_freq` (Gemma 3) beside `rope_theta` and `rope_scaling`, which are of the others.
    pub(super) fn ropes(&self, default_theta: f64) -> Result<(Rope, Option<Rope>), ModelError> {
        let local = |theta: f64| Rope {
            theta,
            scaling: RopeScaling::None,
        };
        let parameters = &self.json["rope_parameters"];
        let by_type = |kind: &str| Some(&parameters[kind]).filter(|found| found.is_object());
        if let Some(full) = by_type("full_attention") {
            let sliding = by_type("sliding_attention").unwrap_or(full);
            let own = |found: &Value| self.rope_of(found, default_theta);
            return Ok((own(full)?, Some(own(sliding)?)));
        }
        let older_local = match Architecture::of_config(self.path, self.json)? {
            Architecture::Gemma3 => Some(self.number("rope_local_base_freq").unwrap_or(1e4)),
            Architecture::Olmo3 => Some(500_000.0),
            _ => None,
        };
        if older_local.is_some() && parameters.is_object() {
            let reason = "rope_parameters must have full_attention and sliding_attention";
            return Err(self.bad(reason));
        }
        let scaling = match parameters {
            Value::Null => &self.json["rope_scaling"],
            parameters => parameters,
        };
        Ok((
            self.rope_of(scaling, default_theta)?,
            older_local.map(local),
        ))
    }

    /// Both layouts: `rope_theta` with `rope_scaling`, and Transformers 5's `rope_parameters`, which holds them all.
    fn rope_of(&self, scaling: &Value, default_theta: f64) -> Result<Rope, ModelError> {
        let theta = scaling["rope_theta"]
            .as_f64()
            .or(self.number("rope_theta"))
            .unwrap_or(default_theta);
        let kind = scaling["rope_type"]
            .as_str()
            .or(scaling["type"].as_str())
            .unwrap_or("default");
        let number = |key: &str| {
            scaling[key]
                .as_f64()
                .filter(|number| *number > 0.0)
                .ok_or_else(|| self.bad(&format!("rope scaling {kind:?} without a valid {key}")))
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear {
                factor: number("factor")?,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_positions: number("original_max_position_embeddings")?,
            },
            "yarn" => {
                for key in ["mscale", "mscale_all_dim"] {
                    if !scaling[key].is_null() {
                        return Err(self.unsupported(format!("{key} of rope scaling \"yarn\"")));
                    }
                }
                if theta <= 1.0 {
                    return Err(self.bad("rope scaling \"yarn\" with a rope_theta of 1"));
                }
                let factor = number("factor")?;
                let given = |key: &str, usual: f64| scaling[key].as_f64().unwrap_or(usual);
                RopeScaling::Yarn {
                    factor,
                    beta_fast: given("beta_fast", 32.0),
                    beta_slow: given("beta_slow", 1.0),
                    original_positions: number("original_max_position_embeddings")?,
                    attention_factor: given("attention_factor", 0.1 * factor.max(1.0).ln() + 1.0),
                }
            }
            other => {
                return Err(self.unsupported(format!(
                    "rope scaling {other:?} (supported: \"default\", \"linear\", \"llama3\", \"yarn\")"
                )));
            }
        };
        Ok(Rope { theta, scaling })
    }
}
