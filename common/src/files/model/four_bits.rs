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
const PARTS: [&str; 5] = [
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
];
const FP4_STATE: &str = ".quant_state.bitsandbytes__fp4";

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
    let ends = PARTS.into_iter().chain([FP4_STATE]);
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
        .ok_or_else(|| bad("its quant_map has not 16 float32 values"))?;
    let absmax = part(".absmax")?;
    let scales = match absmax.dtype {
        Dtype::U8 => {
            let map = floats(&part(".nested_quant_map")?)
                .and_then(|map| <[f32; 256]>::try_from(map).ok())
                .ok_or_else(|| bad("its nested_quant_map has not 256 float32 values"))?;
            let nested = floats(&part(".nested_absmax")?)
                .ok_or_else(|| bad("its nested_absmax is not float32"))?;
            let offset = state.nested_offset.unwrap_or_default() as f32;
            let block = state.nested_blocksize.unwrap_or(256);
            let nested = Nested::of_parts(absmax.bytes.to_vec(), map, block, nested, offset);
            Scales::Nested(nested.ok_or_else(|| bad("its scales do not fit together"))?)
        }
        _ => Scales::Plain(floats(&absmax).ok_or_else(|| bad("its absmax is not float32"))?),
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
    let ends = [PARTS[4], FP4_STATE];
    ends.iter()
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
