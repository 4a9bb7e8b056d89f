//! Regular expressions that name modules by their paths.

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
