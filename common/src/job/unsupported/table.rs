//! Rows of the tables of foreign keys.

/// Foreign keys that are treated alike. A name that ends in `*` stands for all that begin so.
pub(super) struct Group {
    pub keys: &'static [&'static str],
    pub rule: Rule,
}

/// Which values of a foreign key change nothing; the text is the advice where another value is refused.
pub(super) enum Rule {
    /// Whatever it says, the result is the same.
    Inert,
    /// These values change nothing, others are refused. `*` at the beginning stands for anything.
    InertIf(&'static [&'static str], &'static str),
    /// These values are what is done anyway, others are refused.
    Only(&'static [&'static str], &'static str),
    /// These values are what is done anyway; for any other the text says what is done in its place.
    Instead(&'static [&'static str], &'static str),
    /// As `Instead`, but entries of a mapping that decide the result are refused with the last text, unless they say `auto`, bfloat16
    /// or nothing.
    InsteadUnless {
        off: &'static [&'static str],
        told: &'static str,
        deciding: &'static [&'static str],
        advice: &'static str,
    },
}

/// Values that switch a key off.
pub(super) const OFF: &[&str] = &["false", "no", "off", "none", "0", "0.0"];
pub(super) const ON: &[&str] = &["true", "yes", "on", "1"];

/// Advice that both tables give.
pub(super) const ONLY_SFT: &str = "only supervised fine-tuning is supported";
pub(super) const NOTHING_SHARDED: &str =
    "nothing is sharded or offloaded: each worker holds the whole model";
