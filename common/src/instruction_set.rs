//! Which instructions of a processor loops use: the best that it has, or those that a test asks for. The bits are the same with all of
//! them.

use std::sync::OnceLock;

/// The variable that names the instructions to use, for tests.
const VARIABLE: &str = "MUSTER_ISA";

/// From the least to the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstructionSet {
    /// What every processor of the architecture has.
    Scalar,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    /// The products of pairs of bfloat16 besides.
    Avx512Bf16,
}

impl InstructionSet {
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether this processor has them.
    pub fn is_there(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma");
            let avx512 =
                has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
            match self {
                Self::Scalar => true,
                Self::Avx2 => avx2,
                Self::Avx512 => avx2 && avx512,
                Self::Avx512Bf16 => avx2 && avx512 && has!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Scalar
        }
    }

    fn best() -> Self {
        let there = Self::ALL.into_iter().rev().find(|set| set.is_there());
        there.unwrap_or(Self::Scalar)
    }

    /// What loops use in this process.
    pub fn chosen() -> Self {
        static CHOSEN: OnceLock<InstructionSet> = OnceLock::new();
        *CHOSEN.get_or_init(|| asked().ok().flatten().unwrap_or_else(Self::best))
    }
}

/// What a test asks for, if it does.
fn asked() -> Result<Option<InstructionSet>, String> {
    match std::env::var(VARIABLE) {
        Ok(name) => of_name(&name).map(Some),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => Err(format!("{VARIABLE} is not text")),
    }
}

fn of_name(name: &str) -> Result<InstructionSet, String> {
    let mut all = InstructionSet::ALL.into_iter();
    let Some(set) = all.find(|set| set.name() == name) else {
        let names = InstructionSet::ALL.map(InstructionSet::name).join(", ");
        return Err(format!("{VARIABLE} is {name}, which is none of {names}"));
    };
    match set.is_there() {
        true => Ok(set),
        false => Err(format!(
            "{VARIABLE} is {name}, and this processor does not have that"
        )),
    }
}

/// Checks what a test asks for.
///
/// # Errors
/// One line, where this processor does not have it, or nobody knows it.
pub fn check() -> Result<(), String> {
    asked().map(drop)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_others_refused_with_those_there_are() {
        assert_eq!(of_name("scalar"), Ok(InstructionSet::Scalar));
        let message = of_name("sse9").unwrap_err();
        assert!(
            message.contains("sse9") && message.contains("scalar, avx2, avx512, avx512bf16"),
            "{message}"
        );
        for set in InstructionSet::ALL {
            assert_eq!(of_name(set.name()).is_ok(), set.is_there(), "{set:?}");
        }
    }
}
