//! Problems of data, with file and line.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::super::rows::{Unit, place_of};

/// Most problems that are told one by one; the others are counted.
pub const MAX_PROBLEMS: usize = 20;

/// Most further lines with the same problem that are named; the others are counted.
const MAX_LINES: usize = 8;

/// Why data cannot be used: every problem with file and line.
#[derive(Debug, Default, Error)]
pub struct DataErrors {
    /// The first [`MAX_PROBLEMS`] problems, all different.
    pub problems: Vec<Problem>,
    /// Number of rows (or files) with a problem.
    pub total: usize,
}

/// A problem of one or more rows, or of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub file: Option<PathBuf>,
    /// Number of the first row that has the problem, from 1, and what it counts.
    pub line: Option<u64>,
    pub unit: Unit,
    pub reason: String,
    /// Lines of the next rows that have it.
    pub also: Vec<u64>,
    /// Number of rows that have it.
    pub rows: usize,
}

impl Problem {
    pub fn new(file: Option<&Path>, line: Option<u64>, reason: impl Into<String>) -> Self {
        Self {
            file: file.map(Path::to_owned),
            line,
            unit: Unit::Line,
            reason: reason.into(),
            also: Vec::new(),
            rows: 1,
        }
    }
}

impl DataErrors {
    pub fn one(file: Option<&Path>, reason: impl Into<String>) -> Self {
        Self {
            problems: vec![Problem::new(file, None, reason)],
            total: 1,
        }
    }

    pub fn push(&mut self, problem: Problem) {
        self.total += problem.rows;
        let known = self
            .problems
            .iter_mut()
            .find(|known| known.file == problem.file && known.reason == problem.reason);
        if let Some(known) = known {
            known.rows += problem.rows;
            let room = MAX_LINES.saturating_sub(known.also.len());
            known.also.extend(problem.line.into_iter().take(room));
        } else if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        }
    }

    pub fn merge(&mut self, other: Self) {
        let told: usize = other.problems.iter().map(|problem| problem.rows).sum();
        self.total += other.total - told;
        for problem in other.problems {
            self.push(problem);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// `Ok(value)`, unless there are problems.
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
        let told: usize = self.problems.iter().map(|problem| problem.rows).sum();
        match self.total - told {
            0 => Ok(()),
            1 => write!(f, "\n... and 1 more row that cannot be used"),
            more => write!(f, "\n... and {more} more rows that cannot be used"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.line) {
            (Some(file), Some(line)) => write!(f, "{}: ", place_of(file, line, self.unit))?,
            (Some(file), None) => write!(f, "{}: ", file.display())?,
            (None, _) => {}
        }
        f.write_str(&self.reason)?;
        if self.rows > 1 && !self.also.is_empty() {
            let lines: Vec<String> = self.also.iter().map(u64::to_string).collect();
            let more = if self.rows > lines.len() + 1 {
                ", ..."
            } else {
                ""
            };
            write!(
                f,
                " ({} rows; also {} {}{more})",
                self.rows,
                self.unit,
                lines.join(", ")
            )?;
        }
        Ok(())
    }
}
