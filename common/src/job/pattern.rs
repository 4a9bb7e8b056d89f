//! Regular expressions that name modules and tensors, and the names that these have.

use regex::Regex;

/// A pattern for the whole path of a module. The error is one line for people.
pub fn whole_path(pattern: &str) -> Result<Regex, String> {
    compile(&format!("^(?:{pattern})$"))
}

/// A regular expression. The error is one line for people.
pub(super) fn compile(pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|error| match error {
        regex::Error::CompiledTooBig(_) => "is too big".to_owned(),
        // The last line says what is wrong; those before it draw the place.
        error => {
            let told = error.to_string();
            let reason = told.lines().last().unwrap_or_default();
            reason.trim_start_matches("error: ").to_owned()
        }
    })
}

/// The names of a tensor or a module: its own, and, of the decoder without its output layer, those that it has as a part of a model
/// that sees, too.
pub fn spellings(name: &str) -> Vec<String> {
    let mut spellings = vec![name.to_owned()];
    if let Some(inner) = name.strip_prefix("model.") {
        spellings.push(format!("model.language_model.{inner}"));
        spellings.push(format!("language_model.model.{inner}"));
    }
    spellings
}
