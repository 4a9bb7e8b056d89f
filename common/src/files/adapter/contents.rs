//! The tensors of an adapter, compared with the linears that it is to be put on.

use std::collections::BTreeMap;
use std::path::Path;

use super::tensors::{Adapted, adapter_tensors, is_kept_beside_factors, is_kept_beside_tokens};
use super::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig};
use crate::files::FileError;
use crate::files::model::{check_link, listed};
use crate::files::tensors::TensorFile;
use crate::job::LoraSpec;

/// Refuses an adapter that is not of the job's kind or whose tensors are not exactly those of the linears and `beside`, names
/// with shapes, on a model whose output layer is the embedding where it is `tied`. Reads no values.
pub fn check_adapter(
    dir: &Path,
    lora: &LoraSpec,
    linears: &[Adapted],
    beside: &[(String, Vec<usize>)],
    tied: bool,
) -> Result<(), FileError> {
    let config = AdapterConfig::read(dir)?;
    if let Some(reason) = other_kind(&config, lora) {
        return Err(FileError::malformed(dir, reason));
    }
    for name in [ADAPTER_CONFIG, ADAPTER_WEIGHTS] {
        check_link(dir, name)?;
    }
    let path = dir.join(ADAPTER_WEIGHTS);
    let file = TensorFile::open(&path)?;
    let mut expected: BTreeMap<String, Vec<usize>> = beside.iter().cloned().collect();
    for linear in linears {
        expected.extend(adapter_tensors(linear, lora));
    }
    let is_known = |name: &str| {
        expected.contains_key(name)
            || is_kept_beside_tokens(name, &config.tokens, tied)
            || is_kept_beside_factors(name, |name| expected.contains_key(name))
    };
    if let Some(reason) = other_names(&file, expected.keys().map(String::as_str), is_known) {
        return Err(FileError::malformed(dir, reason));
    }
    for (name, shape) in &expected {
        check_tensor(&path, &file, name, shape)?;
    }
    Ok(())
}

/// In what an adapter is of another kind than the job's.
fn other_kind(config: &AdapterConfig, lora: &LoraSpec) -> Option<String> {
    if config.r != lora.r {
        let told = format!("its rank is {}, the job's lora_r is {}", config.r, lora.r);
        return Some(told);
    }
    let on = |is_on: bool| is_on.to_string();
    let biases = [config.biases, lora.biases].map(|biases| biases.name().to_owned());
    for (field, [found, wanted]) in [
        ("use_dora", [config.use_dora, lora.use_dora].map(on)),
        ("lora_bias", [config.lora_bias, lora.lora_bias].map(on)),
        ("bias", biases),
    ] {
        if found != wanted {
            return Some(format!("its {field} is {found}, the job's is {wanted}"));
        }
    }
    let parameters = [&config.shape.parameters, &lora.shape.parameters];
    let [found, wanted] = parameters.map(|names| match &names[..] {
        [] => "none".to_owned(),
        names => names.join(", "),
    });
    (parameters[0] != parameters[1])
        .then(|| format!("its target_parameters are {found}, the job's {wanted}"))
}

/// Which of the names that are expected an adapter lacks, or which it has that nobody knows.
fn other_names<'a>(
    file: &TensorFile,
    expected: impl Iterator<Item = &'a str>,
    is_known: impl Fn(&str) -> bool,
) -> Option<String> {
    let missing: Vec<&str> = expected.filter(|name| file.get(name).is_none()).collect();
    let extra: Vec<&str> = file.names().filter(|name| !is_known(name)).collect();
    let (names, what) = match (&missing[..], &extra[..]) {
        ([], []) => return None,
        ([], extra) => (extra, "has, beside what the job trains,"),
        (missing, _) => (missing, "lacks"),
    };
    Some(format!(
        "the adapter {what} {}; it is of another model, or of other lora_target_modules",
        listed(names)
    ))
}

/// Refuses a tensor that is of another shape, or no numbers.
fn check_tensor(
    path: &Path,
    file: &TensorFile,
    name: &str,
    shape: &[usize],
) -> Result<(), FileError> {
    let view = file.expect(name, shape)?;
    let reason = match view.is_readable() {
        false => format!("is {:?}; floating-point numbers are needed", view.dtype),
        true => match view.check_range() {
            Ok(()) => return Ok(()),
            Err(reason) => reason.to_string(),
        },
    };
    let reason = format!("tensor {name} {reason}");
    Err(FileError::malformed(path, reason))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::files::tensors::{Dtype, write};
    use crate::job::TargetModules;

    type Tensor<'a> = (&'a str, Dtype, [usize; 2]);

    const A: Tensor = (
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        Dtype::F32,
        [2, 3],
    );
    const B: Tensor = (
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
        Dtype::F32,
        [4, 2],
    );
    const MAGNITUDE: Tensor = (
        "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector",
        Dtype::F32,
        [4, 1],
    );

    fn config(use_dora: bool) -> AdapterConfig {
        AdapterConfig {
            use_dora,
            ..AdapterConfig::new(2, 4.0, TargetModules::Named(vec!["up_proj".into()]))
        }
    }

    #[test]
    fn the_matrix_that_peft_saves_beside_an_adapter_on_it_is_passed_over() {
        let named = |path: &str, kind: &str| format!("base_model.model.{path}.{kind}");
        let factors = [
            ("lora_embedding_A", [2, 9]),
            ("lora_embedding_B", [3, 2]),
            ("base_layer.weight", [9, 3]),
        ];
        let embedding = Adapted {
            path: "model.embed_tokens".into(),
            rank: 2,
            inputs: 9,
            outputs: 3,
            has_bias: false,
        };
        for (path, is_known) in [("model.embed_tokens", true), ("lm_head", false)] {
            let folder = tempfile::tempdir().unwrap();
            config(false).write(folder.path()).unwrap();
            let bytes = [0; 256];
            let tensors = factors.iter().map(|(kind, shape)| {
                let path = match *kind {
                    "base_layer.weight" => path,
                    _ => "model.embed_tokens",
                };
                let size = 4 * shape[0] * shape[1];
                (
                    named(path, kind),
                    Dtype::F32,
                    shape.to_vec(),
                    &bytes[..size],
                )
            });
            write(folder.path(), ADAPTER_WEIGHTS, tensors, &[]).unwrap();
            let lora = config(false).to_lora();
            let linears = std::slice::from_ref(&embedding);
            let checked = check_adapter(folder.path(), &lora, linears, &[], true);
            assert_eq!(checked.is_ok(), is_known, "{path}: {checked:?}");
        }
    }

    /// Checks an adapter against a job of this rank, each with or without magnitudes.
    fn check(
        tensors: &[Tensor],
        rank: usize,
        [has_dora, use_dora]: [bool; 2],
    ) -> Result<(), String> {
        let folder = tempfile::tempdir().unwrap();
        config(has_dora).write(folder.path()).unwrap();
        let bytes = [0; 256];
        let listed = tensors.iter().map(|(name, dtype, shape)| {
            let size = shape[0] * shape[1] * dtype.bitsize() / 8;
            // A vector where there is one column.
            let shape = shape.iter().copied().filter(|size| *size > 1);
            (name.to_string(), *dtype, shape.collect(), &bytes[..size])
        });
        write(folder.path(), ADAPTER_WEIGHTS, listed, &[]).unwrap();
        let linear = Adapted {
            path: "model.layers.0.mlp.up_proj".into(),
            rank,
            inputs: 3,
            outputs: 4,
            has_bias: false,
        };
        let lora = LoraSpec {
            r: rank,
            ..config(use_dora).to_lora()
        };
        let checked = check_adapter(folder.path(), &lora, &[linear], &[], false);
        checked.map_err(|error| error.to_string())
    }

    #[test]
    fn an_adapter_has_the_tensors_of_its_linears_and_no_others() {
        check(&[A, B], 2, [false, false]).unwrap();
        check(&[A, B, MAGNITUDE], 2, [true, true]).unwrap();
        let refused = |tensors: &[Tensor], words: &[&str]| {
            let message = check(tensors, 2, [false, false]).unwrap_err();
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        };
        refused(&[A], &["lacks", B.0]);
        refused(&[], &["lacks", A.0, B.0]);
        let other = ("base_model.model.lm_head.weight", Dtype::F32, [1, 1]);
        refused(&[A, B, other], &[other.0, "lora_target_modules"]);
        refused(&[A, (B.0, Dtype::F32, [4, 3])], &[B.0, "[4, 3]", "[4, 2]"]);
        refused(&[A, (B.0, Dtype::I8, B.2)], &[B.0, "I8"]);
        refused(&[A, B, MAGNITUDE], &[MAGNITUDE.0]);
        for (rank, kinds, told) in [
            (3, [false, false], "its rank is 2, the job's lora_r is 3"),
            (2, [true, false], "its use_dora is true, the job's is false"),
            (2, [true, true], MAGNITUDE.0),
        ] {
            let message = check(&[A, B], rank, kinds).unwrap_err();
            assert!(message.contains(told), "{message}");
        }
    }
}
