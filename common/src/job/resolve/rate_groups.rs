//! Resolves learning rates of some weights beside that of all others: LoRA+, and Axolotl's groups.

use crate::job::dialect::Dialect;
use crate::job::merge::Given;
use crate::job::number::parse_number;
use crate::job::quote::shorten;
use crate::job::read::Reader;
use crate::job::yaml::{self, Node, Value};
use crate::job::{Method, Optimizer, RateGroup, RateGroups};

const MAX_GROUPS: usize = 1000;
const WANTED: &str = "a list of groups, as in [{name: output, modules: [o_proj], lr: 1e-5}]";
/// The rate of an adapter on the embedding, where LoRA+ is not told another (PEFT, `optimizers/loraplus.py`).
const LORA_PLUS_EMBEDDING: f64 = 1e-6;
/// All fields of this file.
const FIELDS: [&str; 4] = [
    "loraplus_lr_ratio",
    "lr_groups",
    "embedding_lr",
    "embedding_lr_scale",
];

pub(super) fn rate_groups(
    reader: &mut Reader<'_>,
    method: &Method,
    optimizer: &Optimizer,
    learning_rate: f64,
) -> RateGroups {
    let rates = rates(reader, method, learning_rate);
    if !rates.is_none()
        && matches!(optimizer, Optimizer::Muon { .. })
        && let Some(given) = FIELDS.iter().find_map(|name| reader.given(name))
    {
        let message =
            "has no effect with muon, which has one learning rate for all weights; remove it";
        reader.problem(given, message.to_owned());
    }
    rates
}

/// Whether weights decay at all: with LoRA+ they do in LLaMA-Factory alone.
pub(super) fn decays(reader: &mut Reader<'_>, rates: &RateGroups, weight_decay: f64) -> bool {
    let stays = matches!(rates, RateGroups::LoraPlus { .. }) && reader.dialect == Dialect::Usual;
    if stays && weight_decay > 0.0 {
        let told = "weight_decay: changes nothing with loraplus_lr_ratio, as in PEFT and Axolotl";
        reader.notices.push(told.to_owned());
    }
    !stays
}

fn rates(reader: &mut Reader<'_>, method: &Method, learning_rate: f64) -> RateGroups {
    let ratio = reader.number("loraplus_lr_ratio", "a number above 0, at most 10^6", |n| {
        n > 0.0 && n <= 1e6
    });
    let of_embedding = reader.number("loraplus_lr_embedding", "a number, 0 or more", |n| {
        (0.0..=1e3).contains(&n)
    });
    let groups = lr_groups(reader);
    let embedding = embedding(reader, learning_rate);
    let is_lora = matches!(method, Method::Lora(_));
    let adapted = match method {
        Method::Full => [false; 2],
        Method::Lora(lora) => lora.adapts_tokens(),
    };
    if of_embedding.is_some() && is_lora && !adapted[0] {
        let told = "loraplus_lr_embedding: changes nothing, because no adapter is on an embedding";
        reader.notices.push(told.to_owned());
    }
    const ADDING: [&str; 3] = ["tokens", "add_special_tokens", "special_tokens"];
    let trains_tokens = match method {
        Method::Full => true,
        Method::Lora(lora) => {
            let adds = |name: &&str| reader.given(name).is_some();
            adapted.contains(&true) || !lora.tokens.is_none() || ADDING.iter().any(adds)
        }
    };
    if embedding.is_some() && !trains_tokens {
        let told =
            "embedding_lr: changes nothing, because neither embedding nor output layer is trained";
        reader.notices.push(told.to_owned());
    }
    match ratio {
        Some(ratio) if is_lora => {
            for name in &FIELDS[1..] {
                if let Some(given) = reader.given(name) {
                    let message = "and `loraplus_lr_ratio` both group the weights; remove one";
                    reader.problem(given, message.to_owned());
                }
            }
            let embedding = adapted[0].then(|| of_embedding.unwrap_or(LORA_PLUS_EMBEDDING));
            RateGroups::LoraPlus { ratio, embedding }
        }
        // Said beside the other fields of adapters.
        Some(_) => RateGroups::None,
        None if groups.is_empty() && embedding.is_none() => RateGroups::None,
        None => RateGroups::Named { embedding, groups },
    }
}

/// The rate of embedding and output layer. Axolotl takes 0 for none.
fn embedding(reader: &mut Reader<'_>, learning_rate: f64) -> Option<f64> {
    let in_range = |n: f64| (0.0..=1e3).contains(&n);
    let wanted = "a number from 0 to 1000";
    let rate = reader.number("embedding_lr", wanted, in_range);
    let scale = reader.number("embedding_lr_scale", wanted, in_range);
    let names = ["embedding_lr", "embedding_lr_scale"];
    match reader.one_of(&names, "the learning rate of the embedding")? {
        "embedding_lr" => rate.filter(|rate| *rate > 0.0),
        _ => scale
            .filter(|scale| *scale > 0.0)
            .map(|scale| scale * learning_rate),
    }
}

fn lr_groups(reader: &mut Reader<'_>) -> Vec<RateGroup> {
    let Some(given) = reader.given("lr_groups") else {
        return Vec::new();
    };
    let node = match &given.node.value {
        // On a command line.
        Value::Scalar { text, .. } if text.trim_start().starts_with('[') => {
            match yaml::parse(text, &|_| given.node.origin.clone()) {
                Ok(Some(node)) => node,
                _ => given.node.clone(),
            }
        }
        _ => given.node.clone(),
    };
    let Value::Sequence(items) = &node.value else {
        if !given.is_switched_off() {
            reader.wrong(given, WANTED);
        }
        return Vec::new();
    };
    if items.len() > MAX_GROUPS {
        reader.problem(given, format!("has more than {MAX_GROUPS} groups"));
        return Vec::new();
    }
    let mut groups = Vec::new();
    for item in items {
        match group(item) {
            Ok(group) => groups.push(group),
            Err(reason) => problem(reader, given, item, &reason),
        }
    }
    groups
}

fn problem(reader: &mut Reader<'_>, given: &Given, item: &Node, reason: &str) {
    let written = shorten(&given.written);
    let message = format!("`{written}` {reason}: it is {WANTED}");
    reader.problems.add(&item.origin, message);
}

fn group(node: &Node) -> Result<RateGroup, String> {
    let Value::Mapping(entries) = &node.value else {
        return Err(format!("has {} in it", node.describe()));
    };
    let (mut name, mut modules, mut lr) = (None, Vec::new(), None);
    for (key, node) in entries {
        match (key.text.as_str(), &node.value) {
            ("name", Value::Scalar { text, .. }) => name = Some(text.clone()),
            ("modules", Value::Sequence(items)) => {
                for item in items {
                    match &item.value {
                        Value::Scalar { text, .. } if !text.is_empty() => {
                            modules.push(text.clone())
                        }
                        _ => return Err("has a module that is no text".to_owned()),
                    }
                }
            }
            ("lr", Value::Scalar { text, .. }) => {
                let rate = parse_number(text).filter(|rate| (0.0..=1e3).contains(rate));
                let found = shorten(text);
                lr = Some(rate.ok_or_else(|| {
                    format!("has an lr of `{found}`, which must be a number from 0 to 1000")
                })?);
            }
            (other, _) => {
                let (other, found) = (shorten(other), node.describe());
                return Err(format!("has `{other}` with {found}"));
            }
        }
    }
    match (name, modules.is_empty(), lr) {
        (Some(name), false, Some(lr)) => Ok(RateGroup { name, modules, lr }),
        (None, ..) => Err("has a group without name".to_owned()),
        (_, true, _) => Err("has a group without modules".to_owned()),
        (.., None) => Err("has a group without lr".to_owned()),
    }
}
