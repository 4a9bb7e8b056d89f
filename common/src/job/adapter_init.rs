//! What the factors of a new adapter start with.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How the factors of a new adapter are made. Nothing of it changes what the model computes before the first step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterInit {
    /// A uniform (Kaiming with a = sqrt 5), B zero.
    #[default]
    Kaiming,
    /// A normal with a standard deviation of 1 / rank, B zero.
    Gaussian,
    /// A and B of random rows of an orthogonal matrix, none in both, so that `B A` is zero.
    Orthogonal,
    /// `s B A` the largest singular directions of the weight, which loses them (PiSSA, Meng et al., 2024).
    Pissa {
        /// Iterations of the search for them. None: as many as give them well.
        iterations: Option<u32>,
    },
    /// `B A` the first columns of the weight's QR decomposition, which loses them (OLoRA, Büyükakyüz, 2024).
    Olora,
}

/// Most rows of the matrix that orthogonal factors are made of.
const MAX_ORTHOGONAL_RANK: usize = 512;
/// Most directions of a weight that an adapter begins with.
const MAX_RANK_FROM_BASE: usize = 256;
/// Most iterations of the search for singular directions.
pub(super) const MAX_ITERATIONS: u32 = 64;

impl AdapterInit {
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the factors are a part of the weight, which is taken off it. The weight itself stays as it is: the adapter has twice
    /// the rank, and its second half, which is not trained, takes off what the first begins with.
    pub fn is_from_base(self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora)
    }

    /// What an adapter says of it in `init_lora_weights`, where the default is `true`. One that begins with a part of the weight is
    /// none that PEFT would take off once more.
    pub fn in_adapter(self) -> Option<&'static str> {
        match self {
            Self::Kaiming | Self::Pissa { .. } | Self::Olora => None,
            Self::Gaussian => Some("gaussian"),
            Self::Orthogonal => Some("orthogonal"),
        }
    }

    /// The start that an adapter names.
    pub fn of_adapter(name: &str) -> Option<Self> {
        let all = [Self::Gaussian, Self::Orthogonal];
        all.into_iter().find(|init| init.in_adapter() == Some(name))
    }

    /// The start of that name in PEFT.
    pub(super) fn of_name(name: &str) -> Option<Self> {
        let iterations = |text: &str| {
            text.parse()
                .ok()
                .filter(|n| (1..=MAX_ITERATIONS).contains(n))
        };
        match name {
            "pissa" => Some(Self::Pissa { iterations: None }),
            "olora" => Some(Self::Olora),
            _ => match name.strip_prefix("pissa_niter_") {
                Some(text) => iterations(text).map(|n| Self::Pissa {
                    iterations: Some(n),
                }),
                None => Self::of_adapter(name),
            },
        }
    }

    /// What is wrong with an adapter of this rank, if it starts so; goes after the field's name.
    pub(super) fn refuses(self, rank: usize) -> Option<String> {
        let is_fit = rank.is_multiple_of(2) && rank <= MAX_ORTHOGONAL_RANK;
        if self == Self::Orthogonal && !is_fit {
            return Some(format!(
                "is orthogonal, which needs even ranks of at most {MAX_ORTHOGONAL_RANK}, not {rank}"
            ));
        }
        if let Self::Pissa {
            iterations: Some(count),
        } = self
            && !(1..=MAX_ITERATIONS).contains(&count)
        {
            return Some(format!(
                "asks for {count} iterations, not 1 to {MAX_ITERATIONS}"
            ));
        }
        (self.is_from_base() && rank > MAX_RANK_FROM_BASE).then(|| {
            format!("takes directions off the weights, {MAX_RANK_FROM_BASE} at most, not {rank}")
        })
    }
}

/// The start for people.
impl fmt::Display for AdapterInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kaiming => f.write_str("as usual"),
            Self::Gaussian => f.write_str("gaussian"),
            Self::Orthogonal => f.write_str("orthogonal"),
            Self::Pissa { iterations: None } => f.write_str("PiSSA"),
            Self::Pissa {
                iterations: Some(count),
            } => write!(f, "PiSSA of {count} iterations"),
            Self::Olora => f.write_str("OLoRA"),
        }
    }
}
