//! Random numbers that depend on the seed and on what they are for, never on how many were drawn before.

/// All dice of one seed.
#[derive(Clone, Copy, Debug)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    pub fn draw(self, key: &[u64]) -> u64 {
        let fold =
            |state: u64, word: &u64| mix(state ^ mix(word.wrapping_add(0x9e37_79b9_7f4a_7c15)));
        key.iter().fold(self.0, fold)
    }

    /// In `0..bound`, or 0.
    pub fn below(self, bound: u64, key: &[u64]) -> u64 {
        self.draw(key) % bound.max(1)
    }

    pub fn chance(self, percent: u64, key: &[u64]) -> bool {
        self.below(100, key) < percent
    }
}

/// Steele, Lea and Flood: "Fast splittable pseudorandom number generators" (2014).
fn mix(word: u64) -> u64 {
    let mut word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
