//! Reads a tensor of an adapter, which is not trusted.

use candle_core::{Device, Tensor};
use common::files::tensors::TensorFile;

use super::error::InferenceError;

/// A tensor of this name and shape in float32, all of whose numbers are finite.
pub(super) fn read_tensor(
    file: &TensorFile,
    name: &str,
    shape: &[usize],
) -> Result<Tensor, InferenceError> {
    file.expect(name, shape)?;
    let mut scalars = vec![0.0f32; shape.iter().product()];
    file.read_f32(name, shape, &mut scalars)?;
    if !scalars.iter().all(|scalar| scalar.is_finite()) {
        return Err(InferenceError::BrokenAdapter {
            path: file.path().to_owned(),
            name: name.to_owned(),
        });
    }
    Ok(Tensor::from_vec(scalars, shape, &Device::Cpu)?)
}
