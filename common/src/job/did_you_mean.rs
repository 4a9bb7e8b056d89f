//! What was probably meant by a name that nobody knows.

/// The hint `; did you mean `x`?`, or nothing where no candidate is near.
pub(super) fn did_you_mean<'a>(text: &str, candidates: impl Iterator<Item = &'a str>) -> String {
    // Distances cost the product of the lengths.
    let text: String = text
        .chars()
        .take(60)
        .collect::<String>()
        .to_ascii_lowercase();
    candidates
        .map(|candidate| {
            let edits = strsim::normalized_damerau_levenshtein(&text, candidate);
            (
                edits.max(strsim::jaro_winkler(&text, candidate) - 0.2),
                candidate,
            )
        })
        .filter(|(nearness, _)| *nearness >= 0.65)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| format!("; did you mean `{candidate}`?"))
        .unwrap_or_default()
}
