//! Rotary positions of a model: their frequencies, and how a `config.json` says them in older and newer spelling.

use serde_json::{Value, json};

use super::error::ModelError;
use super::fields::Fields;
use crate::files::model::Architecture;

/// Rotary position frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// Which dimensions of what is rotated turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryPairs {
    /// Each of the first half with that of the second.
    Halves,
    /// Each with the one beside it.
    Neighbours,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    /// Gemma 4's: the first pairs turn, as many as this share of them, and the others stay as they are.
    Proportional {
        share: f64,
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
        /// Whether those between begin and end at a whole pair.
        truncate: bool,
    },
    /// LongRoPE (Ding et al., 2024): each pair is slowed down by a factor of its own, one in texts of the original length, another
    /// in those that are longer.
    Long {
        short_factors: Vec<f64>,
        long_factors: Vec<f64>,
        /// Most tokens of a text that turns by the short factors.
        original_positions: usize,
        /// What cosines and sines are multiplied by, in texts of every length.
        attention_factor: f64,
    },
}

/// The frequencies of texts that are longer than a model's original length, where these have their own.
#[derive(Clone, Debug, PartialEq)]
pub struct LongTexts {
    /// Texts of more tokens are long.
    pub above: usize,
    pub frequencies: Vec<f32>,
}

impl Rope {
    /// Radians per position of each pair of so many dimensions, rounded to float32 where Transformers does.
    pub fn frequencies(&self, dimensions: usize) -> Vec<f32> {
        if let RopeScaling::Long { short_factors, .. } = &self.scaling {
            return self.slowed(short_factors, dimensions);
        }
        (0..dimensions / 2)
            .map(|pair| {
                let frequency = 1.0 / self.period(pair, dimensions);
                self.scaling
                    .apply(frequency, (pair, dimensions), self.theta)
            })
            .collect()
    }

    /// The frequencies of long texts, where these have their own; those of other texts are [`frequencies`](Self::frequencies).
    pub fn long_texts(&self, dimensions: usize) -> Option<LongTexts> {
        match &self.scaling {
            RopeScaling::Long {
                long_factors,
                original_positions,
                ..
            } => Some(LongTexts {
                above: *original_positions,
                frequencies: self.slowed(long_factors, dimensions),
            }),
            _ => None,
        }
    }

    /// Whether a text of so many tokens turns by the frequencies of [`long_texts`](Self::long_texts).
    pub fn is_long(&self, tokens: usize) -> bool {
        match &self.scaling {
            RopeScaling::Long {
                original_positions, ..
            } => tokens > *original_positions,
            _ => false,
        }
    }

    /// Positions per radian of a pair.
    fn period(&self, pair: usize, dimensions: usize) -> f32 {
        let exponent = (2 * pair) as f32 / dimensions as f32;
        libm::pow(self.theta, f64::from(exponent)) as f32
    }

    /// The frequencies of pairs that are slowed down by a factor each.
    fn slowed(&self, factors: &[f64], dimensions: usize) -> Vec<f32> {
        let factors = factors.iter().enumerate();
        factors
            .map(|(pair, factor)| 1.0 / (*factor as f32 * self.period(pair, dimensions)))
            .collect()
    }

    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            }
            | RopeScaling::Long {
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
                truncate,
                ..
            } => {
                // The pair that turns so many times over the original positions.
                let pair_of = |turns: f64| {
                    let positions = original_positions / (turns * 2.0 * std::f64::consts::PI);
                    dimensions as f64 * libm::log(positions) / (2.0 * libm::log(theta))
                };
                let (low, high) = (pair_of(beta_fast), pair_of(beta_slow));
                let (low, high) = match truncate {
                    true => (low.floor(), high.ceil()),
                    false => (low, high),
                };
                let (low, high) = (low.max(0.0), high.min(dimensions as f64 - 1.0));
                let high = if high == low { high + 0.001 } else { high };
                let slowed = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                frequency / factor as f32 * slowed + frequency * (1.0 - slowed)
            }
            // Long: by a factor of each pair, see [`Rope::slowed`].
            Self::None | Self::Long { .. } => frequency,
            Self::Linear { factor } => frequency / factor as f32,
            Self::Proportional { share, factor } => {
                let turning = (share * dimensions as f64 / 2.0).floor();
                match (pair as f64) < turning {
                    true => frequency / factor as f32,
                    false => 0.0,
                }
            }
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
        self.check_older_rope(parameters, &self.json["rope_scaling"])?;
        let by_type = |kind: &str| Some(&parameters[kind]).filter(|found| found.is_object());
        let architecture = Architecture::of_config(self.path, self.json)?;
        if architecture == Architecture::Gemma4 {
            return self.ropes_of_gemma4(parameters);
        }
        if let Some(full) = by_type("full_attention") {
            let sliding = by_type("sliding_attention").unwrap_or(full);
            let own = |found: &Value| self.rope_of(found, default_theta);
            return Ok((own(full)?, Some(own(sliding)?)));
        }
        let older_local = match architecture {
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
        let rope = match architecture {
            Architecture::Phi3 => self.rope_of_phi(scaling, default_theta)?,
            Architecture::GptOss if scaling.is_null() => {
                self.rope_of(&usual_yarn_of_gpt_oss(), default_theta)?
            }
            _ => self.rope_of(scaling, default_theta)?,
        };
        Ok((rope, older_local.map(local)))
    }

    /// Gemma 4's, which has no older spelling: of layers that see everything a share of the pairs turns.
    fn ropes_of_gemma4(&self, parameters: &Value) -> Result<(Rope, Option<Rope>), ModelError> {
        let of = |scaling, theta| Rope { theta, scaling };
        if parameters.is_null() && self.json["rope_scaling"].is_null() {
            let (share, factor) = (0.25, 1.0);
            let global = of(RopeScaling::Proportional { share, factor }, 1e6);
            return Ok((global, Some(of(RopeScaling::None, 1e4))));
        }
        let rope = |kind: &str| {
            let own = &parameters[kind];
            let theta = own["rope_theta"].as_f64();
            let theta = theta.filter(|_| own.is_object()).ok_or_else(|| {
                self.bad(
                    "rope_parameters must have full_attention and sliding_attention, each with a rope_theta",
                )
            })?;
            let share = own["partial_rotary_factor"].as_f64().unwrap_or(1.0);
            match kind_of(own) {
                "proportional" => {
                    let factor = own["factor"].as_f64().unwrap_or(1.0);
                    Ok(of(RopeScaling::Proportional { share, factor }, theta))
                }
                _ if share != 1.0 => Err(self.unsupported(format!(
                    "partial_rotary_factor of {kind}, but with rope_type \"proportional\","
                ))),
                _ => self.rope_of(own, theta),
            }
        };
        Ok((rope("full_attention")?, Some(rope("sliding_attention")?)))
    }

    /// Refuses what the older key says otherwise: Transformers takes that one then, and forgets the newer key.
    fn check_older_rope(&self, parameters: &Value, older: &Value) -> Result<(), ModelError> {
        let Some(older) = older.as_object().filter(|_| !parameters.is_null()) else {
            return Ok(());
        };
        let differs = |(key, value): (&String, &Value)| {
            let newer = match key.as_str() {
                "type" => "rope_type",
                key => key,
            };
            parameters[newer] != *value
        };
        match older.iter().any(differs) {
            true => Err(self.bad(
                "rope_scaling says something else than rope_parameters; Transformers takes the former: leave one of them out",
            )),
            false => Ok(()),
        }
    }

    /// Both layouts: `rope_theta` with `rope_scaling`, and Transformers 5's `rope_parameters`, which holds them all.
    fn rope_of(&self, scaling: &Value, default_theta: f64) -> Result<Rope, ModelError> {
        let theta = self.theta_of(scaling, default_theta);
        let kind = kind_of(scaling);
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
                    attention_factor: given(
                        "attention_factor",
                        0.1 * libm::log(factor.max(1.0)) + 1.0,
                    ),
                    truncate: scaling["truncate"].as_bool().unwrap_or(true),
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

    /// Phi-3's, which has LongRoPE or nothing; older files call it `su`, or `yarn`.
    fn rope_of_phi(&self, scaling: &Value, default_theta: f64) -> Result<Rope, ModelError> {
        let theta = self.theta_of(scaling, default_theta);
        let kind = kind_of(scaling);
        let scaling = match kind {
            "default" => RopeScaling::None,
            "longrope" | "su" | "yarn" => self.long_rope(scaling, kind)?,
            other => {
                return Err(self.unsupported(format!(
                    "rope scaling {other:?} (supported with this architecture: \"default\", \"longrope\")"
                )));
            }
        };
        Ok(Rope { theta, scaling })
    }

    fn long_rope(&self, scaling: &Value, kind: &str) -> Result<RopeScaling, ModelError> {
        for key in ["short_mscale", "long_mscale"] {
            if !scaling[key].is_null() {
                return Err(self.unsupported(format!("{key} of rope scaling {kind:?}")));
            }
        }
        // What stands beside the scaling counts, and so does its default; a different number in it may be what was meant.
        const DEFAULT: usize = 4096;
        let original = self.optional_size("original_max_position_embeddings")?;
        let original = original.unwrap_or(DEFAULT);
        let within = scaling["original_max_position_embeddings"].as_f64();
        if let Some(within) = within.filter(|within| *within != original as f64) {
            return Err(self.bad(&format!(
                "original_max_position_embeddings is {original}, but {within} in the rope scaling"
            )));
        }
        let positions = self.optional_size("max_position_embeddings")?;
        let ratio = positions.unwrap_or(DEFAULT) as f64 / original as f64;
        let factor = scaling["factor"].as_f64().unwrap_or(ratio);
        let usual = match factor <= 1.0 {
            true => 1.0,
            false if original == 1 => {
                return Err(self.bad("original_max_position_embeddings of 1 cannot be scaled"));
            }
            false => (1.0 + libm::log(factor) / libm::log(original as f64)).sqrt(),
        };
        Ok(RopeScaling::Long {
            short_factors: self.factors(scaling, "short_factor")?,
            long_factors: self.factors(scaling, "long_factor")?,
            original_positions: original,
            attention_factor: scaling["attention_factor"].as_f64().unwrap_or(usual),
        })
    }

    fn factors(&self, scaling: &Value, key: &str) -> Result<Vec<f64>, ModelError> {
        let list = scaling[key].as_array();
        let factors = list.and_then(|list| list.iter().map(Value::as_f64).collect());
        factors.ok_or_else(|| {
            let kind = kind_of(scaling);
            self.bad(&format!("rope scaling {kind:?} without a valid {key}"))
        })
    }

    fn theta_of(&self, scaling: &Value, default: f64) -> f64 {
        let own = scaling["rope_theta"].as_f64();
        own.or(self.number("rope_theta")).unwrap_or(default)
    }

    /// The number of dimensions of each head that are rotated. `usual` is the share where nothing is said, in families that may
    /// leave a part of a head as it is.
    pub(super) fn rotary_dim(
        &self,
        usual: Option<f64>,
        head_dim: usize,
    ) -> Result<usize, ModelError> {
        let scaling = match &self.json["rope_parameters"] {
            Value::Null => &self.json["rope_scaling"],
            parameters => parameters,
        };
        let within = scaling["partial_rotary_factor"].as_f64();
        let said = within.or(self.number("partial_rotary_factor"));
        let Some(usual) = usual else {
            return match said.is_none_or(|factor| factor == 1.0) {
                true => Ok(head_dim),
                false => Err(self.unsupported("partial_rotary_factor".to_owned())),
            };
        };
        let factor = said.unwrap_or(usual);
        let rotated = (head_dim as f64 * factor) as usize;
        if rotated < 2 || !rotated.is_multiple_of(2) {
            return Err(self.bad(&format!(
                "partial_rotary_factor {factor} of a head_dim of {head_dim} rotates {rotated} dimensions, where pairs are rotated"
            )));
        }
        Ok(rotated)
    }

    /// Checks that LongRoPE has a factor for each pair.
    pub(super) fn check_long_rope(&self, rope: &Rope, rotated: usize) -> Result<(), ModelError> {
        let RopeScaling::Long {
            short_factors,
            long_factors,
            ..
        } = &rope.scaling
        else {
            return Ok(());
        };
        for (key, factors) in [
            ("short_factor", short_factors),
            ("long_factor", long_factors),
        ] {
            if factors.len() != rotated / 2 {
                let (found, pairs) = (factors.len(), rotated / 2);
                return Err(self.bad(&format!(
                    "{key} of the rope scaling has {found} entries, but {pairs} pairs are rotated"
                )));
            }
        }
        Ok(())
    }
}

/// How GPT-OSS rotates where nothing is said.
fn usual_yarn_of_gpt_oss() -> Value {
    json!({
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
        "original_max_position_embeddings": 4096
    })
}

fn kind_of(scaling: &Value) -> &str {
    let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str());
    kind.unwrap_or("default")
}

#[cfg(test)]
mod tests;
