//! The decoder: layers of attention and feed-forward on a residual, then the final norm, as one operation on candle's
//! graph.
//!
//! With gradient checkpointing (Chen et al., 2016) a layer keeps its input alone and runs forward again when the
//! backward pass comes to it. The same bits as without, because the second run repeats the first.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor};

use super::Pass;
use super::attention::AttentionBlock;
use super::chain::Chain;
use super::mlp::Mlp;
use crate::engine::ops::add_in_place;
use crate::engine::ops::rms_norm::RmsNorm;

pub struct Decoder {
    pub layers: Vec<DecoderLayer>,
    pub norm: RmsNorm,
}

pub struct DecoderLayer {
    pub attention: AttentionBlock,
    pub mlp: Mlp,
}

/// What is kept of a forward pass for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    /// The input of each layer.
    Inputs,
    Everything,
}

/// `[tokens, hidden]` to the same.
pub fn decode(decoder: &Arc<Decoder>, x: &Tensor, pass: &Pass, keep: Keep) -> Result<Tensor> {
    x.apply_op1(Decode {
        decoder: decoder.clone(),
        pass: pass.clone(),
        keep,
        input: x.detach(),
        tape: Mutex::new(None),
    })
}

struct Decode {
    decoder: Arc<Decoder>,
    pass: Pass,
    keep: Keep,
    input: Tensor,
    tape: Mutex<Option<Tape>>,
}

struct Tape {
    layers: Vec<KeptLayer>,
    norm: Chain,
}

enum KeptLayer {
    Input(Tensor),
    Everything(LayerChains),
}

struct LayerChains {
    attention: Chain,
    mlp: Chain,
}

impl DecoderLayer {
    fn forward(&self, x: &Tensor, pass: &Pass, chains: &mut LayerChains) -> Result<Tensor> {
        let x = self.attention.forward(x, pass, &mut chains.attention)?;
        self.mlp.forward(&x, pass, &mut chains.mlp)
    }

    fn recompute(&self, x: &Tensor, pass: &Pass) -> Result<LayerChains> {
        let mut chains = LayerChains::recording();
        let x = self.attention.forward(x, pass, &mut chains.attention)?;
        self.mlp.recompute(&x, pass, &mut chains.mlp)?;
        Ok(chains)
    }
}

impl LayerChains {
    fn recording() -> Self {
        Self {
            attention: Chain::recording(),
            mlp: Chain::recording(),
        }
    }

    fn forgetting() -> Self {
        Self {
            attention: Chain::forgetting(),
            mlp: Chain::forgetting(),
        }
    }

    /// Each half passes its gradient on through the residual as well.
    fn backward(self, gradient: &Tensor) -> Result<Tensor> {
        let through_mlp = self.mlp.backward(gradient)?;
        add_in_place(&through_mlp, gradient)?;
        let through_attention = self.attention.backward(&through_mlp)?;
        add_in_place(&through_attention, &through_mlp)?;
        Ok(through_attention)
    }
}

impl Decode {
    fn forward(&self) -> Result<Tensor> {
        let mut layers = Vec::new();
        let mut x = self.input.clone();
        for layer in &self.decoder.layers {
            let mut chains = match self.keep {
                Keep::Everything => LayerChains::recording(),
                Keep::Inputs | Keep::Nothing => LayerChains::forgetting(),
            };
            let y = layer.forward(&x, &self.pass, &mut chains)?;
            match self.keep {
                Keep::Nothing => {}
                Keep::Inputs => layers.push(KeptLayer::Input(x)),
                Keep::Everything => layers.push(KeptLayer::Everything(chains)),
            }
            x = y;
        }
        let mut norm = match self.keep {
            Keep::Nothing => Chain::forgetting(),
            Keep::Inputs | Keep::Everything => Chain::recording(),
        };
        let y = norm.apply(self.decoder.norm.clone(), &x)?;
        *self.tape.lock().unwrap_or_else(PoisonError::into_inner) = Some(Tape { layers, norm });
        Ok(y)
    }

    fn backward(&self, gradient: &Tensor) -> Result<Tensor> {
        let tape = self
            .tape
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(Tape { mut layers, norm }) = tape.filter(|_| self.keep != Keep::Nothing) else {
            candle_core::bail!("a decoder that kept nothing, or was walked back twice");
        };
        let mut gradient = norm.backward(gradient)?;
        for layer in self.decoder.layers.iter().rev() {
            let chains = match layers.pop() {
                Some(KeptLayer::Everything(chains)) => chains,
                Some(KeptLayer::Input(x)) => layer.recompute(&x, &self.pass)?,
                None => candle_core::bail!("fewer layers kept than run"),
            };
            gradient = chains.backward(&gradient)?;
        }
        Ok(gradient)
    }
}

impl CustomOp1 for Decode {
    fn name(&self) -> &'static str {
        "decoder"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.forward()?;
        let shape = y.shape().clone();
        let (storage, layout) = y.storage_and_layout();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(data)) if layout.is_contiguous() => {
                Ok((CpuStorage::F32(data.clone()), shape))
            }
            _ => candle_core::bail!("the decoder's output is not float32 on the CPU"),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.backward(gradient)?))
    }
}
