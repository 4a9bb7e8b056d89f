//! Why nothing of the data is learned.
//!
//! Enters: counts of what was left out, and of rows that say themselves that little or nothing of them is learned. Leaves: a line
//! with each cause that is known, and how much it left out.

use super::counts::DataCounts;
use crate::job::JobSpec;
use crate::text::count;

/// Numbers of rows that say themselves that little or nothing of them is learned.
#[derive(Clone, Copy, Debug, Default)]
pub struct UnlearnedRows {
    /// An answer says that it is not learned.
    pub says_no: u64,
    /// No message, segment or token says that it is learned, and nothing else is.
    pub marks_nothing: u64,
    /// An answer is empty.
    pub is_empty: u64,
}

/// What a message, a segment or a row has that is not learned.
const SWITCHES: &str = "`train: false`, `weight: 0` or `loss: false`";

/// An error that there is nothing to learn: `what`, with all that left something out.
pub fn nothing_to_learn(
    job: &JobSpec,
    counts: &DataCounts,
    unlearned: UnlearnedRows,
    what: &str,
) -> String {
    let rows = count(counts.rows, "row");
    let mut causes = causes(job, counts, unlearned);
    match unlearned.says_no {
        0 if causes.is_empty() => {
            return format!("nothing to learn: {what} (is every answer empty?)");
        }
        0 => {}
        all if all == counts.rows && causes.is_empty() => {
            return format!(
                "nothing to learn: {what}, because answers say that they are not learned ({SWITCHES}) in all of {rows}"
            );
        }
        some => causes.push(format!(
            "answers of {} say that they are not learned ({SWITCHES})",
            count(some, "row")
        )),
    }
    format!("nothing to learn: {what}: of {rows}, {}", causes.join(", "))
}

/// What left examples and rows out, in a clause each, but for answers that say so.
fn causes(job: &JobSpec, counts: &DataCounts, unlearned: UnlearnedRows) -> Vec<String> {
    let told = |number: u64, what: &str, [one, many]: [&str; 2], why: &str| {
        let verb = if number == 1 { one } else { many };
        (number > 0).then(|| format!("{} {verb} {why}", count(number, what)))
    };
    let only_marked = job
        .all_datasets()
        .any(|dataset| dataset.mask.roles.as_ref().is_some_and(Vec::is_empty));
    let marks = match only_marked {
        true => "nothing as learned (roles_to_train: [] learns only messages that say so)",
        false => "nothing as learned",
    };
    let are = ["is", "are"];
    let short = format!("shorter than min_sample_len {}", job.mixture.min_sample_len);
    let sequence_len = job.sequence_len;
    let longer = format!("longer than sequence_len {sequence_len} (excess_length_strategy: drop)");
    let cut =
        format!("cut off behind sequence_len {sequence_len} (excess_length_strategy: truncate)");
    let before = "there before (dataset_exact_deduplication)";
    let causes = [
        told(counts.short_examples, "example", are, &short),
        told(counts.duplicate_rows, "row", ["was", "were"], before),
        told(counts.dropped_examples, "example", are, &longer),
        told(counts.truncated_examples, "example", are, &cut),
        told(unlearned.marks_nothing, "row", ["marks", "mark"], marks),
        told(
            unlearned.is_empty,
            "row",
            ["has", "have"],
            "an empty answer",
        ),
    ];
    causes.into_iter().flatten().collect()
}
