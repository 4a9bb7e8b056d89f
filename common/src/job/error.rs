//! Problems of a job: every one at once, each with the place it came from.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// Where a value was given.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The job file as a whole, for what is missing from it.
    File(Arc<PathBuf>),
    /// A line of the job file, from 1.
    Line(Arc<PathBuf>, usize),
    /// An environment variable, by its full name.
    Environment(String),
    /// A flag as the user typed it: `--set lora_r` or `--lora-r`.
    Flag(String),
    /// Given nowhere: neither in a file, the environment nor flags.
    Nowhere,
}

impl Origin {
    /// The place in words, for a message that is already about the same file.
    pub(super) fn place(&self) -> String {
        match self {
            Self::Line(_, line) => format!("line {line}"),
            other => other.to_string(),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Line(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Flag(flag) => f.write_str(flag),
            Self::Nowhere => f.write_str("job"),
        }
    }
}

/// One problem; its display is one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub origin: Origin,
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.message)
    }
}

/// All problems of a job, in the order of their places: file lines, environment, flags, what is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobErrors {
    pub problems: Vec<Problem>,
}

impl fmt::Display for JobErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for JobErrors {}

/// Collects problems, so that one run reports them all.
#[derive(Debug, Default)]
pub(super) struct Problems(Vec<Problem>);

impl Problems {
    pub fn add(&mut self, origin: &Origin, message: impl Into<String>) {
        // User text may hold line breaks; a problem is one line.
        let message = message
            .into()
            .replace(['\n', '\r'], " ")
            .chars()
            .filter(|c| !c.is_control())
            .collect();
        let problem = Problem {
            origin: origin.clone(),
            message,
        };
        if !self.0.contains(&problem) {
            self.0.push(problem);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn into_errors(mut self) -> JobErrors {
        self.0.sort_by(|a, b| a.origin.cmp(&b.origin));
        JobErrors { problems: self.0 }
    }
}
