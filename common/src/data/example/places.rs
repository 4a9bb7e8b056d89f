//! Finds many answers without rendering the conversation up to each of them.
//!
//! Enters: a conversation, what its text shows, and a way to find one answer exactly. Leaves: where every answer is. In
//! long conversations answers of one kind (after and before the same roles, showing the same parts) are found exactly
//! at some places; if the template's own text before and after them is the same there, they all have it.

use std::collections::BTreeMap;

use super::super::record::Chat;
use super::answer::{Answer, Learned, limit};
use super::parts::Parts;

/// Up to so many answers are all found exactly.
const FEW: usize = 6;

/// What a template may tell answers apart by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    previous: Option<(String, bool)>,
    next: Option<(String, bool)>,
    is_after_last_user: bool,
    is_first: bool,
    /// For each part what it is and which of its ends are shown.
    parts: Vec<(u8, bool, bool)>,
}

/// What the template itself writes around an answer, between its parts and those of its neighbours.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Surroundings {
    /// Text from where the answer begins to what it says first.
    lead: String,
    /// Text from where it ends to what the next message says first.
    back: String,
}

pub fn infer(
    chat: &Chat,
    full: &str,
    parts: &Parts,
    turns: &[usize],
    exact: impl Fn(usize) -> Result<Answer, String>,
) -> Result<Vec<Answer>, String> {
    if turns.len() <= FEW || !parts.are_placed {
        return turns.iter().map(|turn| exact(*turn)).collect();
    }
    let mut answers: BTreeMap<usize, Answer> = BTreeMap::new();
    for turns in by_kind(chat, parts, turns) {
        let mut known = Vec::new();
        for turn in samples(&turns) {
            let answer = exact(turn)?;
            known.push(surroundings(&answer, full, parts, turn));
            answers.insert(turn, answer);
        }
        let common = known.first().cloned().flatten();
        let common = common.filter(|first| known.iter().all(|other| other.as_ref() == Some(first)));
        for turn in turns {
            if answers.contains_key(&turn) {
                continue;
            }
            let inferred = common
                .as_ref()
                .and_then(|common| place(common, full, parts, turn));
            let answer = match inferred {
                Some(learned) => Answer::Whole(learned),
                None => exact(turn)?,
            };
            answers.insert(turn, answer);
        }
    }
    Ok(answers.into_values().collect())
}

fn by_kind(chat: &Chat, parts: &Parts, turns: &[usize]) -> Vec<Vec<usize>> {
    let last_user = chat.messages.iter().rposition(|m| m["role"] == "user");
    let neighbour = |index: Option<usize>| {
        let message = chat.messages.get(index?)?;
        let calls = message["tool_calls"].as_array();
        let role = message["role"].as_str().unwrap_or_default().to_owned();
        Some((role, calls.is_some_and(|calls| !calls.is_empty())))
    };
    let mut kinds: BTreeMap<Kind, Vec<usize>> = BTreeMap::new();
    for turn in turns {
        let kind = Kind {
            previous: neighbour(turn.checked_sub(1)),
            next: neighbour(Some(turn + 1)),
            is_after_last_user: last_user.is_some_and(|last| *turn > last),
            is_first: *turn <= 1,
            parts: parts
                .of(*turn)
                .map(|part| (part.kind as u8, part.start.is_some(), part.end.is_some()))
                .collect(),
        };
        kinds.entry(kind).or_default().push(*turn);
    }
    kinds.into_values().collect()
}

/// Turns that are found exactly: all of a few, else some at both ends and in the middle.
fn samples(turns: &[usize]) -> Vec<usize> {
    let last = turns.len() - 1;
    match turns.len() <= FEW {
        true => turns.to_vec(),
        false => [0, 1, last / 2, last - 1, last]
            .map(|index| turns[index])
            .to_vec(),
    }
}

fn surroundings(answer: &Answer, full: &str, parts: &Parts, turn: usize) -> Option<Surroundings> {
    let Answer::Whole(Learned { span, is_open, .. }) = answer else {
        return None;
    };
    let first = parts.bounds(turn)?.start;
    let next = parts.next_start(turn, full.len())?;
    (!is_open).then_some(Surroundings {
        lead: full.get(span.start..first)?.to_owned(),
        back: full.get(span.end..next)?.to_owned(),
    })
}

/// The place of an answer, if the template writes the same around it.
fn place(common: &Surroundings, full: &str, parts: &Parts, turn: usize) -> Option<Learned> {
    let bounds = parts.bounds(turn)?;
    let next = parts.next_start(turn, full.len())?;
    let start = bounds.start.checked_sub(common.lead.len())?;
    let end = next.checked_sub(common.back.len())?;
    let is_same = full.get(start..bounds.start) == Some(common.lead.as_str())
        && full.get(end..next) == Some(common.back.as_str());
    let is_apart = parts
        .previous_end(turn)
        .is_some_and(|previous| previous <= start);
    (is_same && is_apart && bounds.end <= end)
        .then(|| Learned::answer(start..end, limit(full, parts, turn, end)))
}
