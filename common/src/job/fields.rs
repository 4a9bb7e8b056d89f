//! Every field that a job may hold: its names, values, default and meaning. The documentation is made from this table,
//! and the reader accepts nothing that is not in it.

mod data;
mod datasets;
mod method;
mod model;
mod output;
mod training;

use std::sync::LazyLock;

/// One field, for people.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Canonical name; `datasets[].` and `cluster.` stand before the fields inside those.
    pub name: &'static str,
    /// Other names for the same thing, from Axolotl, TRL, PEFT and Transformers.
    pub aliases: &'static [&'static str],
    /// What may stand there.
    pub values: &'static str,
    pub default: &'static str,
    pub help: &'static str,
}

/// The lists of datasets that a job has: those to train on, and those to evaluate. Entries of both have the same fields.
pub(super) const DATASETS: &str = "datasets";
pub(super) const TEST_DATASETS: &str = "test_datasets";
pub(super) const LISTS: [&str; 2] = [DATASETS, TEST_DATASETS];

/// All fields, in the order in which a job file is best written.
pub fn fields() -> &'static [Field] {
    &FIELDS
}

const fn field(
    name: &'static str,
    aliases: &'static [&'static str],
    values: &'static str,
    default: &'static str,
    help: &'static str,
) -> Field {
    Field {
        name,
        aliases,
        values,
        default,
        help,
    }
}

static FIELDS: LazyLock<Vec<Field>> = LazyLock::new(|| {
    [
        model::FIELDS,
        datasets::FIELDS,
        data::FIELDS,
        method::FIELDS,
        training::FIELDS,
        output::FIELDS,
    ]
    .concat()
});

/// How the value of a flag stands on a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlagValue {
    One,
    /// The flag alone means true.
    Switch,
    /// Each flag adds an entry to the list in this field.
    Entry(&'static str),
    /// The entries of the list in this field follow the flag, or stand between commas.
    List(&'static str),
    /// A key of other trainers, with or without a value.
    Foreign,
}

/// What follows `--base-model` or another flag of a job, with dashes or underscores.
pub fn flag_value(flag: &str) -> FlagValue {
    let name = flag.trim_start_matches('-').replace('-', "_");
    let Some(field) = find(&name) else {
        return match CLUSTER_FLAGS.contains(&name.as_str()) {
            true => FlagValue::One,
            false => FlagValue::Foreign,
        };
    };
    match field.name {
        "datasets" | "test_datasets" | "test_prompts" => FlagValue::Entry(field.name),
        "lora_target_modules"
        | "lora_target_parameters"
        | "lora_modules_to_save"
        | "tokens"
        | "add_special_tokens" => FlagValue::List(field.name),
        _ if field.values.contains("true | false") => FlagValue::Switch,
        _ => FlagValue::One,
    }
}

/// Every name that may stand behind the dashes of a flag, with underscores: fields of a job, their aliases, and keys of
/// other trainers, of which something can be said at least.
pub fn flag_names() -> impl Iterator<Item = &'static str> {
    names()
        .filter(|name| *name != "cluster")
        .chain(CLUSTER_FLAGS)
        .chain(super::unsupported::names())
}

/// The switch or foreign key that a name says no to, as `no_remove_unused_columns`: Transformers makes such a flag of every switch
/// that is on by default.
pub(super) fn negated(name: &str) -> Option<&str> {
    let positive = name
        .strip_prefix("no_")
        .filter(|name| !name.starts_with("no_"))?;
    let is_known = |name: &str| find(name).is_some() || super::unsupported::is_known(name);
    let may_be_off = match find(positive) {
        Some(field) => field.values.contains("true | false"),
        None => super::unsupported::is_known(positive),
    };
    (may_be_off && !is_known(name)).then_some(positive)
}

/// The names that say no to a switch or a foreign key, with underscores.
pub fn negations() -> impl Iterator<Item = String> {
    let negations = flag_names().map(|name| format!("no_{name}"));
    negations.filter(|name| negated(name).is_some())
}

/// Fields of `cluster`, which have no dots on the command line.
pub(super) const CLUSTER_FLAGS: [&str; 2] = ["min_workers", "max_workers"];

/// A name that a user may have written at the top of a job file, resolved.
pub(super) fn find(name: &str) -> Option<&'static Field> {
    FIELDS
        .iter()
        .find(|field| field.name == name || (!is_nested(field) && field.aliases.contains(&name)))
}

/// A name inside an entry of `datasets`, resolved.
pub(super) fn find_in_dataset(name: &str) -> Option<&'static Field> {
    dataset_fields().find(|field| {
        field.name.strip_prefix("datasets[].") == Some(name) || field.aliases.contains(&name)
    })
}

/// All names at the top of a job file, for a did-you-mean.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    FIELDS
        .iter()
        .filter(|field| !is_nested(field))
        .flat_map(|field| std::iter::once(field.name).chain(field.aliases.iter().copied()))
        .chain(["cluster"])
}

/// All names inside an entry of `datasets`, for a did-you-mean.
pub(super) fn dataset_names() -> impl Iterator<Item = &'static str> {
    dataset_fields().flat_map(|field| {
        field
            .name
            .strip_prefix("datasets[].")
            .into_iter()
            .chain(field.aliases.iter().copied())
    })
}

fn dataset_fields() -> impl Iterator<Item = &'static Field> {
    FIELDS
        .iter()
        .filter(|field| field.name.starts_with("datasets[]."))
}

fn is_nested(field: &Field) -> bool {
    field.name.contains('.')
}
