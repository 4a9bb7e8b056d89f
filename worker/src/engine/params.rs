//! Weights and gradients: the trainable tensors of a model in one flat buffer ordered by name, and the sink that
//! collects their gradients in the same order.
//!
//! Ops take a [`Weight`]; whether it is trainable, and where its gradient goes, travels with it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Result, Storage, Tensor, Var};
use common::files::layout::Layout;

use super::EngineError;
use super::ops::gemm::WeightSlice;

/// A weight tensor, contiguous, in float32 or (frozen only) bfloat16.
#[derive(Clone, Debug)]
pub struct Weight {
    tensor: Tensor,
    gradient: Option<GradientSlot>,
}

/// Where the gradient of one trainable tensor goes.
#[derive(Clone, Debug)]
struct GradientSlot {
    gradients: Gradients,
    index: usize,
}

impl Weight {
    /// A weight that training leaves as it is. Its gradient is never computed.
    pub fn frozen(tensor: Tensor) -> Result<Self> {
        match tensor.dtype() {
            DType::F32 | DType::BF16 => {}
            other => candle_core::bail!("weights are float32 or bfloat16, not {other:?}"),
        }
        Ok(Self {
            tensor: tensor.detach().contiguous()?,
            gradient: None,
        })
    }

    pub fn dims(&self) -> &[usize] {
        self.tensor.dims()
    }

    /// Rows and columns of a matrix.
    pub fn matrix_dims(&self) -> Result<(usize, usize)> {
        self.tensor.dims2()
    }

    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    pub fn is_trainable(&self) -> bool {
        self.gradient.is_some()
    }

    /// Shows the weight as it lies in memory.
    pub fn with<R>(&self, read: impl FnOnce(WeightSlice) -> Result<R>) -> Result<R> {
        let (storage, layout) = self.tensor.storage_and_layout();
        let (start, end) = match layout.contiguous_offsets() {
            Some(range) => range,
            None => candle_core::bail!("a weight that is not contiguous"),
        };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(data)) => read(WeightSlice::F32(&data[start..end])),
            Storage::Cpu(CpuStorage::BF16(data)) => read(WeightSlice::Bf16(&data[start..end])),
            _ => candle_core::bail!("a weight that is not on the CPU"),
        }
    }

    /// Shows a weight that must be float32 (norms, biases, adapters).
    pub fn with_f32<R>(&self, read: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
        self.with(|slice| match slice {
            WeightSlice::F32(data) => read(data),
            WeightSlice::Bf16(_) => candle_core::bail!("this weight must be float32"),
        })
    }

    /// Hands over the gradient of a trainable weight: `write(gradient, accumulate)` fills the slice, or adds to it where
    /// another use of the weight has filled it already. Does nothing for a frozen weight.
    pub fn add_gradient(&self, write: impl FnOnce(&mut [f32], bool) -> Result<()>) -> Result<()> {
        let Some(slot) = &self.gradient else {
            return Ok(());
        };
        let mut buffer = slot.gradients.lock();
        let buffer = &mut *buffer;
        let tensor = &buffer.layout.tensors[slot.index];
        let range = tensor.offset..tensor.offset + self.tensor.elem_count();
        let written = std::mem::replace(&mut buffer.written[slot.index], true);
        write(&mut buffer.flat[range], written)
    }
}

/// Gradients of all trainable tensors of one slot, in layout order.
#[derive(Clone, Debug)]
pub struct Gradients(Arc<Mutex<GradientBuffer>>);

#[derive(Debug)]
struct GradientBuffer {
    layout: Arc<Layout>,
    flat: Vec<f32>,
    written: Vec<bool>,
}

impl Gradients {
    fn new(layout: Arc<Layout>) -> Self {
        Self(Arc::new(Mutex::new(GradientBuffer {
            flat: vec![0.0; layout.scalars],
            written: vec![false; layout.tensors.len()],
            layout,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, GradientBuffer> {
        // A panic in an op leaves a half-written gradient; `reset` makes it valid again.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what was written, before the next slot.
    pub fn reset(&self) {
        self.lock().written.fill(false);
    }

    /// Shows the finished flat gradient.
    ///
    /// # Errors
    /// Where a trainable tensor got no gradient.
    pub fn read<R>(&self, read: impl FnOnce(&[f32]) -> R) -> std::result::Result<R, EngineError> {
        let buffer = self.lock();
        if let Some(missing) = buffer.written.iter().position(|written| !written) {
            return Err(EngineError::MissingGradient {
                name: buffer.layout.tensors[missing].name.clone(),
            });
        }
        Ok(read(&buffer.flat))
    }
}

/// The trainable tensors. Every [`Weight`] handed out is a view of the one flat buffer, so an update in place is seen
/// by the whole model and no second copy exists.
pub struct Parameters {
    layout: Arc<Layout>,
    flat: Var,
    gradients: Gradients,
}

impl Parameters {
    /// `values` are in layout order.
    pub fn new(layout: Layout, values: Vec<f32>) -> Result<Self> {
        if values.len() != layout.scalars || values.is_empty() {
            candle_core::bail!(
                "{} values for {} trainable scalars",
                values.len(),
                layout.scalars
            );
        }
        let layout = Arc::new(layout);
        let len = values.len();
        Ok(Self {
            flat: Var::from_vec(values, len, &Device::Cpu)?,
            gradients: Gradients::new(layout.clone()),
            layout,
        })
    }

    pub fn layout(&self) -> Arc<Layout> {
        self.layout.clone()
    }

    pub fn gradients(&self) -> &Gradients {
        &self.gradients
    }

    /// The trainable weight of this name, or None where it is not trainable.
    pub fn weight(&self, name: &str) -> Result<Option<Weight>> {
        let tensors = &self.layout.tensors;
        let Ok(index) = tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)) else {
            return Ok(None);
        };
        let tensor = &tensors[index];
        let scalars = tensor.shape.iter().product();
        let view = self
            .flat
            .as_detached_tensor()
            .narrow(0, tensor.offset, scalars)?
            .reshape(tensor.shape.as_slice())?;
        Ok(Some(Weight {
            tensor: view,
            gradient: Some(GradientSlot {
                gradients: self.gradients.clone(),
                index,
            }),
        }))
    }

    /// Shows the flat weights.
    pub fn read<R>(&self, read: impl FnOnce(&[f32]) -> R) -> Result<R> {
        let (storage, _) = self.flat.storage_and_layout();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(data)) => Ok(read(data)),
            _ => candle_core::bail!("trainable weights that are not on the CPU"),
        }
    }

    /// Changes the flat weights in place. Nothing else may be reading them.
    pub fn update(&self, write: impl FnOnce(&mut [f32])) -> Result<()> {
        self.flat
            .as_detached_tensor()
            .inplace_op1(&Update(Mutex::new(Some(write))))
    }
}

struct Update<F>(Mutex<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for Update<F> {
    fn name(&self) -> &'static str {
        "update"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &candle_core::Layout) -> Result<()> {
        let write = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (storage, write) {
            (CpuStorage::F32(data), Some(write)) => {
                write(data);
                Ok(())
            }
            _ => candle_core::bail!("an update of weights that are not float32, or twice"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parameters() -> Parameters {
        let layout = Layout::new([("b".into(), vec![2]), ("a".into(), vec![1, 2])]);
        Parameters::new(layout, vec![1.0, 2.0, 3.0, 4.0]).unwrap()
    }

    #[test]
    fn an_update_in_place_is_seen_by_every_view() {
        let parameters = parameters();
        let b = parameters.weight("b").unwrap().unwrap();
        parameters
            .update(|flat| flat.iter_mut().for_each(|w| *w *= 10.0))
            .unwrap();
        assert_eq!(b.tensor().to_vec1::<f32>().unwrap(), [30.0, 40.0]);
        assert!(parameters.weight("c").unwrap().is_none());
    }

    #[test]
    fn a_trainable_tensor_without_a_gradient_is_an_error() {
        let parameters = parameters();
        let gradients = parameters.gradients();
        let fill = |name: &str, value| {
            let weight = parameters.weight(name).unwrap().unwrap();
            weight
                .add_gradient(|slice, accumulate| {
                    for g in slice {
                        *g = if accumulate { *g + value } else { value };
                    }
                    Ok(())
                })
                .unwrap();
        };
        fill("a", 1.0);
        assert!(matches!(
            gradients.read(|_| ()),
            Err(EngineError::MissingGradient { name }) if name == "b"
        ));
        fill("b", 1.0);
        fill("b", 2.0);
        assert_eq!(
            gradients.read(<[f32]>::to_vec).unwrap(),
            [1.0, 1.0, 3.0, 3.0]
        );
        gradients.reset();
        assert!(gradients.read(|_| ()).is_err());
    }
}
