//! Matrices that bitsandbytes quantised to 4 bits, as Transformers stores them: the codes under the weight's own name, and
//! what they mean under names that go on from it.
//!
//! Enters: the tensors of a weight. Leaves: the matrix, every part of it checked against the others; or which part is not
//! as it must be. Nothing is quantised or guessed here.

use serde::Deserialize;

use crate::files::FileError;
use crate::files::tensors::{Dtype, TensorFile, TensorView};
use crate::nf4::{Nested, Nf4, Scales};

/// Most bytes of the JSON of a quantised matrix.
const MAX_STATE_BYTES: usize = 64 << 10;

/// Ends of the names of what belongs to a quantised weight.
const PARTS: [&str; 4] = [
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
];
/// Ends of the names of the tensors that say how a weight is quantised.
const STATES: [&str; 2] = [
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
];

/// What bitsandbytes says of a matrix (`QuantState.as_dict`, 0.50). The type that it was quantised from is said too; it plays no
/// part, because products round to their own.
#[derive(Deserialize)]
struct State {
    blocksize: usize,
    shape: Vec<usize>,
    #[serde(default)]
    nested_blocksize: Option<usize>,
    #[serde(default)]
    nested_offset: Option<f64>,
}

/// The weight that a tensor belongs to as a part of its quantisation, if it does.
pub(super) fn weight_of(name: &str) -> Option<&str> {
    let ends = PARTS.into_iter().chain(STATES);
    ends.filter_map(|end| name.strip_suffix(end))
        .find(|weight| weight.ends_with(".weight"))
}

/// Whether the weight of that name is quantised.
pub(super) fn is_quantised(file: &TensorFile, name: &str) -> bool {
    state(file, name).is_some()
}

/// The matrix of that name, which must have this shape.
pub(super) fn read(file: &TensorFile, name: &str, shape: &[usize]) -> Result<Nf4, FileError> {
    let malformed = |reason: String| FileError::malformed(file.path(), reason);
    let bad = |reason: &str| malformed(format!("tensor {name} is quantised, but {reason}"));
    let part = |end: &str| {
        let stored = format!("{name}{end}");
        file.get(&stored).ok_or_else(|| {
            bad(&format!(
                "there is no tensor {stored}: the folder is not whole; save it again, or use the model before it was quantised"
            ))
        })
    };
    let json = state(file, name).ok_or_else(|| bad("nothing says how"))?;
    if json.bytes.len() > MAX_STATE_BYTES {
        return Err(bad("what is said of it has too many bytes"));
    }
    let state: State = serde_json::from_slice(json.bytes)
        .map_err(|error| bad(&format!("what is said of it is not valid: {error}")))?;
    if state.shape != shape {
        return Err(bad(&format!(
            "its shape is {:?} where config.json makes it {shape:?}; one of the two files is of another model",
            state.shape
        )));
    }
    let levels = floats(&part(".quant_map")?)
        .and_then(|map| <[f32; 16]>::try_from(map).ok())
        .ok_or_else(|| bad("its quant_map has not 16 float32 values that are finite"))?;
    let absmax = part(".absmax")?;
    let scales = match absmax.dtype {
        Dtype::U8 => {
            let map = floats(&part(".nested_quant_map")?)
                .and_then(|map| <[f32; 256]>::try_from(map).ok())
                .ok_or_else(|| {
                    bad("its nested_quant_map has not 256 float32 values that are finite")
                })?;
            let nested = floats(&part(".nested_absmax")?)
                .ok_or_else(|| bad("its nested_absmax is not float32, or not finite"))?;
            let offset = state.nested_offset.unwrap_or_default() as f32;
            let block = state.nested_blocksize.unwrap_or(256);
            let nested = Nested::of_parts(absmax.bytes.to_vec(), map, block, nested, offset);
            Scales::Nested(nested.ok_or_else(|| bad("its scales do not fit together"))?)
        }
        _ => Scales::Plain(
            floats(&absmax).ok_or_else(|| bad("its absmax is not float32, or not finite"))?,
        ),
    };
    let codes = part("")?;
    let scalars = shape.iter().product();
    Nf4::of_parts(
        codes.bytes.to_vec(),
        scalars,
        state.blocksize,
        levels,
        scales,
    )
    .map_err(|reason| bad(&format!("it {reason}")))
}

fn state<'a>(file: &'a TensorFile, name: &str) -> Option<TensorView<'a>> {
    STATES
        .iter()
        .find_map(|end| file.get(&format!("{name}{end}")))
}

/// The values of a float32 tensor; None where it is of another type, or one of them is not finite.
fn floats(view: &TensorView) -> Option<Vec<f32>> {
    if view.dtype != Dtype::F32 {
        return None;
    }
    let mut values = vec![0.0; view.scalars()];
    view.to_f32(&mut values).ok()?;
    values
        .iter()
        .all(|value| value.is_finite())
        .then_some(values)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::files::json::write_json;
    use crate::files::model::{ModelFolder, WeightFiles};
    use crate::files::names::CONFIG;
    use crate::files::tensors::write;
    use crate::job::InitWeights;

    const NAME: &str = "model.layers.0.mlp.up_proj.weight";
    const SHAPE: [usize; 2] = [6, 30];

    type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

    fn values() -> Vec<f32> {
        (0..180).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    /// The tensors of a quantised matrix as Transformers stores them, with scales that are not nested.
    fn stored() -> Vec<Tensor> {
        let matrix = Nf4::quantise(&values(), false).unwrap();
        let Scales::Plain(absmax) = matrix.scales() else {
            panic!("nested scales");
        };
        let floats = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let state =
            json!({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": SHAPE});
        let state = state.to_string().into_bytes();
        let named = |end: &str| format!("{NAME}{end}");
        vec![
            (named(""), Dtype::U8, vec![90, 1], matrix.codes().to_vec()),
            (named(".absmax"), Dtype::F32, vec![3], floats(absmax)),
            (
                named(".quant_map"),
                Dtype::F32,
                vec![16],
                floats(matrix.levels()),
            ),
            (named(STATES[0]), Dtype::U8, vec![state.len()], state),
        ]
    }

    fn open(tensors: &[Tensor], quantised: bool) -> Result<WeightFiles, String> {
        let dir = tempfile::tempdir().unwrap();
        let mut config = json!({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2});
        if quantised {
            config["quantization_config"] =
                json!({"quant_method": "bitsandbytes", "load_in_4bit": true});
        }
        write_json(&dir.path().join(CONFIG), &config).unwrap();
        let listed = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (name.clone(), *dtype, shape.clone(), &bytes[..]));
        write(dir.path(), "model.safetensors", listed, &[]).unwrap();
        let folder = ModelFolder::open(dir.path(), InitWeights::Pretrained);
        let folder = folder.map_err(|error| error.to_string())?;
        let expected = [(NAME.to_owned(), SHAPE.to_vec())];
        WeightFiles::open(&folder, &expected).map_err(|error| error.to_string())
    }

    #[test]
    fn a_stored_matrix_is_the_one_that_was_quantised() {
        let weights = open(&stored(), true).unwrap();
        let matrix = weights.four_bits(NAME, &SHAPE).unwrap().unwrap();
        assert_eq!(matrix, Nf4::quantise(&values(), false).unwrap());
        let (mut expected, mut found) = (vec![0.0; 180], vec![0.0; 180]);
        matrix.dequantise(0, &mut expected);
        weights.read_f32(NAME, &SHAPE, &mut found).unwrap();
        assert_eq!(found, expected);
        assert!(weights.notices().is_empty());
    }

    #[test]
    fn parts_that_are_missing_or_do_not_fit_are_named() {
        let without = |index: usize| {
            let mut tensors = stored();
            tensors.remove(index);
            open(&tensors, true).unwrap_err()
        };
        for (index, end) in [(1, ".absmax"), (2, ".quant_map")] {
            let message = without(index);
            assert!(
                message.contains(&format!("there is no tensor {NAME}{end}")),
                "{message}"
            );
        }
        // Without its state it is a tensor of a type that is not read.
        assert!(without(3).contains("is U8"));
        let changed = |change: &dyn Fn(&mut Vec<Tensor>)| {
            let mut tensors = stored();
            change(&mut tensors);
            open(&tensors, true).unwrap_err()
        };
        let state = |from: &'static str, to: &'static str| {
            changed(&move |tensors| {
                let text = String::from_utf8(tensors[3].3.clone()).unwrap();
                tensors[3].3 = text.replace(from, to).into_bytes();
                tensors[3].2 = vec![tensors[3].3.len()];
            })
        };
        assert!(state("[6,30]", "[6,31]").contains("its shape is [6, 31]"));
        assert!(state(":64", ":48").contains("blocks of 48 scalars"));
        assert!(state("{", "(").contains("is not valid"));
        let short = changed(&|tensors| {
            tensors[0].3.pop();
            tensors[0].2 = vec![89, 1];
        });
        assert!(
            short.contains("has 89 bytes of codes where its shape makes it 90"),
            "{short}"
        );
        let odd = changed(&|tensors| tensors[1].3[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
        assert!(odd.contains("absmax is not float32"), "{odd}");
    }

    #[test]
    fn a_folder_that_does_not_say_so_is_not_of_4_bits() {
        let message = open(&stored(), false).unwrap_err();
        assert!(message.contains("is U8"), "{message}");
    }
}
