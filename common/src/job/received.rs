//! A job that came over the wire: what its reader made sure of is made sure of again, because whoever sent it may be anybody.

use super::limits::{
    MAX_BATCH, MAX_EPOCHS, MAX_MICRO_BATCH, MAX_RANK, MAX_SEQUENCE_LEN, MAX_SLOTS, MAX_STEPS,
    MAX_VOCABULARY,
};
use super::spec::{JobSpec, LoraSpec, Method, Warmup};

impl JobSpec {
    /// Checks the numbers that a worker computes with, as those of a job that was read are.
    ///
    /// # Errors
    /// The field that is out of its range, with its value.
    pub fn check_received(&self) -> Result<(), String> {
        let (global, micro) = (self.global_batch_size, self.micro_batch_size);
        within("sequence_len", self.sequence_len, 2, MAX_SEQUENCE_LEN)?;
        within("micro_batch_size", micro, 1, MAX_MICRO_BATCH)?;
        within("global_batch_size", global, micro, MAX_BATCH)?;
        if global % micro != 0 || global / micro > MAX_SLOTS {
            return Err(format!(
                "global_batch_size is {global} with a micro_batch_size of {micro}"
            ));
        }
        if self.max_steps == Some(0) {
            return Err("max_steps is 0".to_owned());
        }
        self.check_numbers()?;
        let checks = [
            ("optimizer", self.optimizer.check()),
            ("lr_groups", self.lr_groups.check()),
            ("token_loss", self.token_loss.check()),
            ("router_aux_loss_coef", self.router_loss.check()),
            ("unfrozen_parameters", self.unfrozen.check()),
        ];
        for (name, check) in checks {
            check.map_err(|reason| format!("{name} {reason}"))?;
        }
        self.lr_scheduler
            .check(self.learning_rate)
            .map_err(|reason| format!("lr_scheduler {reason}"))?;
        match self.warmup {
            Warmup::Ratio(share) if !(0.0..=1.0).contains(&share) => {
                return Err(format!("warmup is {share} of the steps"));
            }
            Warmup::Steps(steps) if steps > MAX_STEPS => {
                return Err(format!("warmup is {steps} steps"));
            }
            _ => {}
        }
        within(
            "the bound of the ids of tokens",
            self.token_rows(),
            0,
            MAX_VOCABULARY,
        )?;
        match &self.method {
            Method::Lora(lora) => check_lora(lora),
            Method::Full => Ok(()),
        }
    }

    /// Checks the numbers that are not whole.
    fn check_numbers(&self) -> Result<(), String> {
        let numbers = [
            (
                "num_epochs",
                self.num_epochs,
                is_positive(self.num_epochs) && self.num_epochs <= MAX_EPOCHS,
            ),
            (
                "learning_rate",
                self.learning_rate,
                is_positive(self.learning_rate),
            ),
            ("adam_beta1", self.adam_beta1, is_share(self.adam_beta1)),
            ("adam_beta2", self.adam_beta2, is_share(self.adam_beta2)),
            (
                "adam_epsilon",
                self.adam_epsilon,
                is_positive(self.adam_epsilon),
            ),
            (
                "weight_decay",
                self.weight_decay,
                self.weight_decay >= 0.0 && self.weight_decay.is_finite(),
            ),
            (
                "max_grad_norm",
                self.max_grad_norm.unwrap_or(1.0),
                self.max_grad_norm.is_none_or(is_positive),
            ),
        ];
        let wrong = numbers.into_iter().find(|(_, _, is_right)| !is_right);
        match wrong {
            Some((name, value, _)) => Err(format!("{name} is {value}")),
            None => Ok(()),
        }
    }
}

fn check_lora(lora: &LoraSpec) -> Result<(), String> {
    within("lora_r", lora.r, 1, MAX_RANK)?;
    let shape = lora.shape.check();
    shape.map_err(|field| format!("{field} is not as it should be"))?;
    if let Some(field) = lora.conflict_of_parameters() {
        return Err(format!("{field} is given with target_parameters"));
    }
    let ranks = lora.shape.ranks.iter().map(|(_, rank)| *rank);
    let mut ranks = [lora.r].into_iter().chain(ranks);
    if let Some(reason) = ranks.find_map(|rank| lora.init.refuses(rank)) {
        return Err(format!("init_lora_weights {reason}"));
    }
    if lora.init.is_from_base() && lora.dropout > 0.0 {
        return Err(format!(
            "lora_dropout is {} with {}",
            lora.dropout, lora.init
        ));
    }
    match (is_positive(lora.alpha), is_share(lora.dropout)) {
        (true, true) => Ok(()),
        (false, _) => Err(format!("lora_alpha is {}", lora.alpha)),
        (_, false) => Err(format!("lora_dropout is {}", lora.dropout)),
    }
}

fn is_positive(value: f64) -> bool {
    value > 0.0 && value.is_finite()
}

fn is_share(value: f64) -> bool {
    (0.0..1.0).contains(&value)
}

fn within(name: &str, value: usize, least: usize, most: usize) -> Result<(), String> {
    match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(format!("{name} is {value}")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use crate::job::{JobSources, JobSpec, load};

    fn job() -> JobSpec {
        let flags = [
            ("base_model", "m"),
            ("dataset", "d"),
            ("adapter", "lora"),
            ("lora_dropout", "0.1"),
        ];
        let flag = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        load(JobSources {
            flags: flags.map(flag).to_vec(),
            ..JobSources::default()
        })
        .unwrap()
    }

    #[test]
    fn a_job_that_no_reader_would_give_is_refused_by_field() {
        let good = serde_json::to_value(job()).unwrap();
        assert_eq!(job().check_received(), Ok(()));
        let wrong = [
            ("/global_batch_size", 0.into(), "global_batch_size"),
            (
                "/global_batch_size",
                (1u64 << 40).into(),
                "global_batch_size",
            ),
            ("/micro_batch_size", 0.into(), "micro_batch_size"),
            ("/micro_batch_size", 3.into(), "global_batch_size"),
            ("/sequence_len", 0.into(), "sequence_len"),
            ("/sequence_len", u64::MAX.into(), "sequence_len"),
            ("/num_epochs", 1e300.into(), "num_epochs"),
            ("/max_steps", 0.into(), "max_steps"),
            ("/learning_rate", (-1.0).into(), "learning_rate"),
            ("/adam_beta2", 1.0.into(), "adam_beta2"),
            ("/warmup/ratio", 2.0.into(), "warmup"),
            (
                "/lr_scheduler",
                json!({"cosine_waves": {"num_cycles": -1.0}}),
                "num_cycles",
            ),
            (
                "/lr_scheduler",
                json!({"polynomial": {"lr_end": 0.5, "power": 1.0}}),
                "lr_end",
            ),
            (
                "/lr_scheduler",
                json!({"inverse_sqrt": {"timescale": 0}}),
                "timescale",
            ),
            (
                "/optimizer",
                json!({"sgd": {"momentum": 1.0, "dampening": 0.0, "nesterov": false}}),
                "momentum",
            ),
            ("/lr_groups", json!({"lora_plus": {"ratio": 0.0}}), "ratio"),
            (
                "/lr_groups",
                json!({"named": {"embedding": -1.0, "groups": []}}),
                "lr_groups",
            ),
            (
                "/token_loss",
                json!({"smoothed": {"share": 1.0}}),
                "token_loss",
            ),
            (
                "/token_loss",
                json!({"eaft": {"alpha": 1.0, "k": 0, "divisor": 1.0}}),
                "a k of 0",
            ),
            ("/method/lora/r", 0.into(), "lora_r"),
            ("/method/lora/dropout", 1.5.into(), "lora_dropout"),
        ];
        for (place, value, name) in wrong {
            let mut job = good.clone();
            let value: serde_json::Value = value;
            match job.pointer_mut(place) {
                Some(field) => *field = value.clone(),
                // One that is left out at its default.
                None => job[&place[1..]] = value.clone(),
            }
            let job: JobSpec = serde_json::from_value(job).unwrap();
            let error = job.check_received().unwrap_err();
            assert!(error.contains(name), "{place} {value}: {error}");
        }
    }
}
