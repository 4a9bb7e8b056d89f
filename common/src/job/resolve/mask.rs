//! What of conversations is learned: the fields of a dataset that say so, and those of the job.

use super::super::fields::LISTS;
use super::super::mask::{EndOfTurn, MaskSpec, SHAREGPT_ROLES};
use super::super::quote::shorten;
use super::super::read::Reader;
use super::super::spec::DatasetKind;

const CHOICES: &[(&[&str], EndOfTurn)] = &[
    (&["turn"], EndOfTurn::Turn),
    (&["all"], EndOfTurn::All),
    (&["last"], EndOfTurn::Last),
    (&["none"], EndOfTurn::None),
];

/// Fields of a dataset that only conversations have.
const OF_CONVERSATIONS: [&str; 5] = [
    "roles_to_train",
    "train_on_eos",
    "train_on_eot",
    "message_field_training",
    "message_field_training_detail",
];

/// Reads what of a dataset's conversations is learned. `roles` are the data's own names of roles.
pub(super) fn mask(
    reader: &mut Reader<'_>,
    entry: &str,
    kind: DatasetKind,
    roles: &[(String, String)],
) -> MaskSpec {
    let name = |field: &str| format!("{entry}.{field}");
    let has_conversations = matches!(
        kind,
        DatasetKind::Auto
            | DatasetKind::Messages
            | DatasetKind::PromptCompletion
            | DatasetKind::Instructions
    );
    for field in OF_CONVERSATIONS.iter().filter(|_| !has_conversations) {
        if let Some(given) = reader.given(&name(field)) {
            reader.problem(
                given,
                "is of conversations, and `type` says another shape".to_owned(),
            );
        }
    }
    let to_train = reader.texts(&name("roles_to_train"), Some(',')).map(|own| {
        let known = |own: String| {
            let mut pairs = roles
                .iter()
                .map(|(own, role)| (own.as_str(), role.as_str()));
            let found = pairs.find(|(name, _)| *name == own);
            let found = found.or_else(|| SHAREGPT_ROLES.into_iter().find(|(name, _)| *name == own));
            found.map_or(own.clone(), |(_, role)| role.to_owned())
        };
        own.into_iter().map(known).collect::<Vec<String>>()
    });
    let eos = reader
        .choice(&name("train_on_eos"), CHOICES)
        .unwrap_or_default();
    // As Axolotl does: what is said of one end holds for the other, too.
    let eot = reader.choice(&name("train_on_eot"), CHOICES).unwrap_or(eos);
    let mask = MaskSpec {
        roles: to_train.filter(|roles| !matches!(roles.as_slice(), [one] if one == "assistant")),
        eos,
        eot,
        last_only: reader.switch("mask_history").unwrap_or(false),
        training: reader.text(&name("message_field_training")),
        training_detail: reader.text(&name("message_field_training_detail")),
    };
    check(reader, entry, &mask);
    mask
}

/// Refuses what contradicts itself.
fn check(reader: &mut Reader<'_>, entry: &str, mask: &MaskSpec) {
    let name = |field: &str| format!("{entry}.{field}");
    // Those of every dataset end turns in all of them.
    let of_list = |list: &&'static str| {
        let (list, entries) = (*list, 0..reader.merged.datasets(list));
        entries.map(move |index| format!("{list}.{index}.eot_tokens"))
    };
    let eot_tokens = LISTS.iter().flat_map(of_list);
    let mut eot_tokens = std::iter::once("eot_tokens".to_owned()).chain(eot_tokens);
    let has_eot_tokens = eot_tokens.any(|name| reader.given(&name).is_some());
    if mask.eos != mask.eot
        && !has_eot_tokens
        && let Some(given) = reader.given(&name("train_on_eot"))
    {
        reader.problem(
            given,
            "says something else than `train_on_eos`, and without `eot_tokens` both are of the same token: give `eot_tokens`, or say the same in both"
                .to_owned(),
        );
    }
    if let Some(key) = &mask.training
        && Some(key) == mask.training_detail.as_ref()
        && let Some(given) = reader.given(&name("message_field_training_detail"))
    {
        let message = format!("and message_field_training both name `{}`", shorten(key));
        reader.problem(given, message);
    }
    if !reader.trains_on_inputs() {
        return;
    }
    let differs = [
        ("roles_to_train".to_owned(), mask.roles.is_some()),
        ("train_on_eos".to_owned(), mask.eos != EndOfTurn::Turn),
        ("train_on_eot".to_owned(), mask.eot != EndOfTurn::Turn),
    ];
    let differs = differs.map(|(field, differs)| (name(&field), differs));
    let history = [(
        "mask_history".to_owned(),
        mask.last_only && entry == "datasets.0",
    )];
    for (field, _) in differs
        .iter()
        .chain(&history)
        .filter(|(_, differs)| *differs)
    {
        if let Some(given) = reader.given(field) {
            reader.problem(
                given,
                "says what is learned, and `train_on_inputs` that everything is: remove one of them".to_owned(),
            );
        }
    }
}
