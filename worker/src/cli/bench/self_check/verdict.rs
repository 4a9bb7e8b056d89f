//! What a comparison came to.

/// What a comparison came to.
pub enum Verdict {
    Passed(String),
    Failed(String),
    /// Passed, but slower than was aimed at.
    #[cfg(feature = "cuda")]
    Slow(String),
}

/// A verdict of passed or failed, with what there is to tell.
pub fn verdict(passed: bool, told: String) -> Verdict {
    match passed {
        true => Verdict::Passed(told),
        false => Verdict::Failed(told),
    }
}
