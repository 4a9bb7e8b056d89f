//! Why data cannot be used, with file and line.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Problems that are told one by one; the others are counted.
pub const MAX_PROBLEMS: usize = 20;

/// Why data cannot be used: every problem with file and line.
#[derive(Debug, Default, Error)]
pub struct DataErrors {
    /// The first [`MAX_PROBLEMS`].
    pub problems: Vec<Problem>,
    pub total: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub file: Option<PathBuf>,
    /// Counted from 1; in a JSON array the number of the item.
    pub line: Option<u64>,
    pub reason: String,
}

impl DataErrors {
    pub fn one(file: Option<&Path>, reason: impl Into<String>) -> Self {
        let mut errors = Self::default();
        errors.push(Problem {
            file: file.map(Path::to_owned),
            line: None,
            reason: reason.into(),
        });
        errors
    }

    pub fn push(&mut self, problem: Problem) {
        self.total += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        }
    }

    pub fn merge(&mut self, other: Self) {
        let untold = other.total - other.problems.len();
        for problem in other.problems {
            self.push(problem);
        }
        self.total += untold;
    }

    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// `value`, unless there are problems.
    pub fn or<T>(self, value: T) -> Result<T, Self> {
        if self.is_empty() {
            Ok(value)
        } else {
            Err(self)
        }
    }
}

impl fmt::Display for DataErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let separator = if index > 0 { "\n" } else { "" };
            write!(f, "{separator}{problem}")?;
        }
        match self.total - self.problems.len() {
            0 => Ok(()),
            more => write!(f, "\n... and {more} more rows that cannot be used"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}:", file.display())?;
            match self.line {
                Some(line) => write!(f, "{line}: ")?,
                None => write!(f, " ")?,
            }
        }
        f.write_str(&self.reason)
    }
}
