//! How fast a GPU trains the shapes that Muster is measured by, on random weights. In: a GPU. Out: figures, and whether they are
//! what was aimed at on an H200.

use std::path::Path;

use worker::ComputeDevice;

use super::verdict::Verdict;
use crate::cli::bench::{BenchArgs, BenchError, Mode, ReductionName, Report, Work, measure};

const SMALL: &str = include_str!("../../../../benches/shapes/qwen3-0.6b.json");
const LARGE: &str = include_str!("../../../../benches/shapes/llama-3.1-8b.json");

/// Steps of a comparison between two settings, whose difference is small.
const COMPARED_STEPS: u16 = 15;
/// How much longer an exact step may take than a fast one, as a share.
const EXACT_GOAL: f64 = 0.02;

/// A row of the table that measures a speed.
#[derive(Clone, Copy)]
pub struct Speed {
    pub name: &'static str,
    config: &'static str,
    mode: Mode,
    batch: u16,
    seq: u32,
    gradient_checkpointing: bool,
    /// Whether the linears are in 4 bits.
    in_4_bits: bool,
    measure: Measure,
}

#[derive(Clone, Copy)]
enum Measure {
    /// The share of the published peak that is aimed at.
    Utilisation(f64),
    /// The TFLOP/s that are aimed at.
    Arithmetic(f64),
    /// Figures alone: the goal is a ratio to PyTorch's.
    Figures,
    /// The time of a step with exact sums, against one with fast ones.
    Reductions,
}

impl Speed {
    const fn small(name: &'static str, mode: Mode, measure: Measure) -> Self {
        Self {
            name,
            config: SMALL,
            mode,
            batch: 8,
            seq: 2048,
            gradient_checkpointing: false,
            in_4_bits: false,
            measure,
        }
    }

    pub fn all() -> [Self; 6] {
        let large = Self {
            name: "8B, LoRA, 2 x 4096, checkpointing",
            config: LARGE,
            mode: Mode::Lora,
            batch: 2,
            seq: 4096,
            gradient_checkpointing: true,
            in_4_bits: false,
            measure: Measure::Arithmetic(400.0),
        };
        [
            Self::small(
                "0.6B, LoRA, 8 x 2048",
                Mode::Lora,
                Measure::Utilisation(0.45),
            ),
            Self {
                in_4_bits: true,
                ..Self::small("0.6B, 4 bits, 8 x 2048", Mode::Lora, Measure::Figures)
            },
            Self::small("0.6B, all weights, 8 x 2048", Mode::Full, Measure::Figures),
            Self::small("0.6B, LoRA, 8 x 2048", Mode::Lora, Measure::Reductions),
            Self::small(
                "0.6B, all weights, 8 x 2048",
                Mode::Full,
                Measure::Reductions,
            ),
            large,
        ]
    }

    pub fn told(&self) -> &'static str {
        match self.measure {
            Measure::Reductions => "exact against fast sums",
            _ => "speed in bfloat16",
        }
    }

    pub fn run(&self, device: &ComputeDevice) -> Result<Verdict, BenchError> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("config.json");
        std::fs::write(&path, self.config)?;
        if let Measure::Reductions = self.measure {
            return self.compare_reductions(&path, device);
        }
        let report = self.measured(&path, device, ReductionName::Exact, 5)?;
        let goal = match self.measure {
            Measure::Utilisation(goal) => report.mfu.map(|mfu| (mfu >= goal, "MFU 45%")),
            Measure::Arithmetic(goal) => Some((report.gflops / 1e3 >= goal, "400 TFLOP/s")),
            _ => None,
        };
        Ok(with_goal(told(&report), goal))
    }

    fn compare_reductions(
        &self,
        config: &Path,
        device: &ComputeDevice,
    ) -> Result<Verdict, BenchError> {
        let seconds = |reduction| -> Result<f64, BenchError> {
            let report = self.measured(config, device, reduction, COMPARED_STEPS)?;
            Ok(report.step_seconds)
        };
        let (exact, fast) = (
            seconds(ReductionName::Exact)?,
            seconds(ReductionName::Fast)?,
        );
        let more = exact / fast - 1.0;
        let told = format!(
            "{:.2} ms against {:.2} ms a step ({:+.1}%)",
            1e3 * exact,
            1e3 * fast,
            100.0 * more
        );
        Ok(with_goal(told, Some((more <= EXACT_GOAL, "+2%"))))
    }

    fn measured(
        &self,
        config: &Path,
        device: &ComputeDevice,
        reduction: ReductionName,
        steps: u16,
    ) -> Result<Report, BenchError> {
        let args = BenchArgs {
            config: config.to_owned(),
            mode: self.mode,
            batch: self.batch,
            seq: self.seq,
            gradient_checkpointing: self.gradient_checkpointing,
            load_in_4bit: self.in_4_bits,
            reduction,
            steps,
            warmup: 2,
            ..BenchArgs::default()
        };
        measure(&args, &Work::of(&args, device.clone())?)
    }
}

/// The verdict on a measured speed: a goal that is missed is no failure of the program.
fn with_goal(told: String, goal: Option<(bool, &str)>) -> Verdict {
    match goal {
        Some((true, goal)) => {
            Verdict::Passed(format!("{told}; the goal on an H200, {goal}, is met"))
        }
        Some((false, goal)) => Verdict::Slow(format!("{told}; the goal on an H200 is {goal}")),
        None => Verdict::Passed(told),
    }
}

fn told(report: &Report) -> String {
    let mfu = report.mfu.map(|mfu| format!(", MFU {:.1}%", 100.0 * mfu));
    format!(
        "{:.0} tokens/s, {:.1} ms a step, {}, {:.1} TFLOP/s, {:.0}% of the {:.0} that products alone reach{}",
        report.tokens_per_second_median,
        1e3 * report.step_seconds,
        common::memory::bytes(report.peak_memory_bytes),
        report.gflops / 1e3,
        100.0 * report.share_of_gemm_peak,
        report.gemm_peak_gflops / 1e3,
        mfu.unwrap_or_default()
    )
}
