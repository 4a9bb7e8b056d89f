//! The one source of randomness: a counter-based generator keyed by what the numbers are for, so that they never
//! depend on who draws them, when, or how many were drawn before.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A stream of numbers that is a function of its key alone.
pub struct CounterRng(ChaCha8Rng);

impl CounterRng {
    /// The stream for `seed` and the words that say what it is for (purpose, then for example step, slot, layer).
    pub fn new(seed: u64, key: &[u64]) -> Self {
        Self(ChaCha8Rng::from_seed(Self::key(seed, key)))
    }

    /// The ChaCha8 key of that stream, for who draws from it elsewhere: block and stream number begin at 0.
    pub fn key(seed: u64, key: &[u64]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        for word in key {
            hasher.update(&word.to_le_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Fills a slice with uniform numbers, four of each word.
    pub fn fill(&mut self, out: &mut [u16]) {
        // The words' bytes follow each other from the least on, and memory is read as such.
        self.0.fill_bytes(bytemuck::cast_slice_mut(out));
    }

    /// Numbers that [`Self::fill`] makes of a word.
    pub const NUMBERS_PER_WORD: u64 = 4;

    /// Words that [`Self::normal`] draws.
    pub const WORDS_PER_NORMAL: u64 = 2;

    /// Passes over words, as if they had been drawn.
    pub fn skip(&mut self, words: u64) {
        self.0
            .set_word_pos(self.0.get_word_pos() + 2 * u128::from(words));
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in `0..bound` without bias (Lemire, 2019). `bound` is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(bound);
            if wide as u64 >= threshold {
                return (wide >> 64) as u64;
            }
        }
    }

    /// Standard normal (Box and Muller, 1958).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * libm::log(1.0 - self.uniform())).sqrt();
        radius * libm::cos(2.0 * std::f64::consts::PI * self.uniform())
    }

    /// Fisher and Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i as u64 + 1) as usize;
            items.swap(i, j);
        }
    }
}
