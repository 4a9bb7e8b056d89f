//! Gradient checkpointing (Chen et al., 2016): a layer keeps its input alone and runs forward again when the backward
//! pass comes to it. The same bits as without, because the second run repeats the first.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Storage, Tensor, Var};

use super::Pass;
use super::decoder::DecoderLayer;

/// `layer.forward(x, pass)`, with its intermediate results dropped.
pub fn checkpoint(layer: &Arc<DecoderLayer>, x: &Tensor, pass: &Pass) -> Result<Tensor> {
    x.apply_op1(Checkpoint {
        layer: layer.clone(),
        pass: pass.clone(),
    })
}

struct Checkpoint {
    layer: Arc<DecoderLayer>,
    pass: Pass,
}

impl CustomOp1 for Checkpoint {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = crate::engine::ops::copy_to_tensor(storage, layout)?;
        let y = self.layer.forward(&x, &self.pass)?;
        let shape = y.shape().clone();
        let (storage, layout) = y.storage_and_layout();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(data)) if layout.is_contiguous() => {
                Ok((CpuStorage::F32(data.clone()), shape))
            }
            _ => candle_core::bail!("a layer's output is not float32 on the CPU"),
        }
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let x = Var::from_tensor(&arg.detach())?;
        let y = self.layer.forward(x.as_tensor(), &self.pass)?;
        let seeded = y.apply_op1(Seed(grad.detach()))?;
        Ok(seeded.backward()?.remove(x.as_tensor()))
    }
}

/// The end of a partial graph: its gradient is the one given.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.to_device(&Device::Cpu)?))
    }
}
