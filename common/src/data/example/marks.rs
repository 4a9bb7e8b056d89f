//! What is learned by the word of a template with `{% generation %}` marks.
//!
//! Enters: the marked bytes of a text and the answers in it. Leaves: the marked bytes of those answers, as they are.

use std::ops::Range;

use super::answer::Learned;
use super::parts::Parts;

/// The marked bytes of the answers to learn; those of others are left out.
pub fn learned(
    marked: &[Range<usize>],
    parts: &Parts,
    answers: Vec<(usize, Learned)>,
) -> Result<Vec<Learned>, String> {
    let mut learned = Vec::new();
    for (turn, Learned { span, limit, .. }) in answers {
        // A mark may take in the header before the answer.
        let previous = parts.previous_end(turn).filter(|_| parts.are_placed);
        let start = previous.map_or(span.start, |previous| previous.min(span.start));
        // A mark that ends before the answer and begins before this range is of the answer before it.
        let own: Vec<Range<usize>> = marked
            .iter()
            .filter(|mark| mark.start >= start || mark.end > span.start)
            .cloned()
            .collect();
        learned.extend(inside(&own, start..limit)?);
    }
    Ok(learned)
}

/// The marked bytes of an answer that ends its text and begins at `start`.
pub fn learned_last(marked: &[Range<usize>], start: usize) -> Vec<Learned> {
    let its = marked.iter().filter(|mark| mark.end > start);
    its.map(whole).collect()
}

/// The marked bytes in this range. A mark that reaches out of it cannot be divided among answers.
fn inside(marked: &[Range<usize>], range: Range<usize>) -> Result<Vec<Learned>, String> {
    let overlapping = marked
        .iter()
        .filter(|mark| mark.start < range.end && mark.end > range.start);
    overlapping
        .map(|mark| {
            if mark.start < range.start || mark.end > range.end {
                return Err(
                    "a generation mark of the chat template reaches over several messages"
                        .to_owned(),
                );
            }
            Ok(whole(mark))
        })
        .collect()
}

fn whole(mark: &Range<usize>) -> Learned {
    Learned::answer(mark.clone(), mark.end)
}
