//! What is shown of a program's log, and how: on standard error, each line with its time in UTC where that is no terminal.
//! `--log-level` decides, else MUSTER_LOG, else RUST_LOG.

use std::fmt;
use std::io::IsTerminal;
use std::time::SystemTime;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::writer::MakeWriter;

use crate::timestamp;

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
/// Our own before everybody's.
const VARIABLES: [&str; 2] = ["MUSTER_LOG", "RUST_LOG"];

/// Checks what follows `--log-level`: a level, or levels of single modules.
pub fn parse_level(text: &str) -> Result<String, String> {
    let is_known = |part: &str| {
        let part = part.trim();
        LEVELS.contains(&part.to_lowercase().as_str()) || part.contains('=')
    };
    let usable = text.split(',').all(is_known) && EnvFilter::try_new(text).is_ok();
    match usable {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "use {}, or MODULE=LEVEL, several with commas",
            LEVELS.join(", ")
        )),
    }
}

/// Begins the log of this process. `asked` comes from the command line; `usual` is shown where nobody asked for anything.
pub fn begin<W>(asked: Option<&str>, usual: &str, writer: W)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let variable = |name: &str| std::env::var(name).ok();
    let (filter, complaint) = filter(asked, variable, usual);
    let is_terminal = std::io::stderr().is_terminal();
    let has_colour = is_terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(has_colour)
        .with_target(false)
        // They would go to the same place.
        .log_internal_errors(false);
    match is_terminal {
        true => log.without_time().init(),
        false => log.with_timer(Utc).init(),
    }
    if let Some(complaint) = complaint {
        tracing::warn!("{complaint}");
    }
}

/// The filter, and what is wrong with the environment.
fn filter(
    asked: Option<&str>,
    variable: impl Fn(&str) -> Option<String>,
    usual: &str,
) -> (EnvFilter, Option<String>) {
    if let Some(filter) = asked.and_then(|asked| EnvFilter::try_new(asked).ok()) {
        return (filter, None);
    }
    let found = VARIABLES.into_iter().find_map(|name| {
        let value = variable(name).filter(|value| !value.trim().is_empty())?;
        Some((name, value))
    });
    let Some((name, value)) = found else {
        return (EnvFilter::new(usual), None);
    };
    match EnvFilter::try_new(&value) {
        Ok(filter) => (filter, None),
        Err(error) => {
            let complaint = format!("{name} is passed over, it is no filter: {error}");
            (EnvFilter::new(usual), Some(complaint))
        }
    }
}

struct Utc;

impl FormatTime for Utc {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        writer.write_str(&timestamp::milliseconds(SystemTime::now()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_wins_then_our_variable_then_everybodys() {
        let shown = |asked: Option<&str>, set: &[(&str, &str)]| {
            let variable = |name: &str| {
                let found = set.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            let (filter, complaint) = filter(asked, variable, "warn");
            (filter.to_string(), complaint)
        };
        let both = [("MUSTER_LOG", "debug"), ("RUST_LOG", "trace")];
        assert_eq!(shown(Some("error"), &both).0, "error");
        assert_eq!(shown(None, &both).0, "debug");
        assert_eq!(shown(None, &both[1..]).0, "trace");
        assert_eq!(shown(None, &[("MUSTER_LOG", ""), both[1]]).0, "trace");
        assert_eq!(shown(None, &[]), ("warn".to_owned(), None));
        let (used, complaint) = shown(None, &[("RUST_LOG", "a=b=c")]);
        assert_eq!(used, "warn");
        let complaint = complaint.unwrap();
        assert!(
            complaint.starts_with("RUST_LOG is passed over"),
            "{complaint}"
        );
    }

    #[test]
    fn a_level_that_is_none_is_refused() {
        for level in ["off", "INFO", "debug", "warn,worker=trace", "h2=debug"] {
            assert_eq!(parse_level(level).unwrap(), level);
        }
        for wrong in ["verbose", "", "info,,", "2"] {
            let error = parse_level(wrong).unwrap_err();
            assert!(error.contains("off, error, warn, info"), "{error}");
        }
    }
}
