//! Rows that are tokens already: `input_ids`, and `labels` or a mask that says which of them are learned.
//!
//! Source of the names: Axolotl and Transformers (`labels`, -100 where nothing is learned; `attention_mask`), TRL
//! (`completion_mask`, `assistant_masks`).

use serde_json::{Map, Value as Json};

use super::super::json::kind_of;
use super::{Record, column};

const IDS: &str = "input_ids";
const LABELS: &str = "labels";
const ATTENTION: &str = "attention_mask";

/// Masks of TRL: a token is learned where all that are there say 1.
const MASKS: [&str; 2] = ["completion_mask", "assistant_masks"];

/// All columns that are read.
pub(super) const COLUMNS: [&str; 5] = [IDS, LABELS, ATTENTION, MASKS[0], MASKS[1]];

/// Label of a token that is not learned (Transformers).
const IGNORED: i64 = -100;

/// Whether a row is of this shape by its columns.
pub(super) fn is_one(row: &Map<String, Json>) -> bool {
    let is_list = |name: &str| row.get(name).is_some_and(Json::is_array);
    is_list(IDS) && (is_list(LABELS) || MASKS.iter().any(|name| is_list(name)))
}

/// The tokens of a row, without the padding at its ends.
pub(super) fn read(row: &Map<String, Json>) -> Result<Record, String> {
    let ids = numbers(column(row, IDS)?, IDS)?;
    if ids.is_empty() {
        return Err(format!("column `{IDS}` has no tokens"));
    }
    let list = |name: &str| match row.get(name) {
        None | Some(Json::Null) => Ok(None),
        Some(value) => {
            let list = numbers(value, name)?;
            match list.len() == ids.len() {
                true => Ok(Some(list)),
                false => Err(format!(
                    "`{name}` has {} entries, and `{IDS}` {}",
                    list.len(),
                    ids.len()
                )),
            }
        }
    };
    let labels = list(LABELS)?;
    let mut learned = match &labels {
        Some(labels) => learned_of(&ids, labels)?,
        None => vec![true; ids.len()],
    };
    let mut is_masked = labels.is_some();
    for name in MASKS {
        let Some(mask) = list(name)? else {
            continue;
        };
        is_masked = true;
        for (learned, is_on) in learned.iter_mut().zip(switches(&mask, name)?) {
            *learned &= is_on;
        }
    }
    if !is_masked {
        return Err(format!(
            "no column `{LABELS}`, which says which tokens of `{IDS}` are learned (-100: not)"
        ));
    }
    let attended = match list(ATTENTION)? {
        Some(mask) => attended(&switches(&mask, ATTENTION)?, &learned)?,
        None => 0..ids.len(),
    };
    let tokens = ids[attended.clone()]
        .iter()
        .map(|id| u32::try_from(*id).map_err(|_| format!("`{IDS}` has {id}, which is no token")));
    Ok(Record::Tokens {
        ids: tokens.collect::<Result<_, _>>()?,
        learned: learned[attended].to_vec(),
    })
}

/// Which tokens their labels teach. A label that is another token is refused: what is predicted is always the next token.
fn learned_of(ids: &[i64], labels: &[i64]) -> Result<Vec<bool>, String> {
    let pairs = ids.iter().zip(labels).enumerate();
    let learned = pairs.map(|(at, (id, label))| match *label {
        IGNORED => Ok(false),
        label if label == *id => Ok(true),
        label => Err(format!(
            "entry {} of `{LABELS}` is {label}, and the token there is {id}: a label is its own token, or {IGNORED} where it is not learned",
            at + 1
        )),
    });
    learned.collect()
}

/// The stretch of tokens that are no padding.
fn attended(mask: &[bool], learned: &[bool]) -> Result<std::ops::Range<usize>, String> {
    let first = mask.iter().position(|seen| *seen);
    let last = mask.iter().rposition(|seen| *seen);
    let (Some(first), Some(last)) = (first, last) else {
        return Err(format!("`{ATTENTION}` is 0 everywhere"));
    };
    if let Some(hole) = mask[first..=last].iter().position(|seen| !seen) {
        return Err(format!(
            "entry {} of `{ATTENTION}` is 0 between tokens that are seen: only padding at the ends can be left out",
            first + hole + 1
        ));
    }
    if let Some(at) = (0..mask.len()).find(|at| learned[*at] && !mask[*at]) {
        return Err(format!(
            "entry {} of `{LABELS}` is learned, and `{ATTENTION}` says that it is padding",
            at + 1
        ));
    }
    Ok(first..last + 1)
}

fn switches(mask: &[i64], name: &str) -> Result<Vec<bool>, String> {
    let of = |(at, value): (usize, &i64)| match value {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(format!(
            "entry {} of `{name}` is {other}, not 0 or 1",
            at + 1
        )),
    };
    mask.iter().enumerate().map(of).collect()
}

fn numbers(value: &Json, name: &str) -> Result<Vec<i64>, String> {
    let Json::Array(list) = value else {
        return Err(format!(
            "column `{name}` must be a list of whole numbers, not {}",
            kind_of(value)
        ));
    };
    let number = |(at, item): (usize, &Json)| match item {
        Json::Bool(is_on) => Ok(i64::from(*is_on)),
        item => item.as_i64().ok_or_else(|| {
            format!(
                "entry {} of `{name}` is no whole number: {}",
                at + 1,
                kind_of(item)
            )
        }),
    };
    list.iter().enumerate().map(number).collect()
}
