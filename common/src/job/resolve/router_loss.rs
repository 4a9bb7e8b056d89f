//! Resolves the loss that spreads tokens over experts: Transformers' `output_router_logits` and `router_aux_loss_coef`, which
//! Axolotl's jobs have in `model_config`, and LLaMA-Factory's `moe_aux_loss_coef`.

use super::settings::Settings;
use crate::job::RouterLoss;
use crate::job::number::parse_number;
use crate::job::quote::shorten;
use crate::job::read::Reader;
use crate::job::router_loss::MAX_COEFFICIENT;

const SWITCH: &str = "output_router_logits";
const COEFFICIENT: &str = "router_aux_loss_coef";
const MODEL_CONFIG: &str = "model_config";
const WANTED: &str = "a number from 0 to 1000";

pub(super) fn router_loss(reader: &mut Reader<'_>) -> RouterLoss {
    let of_config = of_model_config(reader);
    let coefficient = reader.number(COEFFICIENT, WANTED, is_coefficient);
    let switch = reader.switch(SWITCH);
    // Who gives a coefficient by itself wants the loss, as in LLaMA-Factory.
    let asked = coefficient.map(|coefficient| coefficient > 0.0);
    RouterLoss {
        is_added: switch.or(asked).or(of_config.is_added),
        coefficient: coefficient.or(of_config.coefficient),
    }
}

/// What `model_config` says in place of `config.json`, of which the router's loss is all that a job may change.
fn of_model_config(reader: &mut Reader<'_>) -> RouterLoss {
    let mut settings = Settings::read(reader, MODEL_CONFIG, "{output_router_logits: true}");
    let found = RouterLoss {
        is_added: settings.switch(reader, SWITCH),
        coefficient: settings.value(reader, COEFFICIENT, WANTED, |text| {
            parse_number(text).filter(|number| is_coefficient(*number))
        }),
    };
    for key in settings.unknown() {
        let message = format!(
            "`{MODEL_CONFIG}` has `{}`, and config.json of base_model decides it; change it there, and remove it here",
            shorten(&key.text)
        );
        reader.problems.add(&key.origin, message);
    }
    found
}

fn is_coefficient(number: f64) -> bool {
    (0.0..=MAX_COEFFICIENT).contains(&number)
}
