//! Memory for activations and gradients, used again by the next layer, slot and step.
//!
//! What a buffer holds when it is taken is left from before: whoever takes one writes every element that is read.
//! In the steady state of training nothing is allocated, zeroed or faulted in.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::MmapMut;

use super::ops::element::Element;

/// Smallest buffer that is pooled, in bytes; smaller ones come from the allocator and go back to it.
const SMALLEST_POOLED_BYTES: usize = 64 << 10;
/// Sizes of pooled buffers are multiples of this.
const PAGE_BYTES: usize = 4 << 10;
/// Slots after which a buffer that nobody took goes back to the system.
const KEPT_SLOTS: u64 = 4;

/// Buffers that are free, shared by all that take some.
#[derive(Clone, Default)]
pub struct Pool(Arc<Mutex<Free>>);

#[derive(Default)]
struct Free {
    blocks: Vec<FreeBlock>,
    slot: u64,
}

struct FreeBlock {
    memory: MmapMut,
    last_used: u64,
}

enum Memory {
    Small(Vec<u64>),
    Large(MmapMut),
}

/// A buffer of `len` elements, which goes back to its pool when dropped.
pub struct Buffer<E> {
    memory: Memory,
    len: usize,
    pool: Pool,
    element: PhantomData<E>,
}

impl Pool {
    /// Takes a buffer of `len` elements with anything in it.
    pub fn take<E: Element>(&self, len: usize) -> Buffer<E> {
        let bytes = len * size_of::<E>();
        let memory = match bytes < SMALLEST_POOLED_BYTES {
            true => Memory::Small(vec![0; bytes.div_ceil(size_of::<u64>())]),
            false => self.lock().take(bytes.next_multiple_of(PAGE_BYTES)),
        };
        Buffer {
            memory,
            len,
            pool: self.clone(),
            element: PhantomData,
        }
    }

    pub fn zeroed<E: Element>(&self, len: usize) -> Buffer<E> {
        let mut buffer = self.take(len);
        buffer.fill(E::zeroed());
        buffer
    }

    /// Gives memory back to the system that no buffer of the last few slots was made of.
    pub fn end_slot(&self) {
        let mut free = self.lock();
        free.slot += 1;
        let oldest = free.slot.saturating_sub(KEPT_SLOTS);
        free.blocks.retain(|block| block.last_used >= oldest);
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        // Every change to the list is one push or one removal.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Free {
    /// Takes the smallest free block that is large enough, but none of more than twice the size.
    ///
    /// Where there is none, one that is a little too small is freed for the new one, so that growing slots do not leave a trail.
    fn take(&mut self, bytes: usize) -> Memory {
        let sizes = self.blocks.iter().map(|block| block.memory.len());
        let sizes = sizes.enumerate();
        let fitting = sizes
            .clone()
            .filter(|(_, size)| (bytes..=2 * bytes).contains(size));
        if let Some((index, _)) = fitting.min_by_key(|(_, size)| *size) {
            return Memory::Large(self.blocks.swap_remove(index).memory);
        }
        let smaller = sizes.filter(|(_, size)| (bytes / 2..bytes).contains(size));
        if let Some((index, _)) = smaller.max_by_key(|(_, size)| *size) {
            self.blocks.swap_remove(index);
        }
        match MmapMut::map_anon(bytes) {
            Ok(memory) => {
                // Only a hint, and it costs nothing where it is not taken.
                #[cfg(target_os = "linux")]
                let _ = memory.advise(memmap2::Advice::HugePage);
                Memory::Large(memory)
            }
            // The allocator says what is to be said when memory is out.
            Err(_) => Memory::Small(vec![0; bytes / size_of::<u64>()]),
        }
    }
}

impl<E> Drop for Buffer<E> {
    fn drop(&mut self) {
        let memory = std::mem::replace(&mut self.memory, Memory::Small(Vec::new()));
        if let Memory::Large(memory) = memory {
            let mut free = self.pool.lock();
            let last_used = free.slot;
            free.blocks.push(FreeBlock { memory, last_used });
        }
    }
}

impl<E: Element> Deref for Buffer<E> {
    type Target = [E];

    fn deref(&self) -> &[E] {
        let bytes = match &self.memory {
            Memory::Small(words) => bytemuck::cast_slice(words),
            Memory::Large(map) => &map[..],
        };
        &bytemuck::cast_slice(&bytes[..self.len * size_of::<E>()])[..self.len]
    }
}

impl<E: Element> DerefMut for Buffer<E> {
    fn deref_mut(&mut self) -> &mut [E] {
        let bytes = match &mut self.memory {
            Memory::Small(words) => bytemuck::cast_slice_mut(words),
            Memory::Large(map) => &mut map[..],
        };
        bytemuck::cast_slice_mut(&mut bytes[..self.len * size_of::<E>()])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use half::bf16;

    fn free(pool: &Pool) -> Vec<usize> {
        let mut sizes: Vec<usize> = pool.lock().blocks.iter().map(|b| b.memory.len()).collect();
        sizes.sort_unstable();
        sizes
    }

    #[test]
    fn a_buffer_is_used_again_by_any_type_of_a_similar_size() {
        let pool = Pool::default();
        let mut first = pool.take::<f32>(1 << 16);
        first[17] = 3.0;
        let address = first.as_ptr() as usize;
        drop(first);
        let second = pool.take::<bf16>(100_000);
        assert_eq!((second.as_ptr() as usize, second.len()), (address, 100_000));
        let other = pool.take::<f32>(1 << 16);
        assert_ne!(other.as_ptr() as usize, address);
        drop((second, other));
        assert!(pool.zeroed::<f32>(1 << 16).iter().all(|x| *x == 0.0));
    }

    #[test]
    fn a_larger_slot_replaces_buffers_and_unused_ones_go() {
        let pool = Pool::default();
        drop(pool.take::<f32>(100 << 10));
        drop(pool.take::<f32>(150 << 10));
        assert_eq!(free(&pool), [600 << 10]);
        for _ in 0..KEPT_SLOTS {
            pool.end_slot();
        }
        assert_eq!(free(&pool).len(), 1);
        pool.end_slot();
        assert!(free(&pool).is_empty());
        drop(pool.take::<f32>(10));
        assert!(free(&pool).is_empty(), "small ones are the allocator's");
    }
}
