//! Keys that Axolotl, TRL, PEFT, Transformers or LLaMA-Factory know and that are no fields here. Each value of each of
//! them has one fate: it says what is done anyway, it is passed over by name, or it is refused with what to do instead.

mod dataset_keys;
mod job_keys;
mod table;
mod usual_keys;

use super::yaml::{Node, Value};
use table::{Group, Rule};

/// How a foreign key with the value that it has is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It asks for nothing, or for what is done anyway.
    Honoured,
    /// It changes nothing that is learned or written; the plan names it.
    PassedOver,
    /// Something else is done that serves its purpose as well; the text says what, after the key and its value.
    DoneOtherwise(&'static str),
    /// It asks for what Muster does not do; the text says what to do about it.
    Refused(&'static str),
}

/// Foreign keys at the top of a job.
const JOB_KEYS: [&[Group]; 2] = [usual_keys::GROUPS, job_keys::GROUPS];

/// The fate of the foreign `key` at the top of a job; `None` if nobody knows it.
pub(super) fn find(key: &str, node: &Node) -> Option<Fate> {
    look_up(&JOB_KEYS, key, node)
}

/// The fate of the foreign `key` in an entry of `datasets`; `None` if nobody knows it.
pub(super) fn find_in_dataset(key: &str, node: &Node) -> Option<Fate> {
    look_up(&[dataset_keys::GROUPS], key, node)
}

/// Foreign keys at the top of a job, whole names only, for flags and a did-you-mean.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    let groups = JOB_KEYS.iter().copied().flatten();
    let keys = groups.flat_map(|group| group.keys);
    keys.copied().filter(|key| !key.ends_with('*'))
}

/// Whether a foreign key at the top of a job has this name, as a whole.
pub(super) fn is_known(name: &str) -> bool {
    names().any(|known| known == name)
}

fn look_up(tables: &[&'static [Group]], key: &str, node: &Node) -> Option<Fate> {
    let is_named = |name: &&&str| match name.strip_suffix('*') {
        Some(prefix) => key.starts_with(prefix),
        None => **name == key,
    };
    // A whole name before one that only begins so.
    let all = || {
        let groups = tables.iter().copied().flatten();
        groups.flat_map(|group| group.keys.iter().map(move |name| (name, &group.rule)))
    };
    let (_, rule) = all()
        .find(|(name, _)| **name == key)
        .or_else(|| all().find(|(name, _)| is_named(name)))?;
    if node.is_null() || is_blank(node) {
        return Some(Fate::Honoured);
    }
    Some(match rule {
        Rule::Inert => Fate::PassedOver,
        Rule::InertIf(values, _) if says_only(node, values) => Fate::PassedOver,
        Rule::Only(values, _) if says_only(node, values) => Fate::Honoured,
        Rule::Instead(values, _) if says_only(node, values) => Fate::Honoured,
        Rule::Instead(_, told) => Fate::DoneOtherwise(told),
        Rule::InsteadUnless { off, .. } if says_only(node, off) => Fate::Honoured,
        Rule::InsteadUnless {
            deciding, advice, ..
        } if decides(node, deciding) => Fate::Refused(advice),
        Rule::InsteadUnless { told, .. } => Fate::DoneOtherwise(told),
        Rule::InertIf(_, advice) | Rule::Only(_, advice) => Fate::Refused(advice),
    })
}

/// Whether the value, or each of a list, is one of these.
fn says_only(node: &Node, values: &[&str]) -> bool {
    match &node.value {
        Value::Scalar { text, .. } => {
            let text = text.trim();
            values.iter().any(|value| match value.strip_prefix('*') {
                Some(end) => text.ends_with(end),
                None => text.eq_ignore_ascii_case(value),
            })
        }
        // A list of nothing switches off what can be off; elsewhere it means something (Axolotl's `roles_to_train: []`).
        Value::Sequence(items) if items.is_empty() => values.contains(&"none"),
        Value::Sequence(items) => items.iter().all(|item| says_only(item, values)),
        Value::Mapping(_) => false,
    }
}

/// Whether an entry of the mapping, at whatever depth, decides what comes out and says something of its own.
fn decides(node: &Node, deciding: &[&str]) -> bool {
    /// Values that leave it to the job, or ask for what it does.
    const OPEN: &[&str] = &[
        "auto", "bf16", "bfloat16", "fp32", "float32", "false", "no", "none", "0",
    ];
    let Value::Mapping(entries) = &node.value else {
        return false;
    };
    entries.iter().any(|(key, inner)| {
        let is_open = inner.is_null() || is_blank(inner) || says_only(inner, OPEN);
        let is_off = match &inner.value {
            // DeepSpeed's `fp16: {enabled: false}`.
            Value::Mapping(parts) => parts
                .iter()
                .any(|(name, value)| name.text == "enabled" && says_only(value, OPEN)),
            _ => false,
        };
        let names = deciding.contains(&key.text.as_str()) && !is_open && !is_off;
        names || decides(inner, deciding)
    })
}

/// Whether a value asks for nothing, whatever the key is.
fn is_blank(node: &Node) -> bool {
    match &node.value {
        Value::Scalar { text, .. } => text.trim().is_empty(),
        Value::Sequence(_) => false,
        Value::Mapping(entries) => entries.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::error::Origin;
    use crate::job::fields;

    fn node(text: &str) -> Node {
        Node::scalar(text, false, &Origin::Nowhere)
    }

    /// Values that a key may have, with all that its rule names.
    fn probes(rule: &Rule) -> Vec<Node> {
        let own: &[&str] = match rule {
            Rule::Inert => &[],
            Rule::InertIf(values, _) | Rule::Only(values, _) | Rule::Instead(values, _) => values,
            Rule::InsteadUnless { off, .. } => off,
        };
        let usual = [
            "true", "false", "no", "none", "0", "1", "2", "0.5", "turn", "text", "auto",
        ];
        let mut probes: Vec<Node> = usual.iter().chain(own).map(|text| node(text)).collect();
        probes.push(Node {
            origin: Origin::Nowhere,
            value: Value::Sequence(Vec::new()),
        });
        let list = probes.clone();
        probes.extend(list.into_iter().map(|node| Node {
            origin: node.origin.clone(),
            value: Value::Sequence(vec![node]),
        }));
        probes
    }

    #[test]
    fn no_value_of_a_known_key_vanishes() {
        for group in JOB_KEYS.into_iter().flatten().chain(dataset_keys::GROUPS) {
            for key in group.keys {
                let key = key.replace('*', "x");
                for node in probes(&group.rule) {
                    let groups = std::slice::from_ref(group);
                    let fate = look_up(&[groups], &key, &node).expect("the key is in the group");
                    let is_said = match &group.rule {
                        Rule::Only(values, _) | Rule::Instead(values, _) => {
                            says_only(&node, values)
                        }
                        Rule::InsteadUnless { off, .. } => says_only(&node, off),
                        _ => false,
                    };
                    // What is neither refused nor told is exactly what the table says is done anyway.
                    assert_eq!(fate == Fate::Honoured, is_said, "{key}: {node:?}");
                    if let Fate::Refused(advice) | Fate::DoneOtherwise(advice) = fate {
                        assert!(
                            advice.len() > 15 && !advice.ends_with('.'),
                            "{key}: {advice}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_key_is_a_field_or_a_foreign_one_and_stands_once() {
        for (tables, is_field) in [
            (&JOB_KEYS[..], fields::find as fn(&str) -> _),
            (&[dataset_keys::GROUPS][..], fields::find_in_dataset),
        ] {
            let mut seen = std::collections::HashSet::new();
            for key in tables
                .iter()
                .copied()
                .flatten()
                .flat_map(|group| group.keys)
            {
                assert!(seen.insert(key), "{key} stands twice");
                assert!(is_field(key).is_none(), "{key} is a field");
            }
        }
    }

    #[test]
    fn what_asks_for_less_memory_is_told_that_each_worker_holds_the_whole_model() {
        for key in [
            "fsdp",
            "fsdp_config",
            "deepspeed",
            "tensor_parallel_size",
            "dp_shard_size",
        ] {
            let Some(Fate::DoneOtherwise(told)) = find(key, &node("full_shard")) else {
                panic!("{key} is not passed over with a word")
            };
            assert!(
                told.contains("the whole model") && !told.contains("more workers"),
                "{key}: {told}"
            );
        }
    }
}
