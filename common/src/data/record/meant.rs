//! What was probably meant by a name that nobody knows.

use serde_json::{Map, Value as Json};

/// Which columns the row has instead of the wanted ones, and which of them was probably meant, in words.
pub(super) fn columns_found(row: &Map<String, Json>, wanted: &[&str]) -> String {
    let names: Vec<&str> = row.keys().map(String::as_str).collect();
    if names.is_empty() {
        return "the row is empty".to_owned();
    }
    let listed: Vec<String> = names
        .iter()
        .take(12)
        .map(|name| format!("`{name}`"))
        .collect();
    let more = if names.len() > 12 { ", ..." } else { "" };
    let meant = names
        .iter()
        .find(|name| nearest(&name.to_lowercase(), wanted).is_some())
        .map(|name| format!(" (did you mean `{name}`?)"))
        .unwrap_or_default();
    format!("found {}{more}{meant}", listed.join(", "))
}

/// The known word that is nearest to this one, if one is near.
pub(super) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|name| (strsim::damerau_levenshtein(word, name), *name))
        .filter(|(distance, name)| *distance <= name.len().max(word.len()).div_ceil(3))
        .min()
        .map(|(_, name)| name)
}
