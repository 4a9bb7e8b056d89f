//! The values that 8 bits stand for, times what they are scaled by: in each power of ten the middles of ever more equal parts
//! ("dynamic tree quantisation", Dettmers, 2016), with 0 and 1.
//!
//! Source: bitsandbytes 0.50, `functional.py`, `create_dynamic_map`.

use std::sync::LazyLock;

/// Values of 8 bits, ascending.
pub type Map = [f32; 256];

/// Powers of ten, the last of which ends at 1.
const POWERS: i32 = 7;

/// The map of both signs: 127 values of each, 0 and 1.
pub fn signed() -> &'static Map {
    static MAP: LazyLock<Map> = LazyLock::new(|| {
        let mirrored = positive(1).flat_map(|value| [value, -value]);
        ascending(mirrored)
    });
    &MAP
}

/// The map of what is never negative: 254 values between 0 and 1, and these two.
pub fn unsigned() -> &'static Map {
    static MAP: LazyLock<Map> = LazyLock::new(|| ascending(positive(2)));
    &MAP
}

/// Values above 0 and below 1, where the first power of ten has so many.
fn positive(first: usize) -> impl Iterator<Item = f32> {
    (0..POWERS).flat_map(move |power| {
        let factor = 10f64.powi(power + 1 - POWERS) as f32;
        let parts = first << power;
        let middle = move |part| (border(part, parts) + border(part + 1, parts)) / 2.0;
        (0..parts).map(move |part| factor * middle(part))
    })
}

/// These, 0 and 1, in order.
fn ascending(values: impl Iterator<Item = f32>) -> Map {
    let mut map = [0.0; 256];
    map[1] = 1.0;
    for (place, value) in map[2..].iter_mut().zip(values) {
        *place = value;
    }
    map.sort_by(f32::total_cmp);
    map
}

/// A border of equal parts of [0.1, 1], counted from the nearer end in one operation, as PyTorch's `linspace` does.
fn border(index: usize, parts: usize) -> f32 {
    let step = (1.0 - 0.1f32) / parts as f32;
    match index < parts.div_ceil(2) {
        true => step.mul_add(index as f32, 0.1),
        false => (-step).mul_add((parts - index) as f32, 1.0),
    }
}
