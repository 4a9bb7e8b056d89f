//! What the job would need in memory by each method, for whoever has to choose one.
//!
//! Enters: the job and the model's configuration. Leaves: bytes of a worker that computes on a processor, by the formulas of
//! [`common::memory`].

use common::job::{
    AdapterInit, BaseDtype, InitWeights, JobSpec, LoraSpec, Method, MomentDtype, Optimizer,
    Quantization, TargetModules,
};
use common::memory::bytes;
use common::model::ModelConfig;
use serde::Serialize;

use super::estimate::Estimate;

/// What a worker needs by a method.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MethodNeed {
    pub method: String,
    /// Whether it is the job's own.
    pub is_own: bool,
    /// Bytes that it needs at least, with gradient checkpointing where the job allows it.
    pub bytes: u64,
    /// What a job says to have it, beside what it says already.
    #[serde(skip)]
    pub asked_by: String,
}

/// A method that can train a model.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Full,
    /// With weights that are kept in bfloat16.
    FullBf16,
    Full8Bits,
    FullBf16With8Bits,
    Adapter32Bits,
    Adapter16Bits,
    Adapter4Bits,
    /// With the experts of a mixture in 4 bits, too.
    AdapterAll4Bits,
}

/// Every method that can train this model, from the one that changes the most to the one that needs the least.
pub fn methods(job: &JobSpec, config: &ModelConfig) -> Vec<MethodNeed> {
    let own = own(job, config);
    let weights = match job.unfrozen.is_all() {
        true => "all weights",
        false => "unfrozen weights",
    };
    ways(job, config)
        .into_iter()
        .filter_map(|way| {
            let job = job_of(way, job)?;
            let estimate = Estimate::new(&job, config).ok()?;
            Some(MethodNeed {
                method: name(way, &job.method, weights),
                is_own: way == own,
                bytes: estimate.processor.least().total(),
                asked_by: asked_by(way, job.optimizer),
            })
        })
        .collect()
}

/// The method of the job itself.
fn own(job: &JobSpec, config: &ModelConfig) -> Way {
    match (&job.method, config.quantization_of(job)) {
        (Method::Full, _) => match (job.pure_bf16, job.optimizer.moments().dtype) {
            (false, MomentDtype::Float32) => Way::Full,
            (true, MomentDtype::Float32) => Way::FullBf16,
            (false, MomentDtype::EightBits) => Way::Full8Bits,
            (true, MomentDtype::EightBits) => Way::FullBf16With8Bits,
        },
        (Method::Lora(_), None) if job.base_dtype == BaseDtype::Bfloat16 => Way::Adapter16Bits,
        (Method::Lora(_), None) => Way::Adapter32Bits,
        (Method::Lora(_), Some(how)) if how.experts && has_own_experts(config) => {
            Way::AdapterAll4Bits
        }
        (Method::Lora(_), Some(_)) => Way::Adapter4Bits,
    }
}

/// The methods that this model can be trained by at all.
fn ways(job: &JobSpec, config: &ModelConfig) -> Vec<Way> {
    let full = [
        Way::Full,
        Way::FullBf16,
        Way::Full8Bits,
        Way::FullBf16With8Bits,
    ];
    if job.init_weights == InitWeights::Random {
        // An adapter on random weights is refused.
        return full.into();
    }
    if config.is_four_bits {
        // Its files have no more than 4 bits of each weight.
        return vec![Way::Adapter4Bits];
    }
    let mut ways = full.to_vec();
    ways.extend([Way::Adapter32Bits, Way::Adapter16Bits, Way::Adapter4Bits]);
    if has_own_experts(config) {
        ways.push(Way::AdapterAll4Bits);
    }
    ways
}

/// Whether there are experts, and the job says how they are kept.
fn has_own_experts(config: &ModelConfig) -> bool {
    config.experts.is_some() && !config.is_four_bits
}

/// The job with this method. None where its optimizer has no such moments.
fn job_of(way: Way, job: &JobSpec) -> Option<JobSpec> {
    let lora = match &job.method {
        Method::Lora(lora) => lora.clone(),
        Method::Full => usual_adapter(),
    };
    let plain = |method: Method, base_dtype: BaseDtype| JobSpec {
        method,
        base_dtype,
        pure_bf16: false,
        quantization: None,
        ..job.clone()
    };
    let four_bits = |lora: LoraSpec, experts: bool| JobSpec {
        method: Method::Lora(lora),
        pure_bf16: false,
        base_dtype: match job.quantization {
            Some(_) => job.base_dtype,
            None => BaseDtype::Bfloat16,
        },
        quantization: Some(Quantization {
            experts,
            ..job.quantization.unwrap_or(Quantization {
                nested_scales: true,
                embeddings: false,
                experts: false,
            })
        }),
        ..job.clone()
    };
    let (in_32_bits, in_8_bits) = in_either(job.optimizer);
    let full = |optimizer: Optimizer| JobSpec {
        optimizer,
        ..plain(Method::Full, job.base_dtype)
    };
    let pure = |optimizer: Optimizer| JobSpec {
        optimizer,
        pure_bf16: true,
        ..plain(Method::Full, BaseDtype::Bfloat16)
    };
    Some(match way {
        Way::Full => full(in_32_bits),
        Way::FullBf16 => pure(in_32_bits),
        Way::Full8Bits => full(in_8_bits?),
        Way::FullBf16With8Bits => pure(in_8_bits?),
        Way::Adapter32Bits => plain(Method::Lora(lora), BaseDtype::Float32),
        Way::Adapter16Bits => plain(Method::Lora(lora), BaseDtype::Bfloat16),
        Way::Adapter4Bits => four_bits(lora, false),
        Way::AdapterAll4Bits => four_bits(lora, true),
    })
}

/// The optimizer with float32 moments, and with those of 8 bits where there is one.
fn in_either(optimizer: Optimizer) -> (Optimizer, Option<Optimizer>) {
    match optimizer {
        Optimizer::Adamw | Optimizer::Adamw8bit => (Optimizer::Adamw, Some(Optimizer::Adamw8bit)),
        Optimizer::Lion | Optimizer::Lion8bit => (Optimizer::Lion, Some(Optimizer::Lion8bit)),
        Optimizer::Sgd { .. } | Optimizer::Muon { .. } => (optimizer, None),
    }
}

/// A method's name. `weights` are those that full training changes.
fn name(way: Way, method: &Method, weights: &str) -> String {
    let of_adapter = |base: &str| format!("{} on {base}", adapter_kind(method));
    match way {
        Way::Full => weights.to_owned(),
        Way::FullBf16 => format!("{weights} in bfloat16"),
        Way::Full8Bits => format!("{weights} with 8-bit moments"),
        Way::FullBf16With8Bits => format!("{weights} in bfloat16 with 8-bit moments"),
        Way::Adapter32Bits => of_adapter("32 bits"),
        Way::Adapter16Bits => of_adapter("16 bits"),
        Way::Adapter4Bits => of_adapter("4 bits"),
        Way::AdapterAll4Bits => of_adapter("4 bits with the experts"),
    }
}

/// `LoRA`, or what else the adapter is: `DoRA with PiSSA and biases`.
fn adapter_kind(method: &Method) -> String {
    let Method::Lora(lora) = method else {
        return String::new();
    };
    let kind = if lora.use_dora { "DoRA" } else { "LoRA" };
    let start = match lora.init {
        AdapterInit::Pissa { .. } => Some("PiSSA"),
        AdapterInit::Olora => Some("OLoRA"),
        // As large as the usual start.
        AdapterInit::Kaiming | AdapterInit::Gaussian | AdapterInit::Orthogonal => None,
    };
    let has_biases = !lora.biases.is_none() || lora.lora_bias;
    let others: Vec<&str> = start
        .into_iter()
        .chain(has_biases.then_some("biases"))
        .collect();
    match others.is_empty() {
        true => kind.to_owned(),
        false => format!("{kind} with {}", others.join(" and ")),
    }
}

/// What a job says to have a method, with this optimizer.
fn asked_by(way: Way, optimizer: Optimizer) -> String {
    let told = match (way, optimizer) {
        (Way::Full, _) => "`adapter: none`",
        (Way::FullBf16, _) => "`adapter: none` with `pure_bf16: true`",
        (Way::Full8Bits, Optimizer::Lion8bit) => "`adapter: none` with `optimizer: lion_8bit`",
        (Way::Full8Bits, _) => "`adapter: none` with `optimizer: adamw_8bit`",
        (Way::FullBf16With8Bits, Optimizer::Lion8bit) => {
            "`adapter: none` with `pure_bf16: true` and `optimizer: lion_8bit`"
        }
        (Way::FullBf16With8Bits, _) => {
            "`adapter: none` with `pure_bf16: true` and `optimizer: adamw_8bit`"
        }
        (Way::Adapter32Bits, _) => "`adapter: lora`",
        (Way::Adapter16Bits, _) => "`adapter: lora` with `base_dtype: bfloat16`",
        (Way::Adapter4Bits, _) => "`adapter: qlora`",
        (Way::AdapterAll4Bits, _) => "`adapter: qlora` with `quantize_moe_experts: true`",
    };
    told.to_owned()
}

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
    use common::job::TrainedBiases;

    fn need(way: Way, is_own: bool, mib: u64) -> MethodNeed {
        MethodNeed {
            method: name(way, &Method::Lora(usual_adapter()), "all weights"),
            is_own,
            bytes: mib << 20,
            asked_by: asked_by(way, Optimizer::Adamw),
        }
    }

    #[test]
    fn an_adapter_s_kind_and_an_optimizer_are_named_as_they_are_computed() {
        let lora = LoraSpec {
            use_dora: true,
            init: AdapterInit::Pissa { iterations: None },
            biases: TrainedBiases::All,
            ..usual_adapter()
        };
        assert_eq!(
            name(Way::Adapter16Bits, &Method::Lora(lora), "all weights"),
            "DoRA with PiSSA and biases on 16 bits"
        );
        let (_, lion) = in_either(Optimizer::Lion);
        assert_eq!(
            asked_by(Way::Full8Bits, lion.unwrap()),
            "`adapter: none` with `optimizer: lion_8bit`"
        );
    }

    #[test]
    fn experts_in_4_bits_are_advised_where_nothing_larger_fits() {
        let methods = [
            need(Way::Adapter16Bits, false, 400),
            need(Way::Adapter4Bits, true, 300),
            need(Way::AdapterAll4Bits, false, 100),
        ];
        let advised = advice(&methods, 200 << 20).unwrap();
        assert!(
            advised.contains("`adapter: qlora` with `quantize_moe_experts: true` needs 100.0 MiB"),
            "{advised}"
        );
        assert!(told(&methods).ends_with("LoRA on 4 bits with the experts 100.0 MiB"));
    }

    #[test]
    fn the_first_method_that_fits_is_advised() {
        let methods = [
            need(Way::Full, true, 900),
            need(Way::Adapter16Bits, false, 400),
            need(Way::Adapter4Bits, false, 200),
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
        let methods = [
            need(Way::Full, false, 10),
            need(Way::Adapter16Bits, true, 400),
        ];
        assert!(
            advice(&methods, 200 << 20)
                .unwrap()
                .contains("smaller model")
        );
    }
}
