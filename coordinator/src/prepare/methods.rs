//! What the job would need in memory by each method, for whoever has to choose one.
//!
//! Enters: the job and the model's configuration. Leaves: bytes of a worker that computes on a processor, by the formulas of
//! [`common::memory`].

use common::job::{
    BaseDtype, InitWeights, JobSpec, LoraSpec, Method, MomentDtype, Optimizer, Quantization,
    TargetModules,
};
use common::memory::bytes;
use common::model::ModelConfig;
use serde::Serialize;

use super::estimate::Estimate;

/// What a worker needs by a method.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MethodNeed {
    pub method: &'static str,
    /// Whether it is the job's own.
    pub is_own: bool,
    /// Bytes that it needs at least, with gradient checkpointing where the job allows it.
    pub bytes: u64,
    /// What a job says to have it, beside what it says already.
    #[serde(skip)]
    pub asked_by: &'static str,
}

/// Every method that can train this model, from the one that changes the most to the one that needs the least.
pub fn methods(job: &JobSpec, config: &ModelConfig) -> Vec<MethodNeed> {
    let own = match (&job.method, config.quantization_of(job)) {
        (Method::Full, _) if job.optimizer.moments().dtype == MomentDtype::EightBits => FULL_8_BITS,
        (Method::Full, _) => FULL,
        (Method::Lora(_), None) if job.base_dtype == BaseDtype::Bfloat16 => LORA_16_BITS,
        (Method::Lora(_), None) => LORA_32_BITS,
        (Method::Lora(_), Some(_)) => LORA_4_BITS,
    };
    let of = |(method, asked_by): (&'static str, &'static str), job: JobSpec| {
        let estimate = Estimate::new(&job, config).ok()?;
        Some(MethodNeed {
            method,
            is_own: method == own.0,
            bytes: estimate.processor.least().total(),
            asked_by,
        })
    };
    let lora = || match &job.method {
        Method::Lora(lora) => lora.clone(),
        Method::Full => usual_adapter(),
    };
    let plain = |method: Method, base_dtype: BaseDtype| JobSpec {
        method,
        base_dtype,
        quantization: None,
        ..job.clone()
    };
    let adapter = |base_dtype| plain(Method::Lora(lora()), base_dtype);
    let four_bits = JobSpec {
        method: Method::Lora(lora()),
        base_dtype: match job.quantization {
            Some(_) => job.base_dtype,
            None => BaseDtype::Bfloat16,
        },
        quantization: job.quantization.or(Some(Quantization {
            nested_scales: true,
            embeddings: false,
            experts: false,
        })),
        ..job.clone()
    };
    let full = |method, optimizer: Option<Optimizer>| {
        let optimizer = optimizer?;
        let full = plain(Method::Full, job.base_dtype);
        of(method, JobSpec { optimizer, ..full })
    };
    let (in_32_bits, in_8_bits) = in_either(job.optimizer);
    let full = [full(FULL, in_32_bits), full(FULL_8_BITS, in_8_bits)];
    if job.init_weights == InitWeights::Random {
        // An adapter on random weights is refused.
        return full.into_iter().flatten().collect();
    }
    let [full, full_in_8_bits] = full;
    let wide = match config.is_four_bits {
        // Its files have no more than 4 bits of each weight.
        true => [None, None, None, None],
        false => [
            full,
            full_in_8_bits,
            of(LORA_32_BITS, adapter(BaseDtype::Float32)),
            of(LORA_16_BITS, adapter(BaseDtype::Bfloat16)),
        ],
    };
    let all = wide.into_iter().chain([of(LORA_4_BITS, four_bits)]);
    all.flatten().collect()
}

/// The optimizer with float32 moments, and with those of 8 bits where there is one.
fn in_either(optimizer: Optimizer) -> (Option<Optimizer>, Option<Optimizer>) {
    match optimizer {
        Optimizer::Adamw | Optimizer::Adamw8bit => {
            (Some(Optimizer::Adamw), Some(Optimizer::Adamw8bit))
        }
        Optimizer::Lion | Optimizer::Lion8bit => (Some(Optimizer::Lion), Some(Optimizer::Lion8bit)),
        Optimizer::Sgd { .. } | Optimizer::Muon { .. } => (Some(optimizer), None),
    }
}

/// A method's name, and what a job says to have it.
const FULL: (&str, &str) = ("all weights", "`adapter: none`");
const FULL_8_BITS: (&str, &str) = (
    "all weights with 8-bit moments",
    "`adapter: none` with `optimizer: adamw_8bit` (or `lion_8bit`)",
);
const LORA_32_BITS: (&str, &str) = ("LoRA on 32 bits", "`adapter: lora`");
const LORA_16_BITS: (&str, &str) = (
    "LoRA on 16 bits",
    "`adapter: lora` with `base_dtype: bfloat16`",
);
const LORA_4_BITS: (&str, &str) = ("LoRA on 4 bits", "`adapter: qlora`");

/// The adapter of a job that says no more than `adapter: lora`.
fn usual_adapter() -> LoraSpec {
    LoraSpec {
        r: 16,
        alpha: 32.0,
        dropout: 0.0,
        target_modules: TargetModules::AllLinear,
        use_rslora: false,
        use_dora: false,
        biases: Default::default(),
        lora_bias: false,
        init: Default::default(),
        shape: Default::default(),
        tokens: Default::default(),
        model_dir: None,
        model_source: None,
    }
}

/// The methods in a line: `all weights 11.4 GiB, LoRA on 16 bits 2.1 GiB (this job), LoRA on 4 bits 1.4 GiB`.
pub fn told(methods: &[MethodNeed]) -> String {
    let told = methods.iter().map(|need| {
        let own = if need.is_own { " (this job)" } else { "" };
        format!("{} {}{own}", need.method, bytes(need.bytes))
    });
    told.collect::<Vec<_>>().join(", ")
}

/// What to do where the job needs more than this machine has free. None where it needs no more.
pub fn advice(methods: &[MethodNeed], free: u64) -> Option<String> {
    let own = methods.iter().position(|need| need.is_own)?;
    if methods[own].bytes <= free {
        return None;
    }
    let short = format!(
        "a worker on this machine would need {}, and {} are free",
        bytes(methods[own].bytes),
        bytes(free)
    );
    let fits = methods[own + 1..].iter().find(|need| need.bytes <= free);
    Some(match fits {
        Some(need) => format!("{short}: {} needs {}", need.asked_by, bytes(need.bytes)),
        None => format!(
            "{short}: a smaller model, sequence_len or micro_batch_size needs less, or workers on machines with more memory"
        ),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn need(method: (&'static str, &'static str), is_own: bool, mib: u64) -> MethodNeed {
        MethodNeed {
            method: method.0,
            is_own,
            bytes: mib << 20,
            asked_by: method.1,
        }
    }

    #[test]
    fn the_first_method_that_fits_is_advised() {
        let methods = [
            need(FULL, true, 900),
            need(LORA_16_BITS, false, 400),
            need(LORA_4_BITS, false, 200),
        ];
        let advised = |mib: u64| advice(&methods, mib << 20);
        assert_eq!(advised(900), None);
        assert!(
            advised(899)
                .unwrap()
                .contains("`adapter: lora` with `base_dtype: bfloat16` needs 400.0 MiB")
        );
        assert!(
            advised(300)
                .unwrap()
                .contains("`adapter: qlora` needs 200.0 MiB")
        );
        assert!(advised(100).unwrap().contains("smaller model"));
        assert_eq!(
            told(&methods),
            "all weights 900.0 MiB (this job), LoRA on 16 bits 400.0 MiB, LoRA on 4 bits 200.0 MiB"
        );
        // What changes more than the job asks for is no advice.
        let methods = [need(FULL, false, 10), need(LORA_16_BITS, true, 400)];
        assert!(
            advice(&methods, 200 << 20)
                .unwrap()
                .contains("smaller model")
        );
    }
}
