//! What standard output is where it is a terminal: its width, and what it can show.

use std::ffi::OsString;
use std::io::IsTerminal;

use super::text::Style;

/// Width of a terminal that does not say how wide it is.
const USUAL_COLUMNS: usize = 80;

/// A terminal that takes cursor movements.
#[derive(Clone, Debug)]
pub(super) struct Screen {
    style: Style,
    /// A fixed width, in tests; None for a real terminal, which may change.
    columns: Option<usize>,
}

impl Screen {
    /// Standard output as a screen; None where it is no terminal, or a dumb one.
    pub fn of_stdout() -> Option<Self> {
        let is_dumb = variable("TERM").is_some_and(|term| term == "dumb");
        if is_dumb || !std::io::stdout().is_terminal() {
            return None;
        }
        let style = Style {
            colour: variable("NO_COLOR").is_none(),
            unicode: cfg!(windows) || is_unicode(variable),
        };
        Some(Self {
            style,
            columns: None,
        })
    }

    #[cfg(test)]
    pub fn of(style: Style, columns: usize) -> Self {
        let columns = Some(columns);
        Self { style, columns }
    }

    pub fn style(&self) -> Style {
        self.style
    }

    pub fn columns(&self) -> usize {
        let told = || Some(console::Term::stdout().size_checked()?.1.into());
        self.columns.or_else(told).unwrap_or(USUAL_COLUMNS)
    }
}

/// An environment variable; an empty one counts as none.
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Whether the locale has UTF-8: the first of its three variables that is set decides, as for every program.
fn is_unicode(variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .find_map(variable);
    let locale = locale.unwrap_or_default().to_string_lossy().to_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_locale_says_whether_there_is_more_than_ascii() {
        let unicode = |set: &[(&str, &str)]| {
            is_unicode(|name| {
                let found = set.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| OsString::from(value))
            })
        };
        assert!(unicode(&[("LANG", "en_GB.UTF-8")]));
        assert!(unicode(&[("LC_CTYPE", "C.utf8"), ("LANG", "C")]));
        assert!(!unicode(&[("LC_ALL", "C"), ("LANG", "en_GB.UTF-8")]));
        assert!(!unicode(&[("LANG", "de_DE.ISO-8859-1")]));
        assert!(!unicode(&[]));
    }
}
