//! Resolves what a trained token adds to the loss: TRL's `loss_type`, LLaMA-Factory's and Axolotl's switches, and Transformers'
//! smoothing of labels.

use crate::job::read::Reader;
use crate::job::{Eaft, MAX_EAFT_K, TokenLoss};

/// Fields that decide the loss, each alone.
const FIELDS: [&str; 5] = [
    "loss_type",
    "use_dft_loss",
    "use_eaft_loss",
    "use_eaft",
    "label_smoothing_factor",
];

/// Tokens that LLaMA-Factory computes an entropy of, and Axolotl where nothing is said.
const USUAL_K: usize = 20;
/// What LLaMA-Factory divides an entropy by.
const DIVISOR: f64 = 3.0;

pub(super) fn token_loss(reader: &mut Reader<'_>) -> TokenLoss {
    let types: &[(&[&str], TokenLoss)] = &[
        (&["nll", "chunked_nll"], TokenLoss::CrossEntropy),
        (&["dft"], TokenLoss::Dft),
    ];
    let alpha = reader.number("eaft_alpha", "a number from 0 to 100", |n| {
        (0.0..=100.0).contains(&n)
    });
    let k = reader.size("eaft_k", 1..=MAX_EAFT_K as u64);
    let eaft = |divisor| {
        TokenLoss::Eaft(Eaft {
            alpha: alpha.unwrap_or(1.0),
            k: k.unwrap_or(USUAL_K),
            divisor,
        })
    };
    let mut switched = |name, loss| {
        let is_on = reader.switch(name).unwrap_or(false);
        if is_on { loss } else { TokenLoss::CrossEntropy }
    };
    let losses = [
        switched("use_dft_loss", TokenLoss::Dft),
        switched("use_eaft_loss", eaft(DIVISOR)),
        switched("use_eaft", eaft(1.0)),
    ];
    let of_type = reader.choice("loss_type", types).unwrap_or_default();
    let share = reader.number("label_smoothing_factor", "a number from 0, below 1", |n| {
        (0.0..1.0).contains(&n)
    });
    let smoothed = match share.unwrap_or(0.0) {
        0.0 => TokenLoss::CrossEntropy,
        share => TokenLoss::Smoothed { share },
    };
    let [dft, of_llama_factory, of_axolotl] = losses;
    let named: Vec<(&str, TokenLoss)> = FIELDS
        .into_iter()
        .zip([of_type, dft, of_llama_factory, of_axolotl, smoothed])
        .filter(|(_, loss)| !loss.is_default())
        .collect();
    tell_unused(reader, &named);
    // The same from two fields is one.
    let (first, loss) = *named.first().unwrap_or(&("", TokenLoss::CrossEntropy));
    if let Some((other, _)) = named.iter().find(|(_, other)| *other != loss)
        && let Some(given) = reader.given(other)
    {
        let message = format!("and `{first}` both decide the loss of a token; remove one");
        reader.problem(given, message);
    }
    loss
}

/// Names settings of a loss that is not asked for.
fn tell_unused(reader: &mut Reader<'_>, named: &[(&str, TokenLoss)]) {
    let is_used = |loss: &TokenLoss| matches!(loss, TokenLoss::Eaft(_));
    if named.iter().any(|(_, loss)| is_used(loss)) {
        return;
    }
    for name in ["eaft_alpha", "eaft_k"] {
        if reader.given(name).is_some() {
            let told = format!("{name}: changes nothing without use_eaft or use_eaft_loss");
            reader.notices.push(told);
        }
    }
}
