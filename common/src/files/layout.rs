//! Names, shapes and order of the trainable tensors: what makes a flat list of scalars mean something, and the same
//! thing on every machine.

use bytemuck::Pod;
use half::bf16;

use crate::job::{BaseDtype, MomentDtype, Moments};

/// The trainable tensors, ordered by name; a *flat* buffer is their concatenation in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub tensors: Vec<TensorLayout>,
    /// Number of scalars of all tensors.
    pub scalars: usize,
    /// What the optimizer keeps of each scalar.
    pub moments: Moments,
    /// What the weights themselves are kept in.
    pub weights: BaseDtype,
}

/// Moments of AdamW.
const USUAL_MOMENTS: Moments = Moments {
    count: 2,
    dtype: MomentDtype::Float32,
};

/// Name, shape and place of one trainable tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorLayout {
    pub name: String,
    pub shape: Vec<usize>,
    /// Index of its first scalar in a flat buffer.
    pub offset: usize,
}

impl TensorLayout {
    pub fn scalars(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Layout {
    /// Orders the tensors by name. The names are distinct.
    pub fn new(tensors: impl IntoIterator<Item = (String, Vec<usize>)>) -> Self {
        let mut named: Vec<_> = tensors.into_iter().collect();
        named.sort();
        assert!(
            named.windows(2).all(|pair| pair[0].0 != pair[1].0),
            "two trainable tensors have one name"
        );
        let mut scalars = 0;
        let tensors = named
            .into_iter()
            .map(|(name, shape)| {
                let offset = scalars;
                scalars += shape.iter().product::<usize>();
                TensorLayout {
                    name,
                    shape,
                    offset,
                }
            })
            .collect();
        Self {
            tensors,
            scalars,
            moments: USUAL_MOMENTS,
            weights: BaseDtype::Float32,
        }
    }

    /// The same tensors, with these moments of each scalar.
    pub fn with_moments(self, moments: Moments) -> Self {
        Self { moments, ..self }
    }

    /// The same tensors, with weights of this type.
    pub fn with_weights(self, weights: BaseDtype) -> Self {
        Self { weights, ..self }
    }

    /// Bytes of a state: weights and moments.
    pub fn state_bytes(&self) -> usize {
        self.buffer_bytes().iter().sum()
    }

    /// Bytes of each buffer of a state, in the order of [`Snapshot::buffers`](super::Snapshot::buffers).
    pub fn buffer_bytes(&self) -> Vec<usize> {
        let weight = match self.weights {
            BaseDtype::Float32 => size_of::<f32>(),
            BaseDtype::Bfloat16 => size_of::<bf16>(),
        };
        let mut bytes = vec![self.scalars * weight];
        bytes.extend(self.moment_bytes());
        bytes
    }

    /// BLAKE3 over names and shapes in order, over the moments where they are not AdamW's, and over the type of weights that are
    /// not float32, hex.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for tensor in &self.tensors {
            hasher.update(&(tensor.name.len() as u64).to_le_bytes());
            hasher.update(tensor.name.as_bytes());
            hasher.update(&(tensor.shape.len() as u64).to_le_bytes());
            for &size in &tensor.shape {
                hasher.update(&(size as u64).to_le_bytes());
            }
        }
        if self.moments.count != USUAL_MOMENTS.count {
            hasher.update(b"moments");
            hasher.update(&(self.moments.count as u64).to_le_bytes());
        }
        if self.moments.dtype == MomentDtype::EightBits {
            hasher.update(b"moments of 8 bits");
        }
        if self.weights == BaseDtype::Bfloat16 {
            hasher.update(b"weights of bfloat16");
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The tensors of a flat buffer, in order.
    pub fn split<'a, T>(&'a self, flat: &'a [T]) -> impl Iterator<Item = &'a [T]> {
        assert_eq!(flat.len(), self.scalars, "the buffer is of another layout");
        self.tensors
            .iter()
            .map(move |tensor| &flat[tensor.offset..tensor.offset + tensor.scalars()])
    }

    pub fn find(&self, name: &str) -> Option<&TensorLayout> {
        self.tensors
            .binary_search_by(|tensor| tensor.name.as_str().cmp(name))
            .ok()
            .map(|index| &self.tensors[index])
    }
}

/// The `weights_digest`: BLAKE3 over the layout's digest and the little-endian bytes of all trainable tensors in order.
pub fn weights_digest<'a, T: Pod>(
    layout: &Layout,
    tensors: impl Iterator<Item = &'a [T]>,
) -> String {
    /// Below this, spreading work over threads costs more than it saves.
    const PARALLEL_BYTES: usize = 256 << 10;
    let mut hasher = blake3::Hasher::new();
    hasher.update(layout.digest().as_bytes());
    let mut scalars = 0;
    for tensor in tensors {
        scalars += tensor.len();
        let bytes: &[u8] = bytemuck::cast_slice(tensor);
        if bytes.len() >= PARALLEL_BYTES {
            hasher.update_rayon(bytes);
        } else {
            hasher.update(bytes);
        }
    }
    assert_eq!(scalars, layout.scalars, "the tensors are of another layout");
    hasher.finalize().to_hex().to_string()
}

// Files and digests hold little-endian scalars, and memory is read as such.
const _: () = assert!(cfg!(target_endian = "little"));

pub(super) fn as_bytes(scalars: &[f32]) -> &[u8] {
    bytemuck::cast_slice(scalars)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::job::Optimizer;

    fn layout() -> Layout {
        Layout::new([("b".into(), vec![2, 3]), ("a".into(), vec![4])])
    }

    #[test]
    fn tensors_are_ordered_by_name() {
        let layout = layout();
        assert_eq!(layout.scalars, 10);
        assert_eq!(layout.find("b").unwrap().offset, 4);
        assert!(layout.find("c").is_none());
        let flat: Vec<f32> = (0..10).map(|i| i as f32).collect();
        let parts: Vec<&[f32]> = layout.split(&flat).collect();
        assert_eq!(parts, [&flat[..4], &flat[4..]]);
    }

    #[test]
    fn the_digest_tells_shapes_moments_and_weights_apart() {
        let other = Layout::new([("b".into(), vec![3, 2]), ("a".into(), vec![4])]);
        assert_ne!(layout().digest(), other.digest());
        let with = |optimizer: Optimizer| layout().with_moments(optimizer.moments()).digest();
        assert_eq!(layout().digest(), with(Optimizer::Adamw));
        let kinds = [
            Optimizer::Adamw,
            Optimizer::Adamw8bit,
            Optimizer::Lion,
            Optimizer::Lion8bit,
        ];
        let mut digests: BTreeSet<String> = kinds.map(with).into();
        digests.insert(layout().with_weights(BaseDtype::Bfloat16).digest());
        assert_eq!(digests.len(), kinds.len() + 1);
    }

    #[test]
    fn one_changed_bit_changes_the_weights_digest() {
        let layout = layout();
        let mut flat = vec![1.0f32; 10];
        let before = weights_digest(&layout, layout.split(&flat));
        flat[7] = f32::from_bits(flat[7].to_bits() ^ 1);
        assert_ne!(before, weights_digest(&layout, layout.split(&flat)));
    }
}
