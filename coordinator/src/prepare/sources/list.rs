//! The lists of datasets that a job has.

/// A list of datasets of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    Trained,
    /// Those that are evaluated and never trained on.
    Evaluated,
}

impl List {
    pub const ALL: [Self; 2] = [Self::Trained, Self::Evaluated];

    /// Its field of the job.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trained => "datasets",
            Self::Evaluated => "test_datasets",
        }
    }
}
