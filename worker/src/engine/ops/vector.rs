//! Loops over float32 slices that the compiler turns into vector code. Every sum runs in sixteen fixed lanes, so its
//! bits do not depend on the vector width that runs it.

#[cfg(target_arch = "x86_64")]
use common::instruction_set::InstructionSet;

/// Number of values in a group that are computed together.
pub const LANES: usize = 16;

/// Runs `work` compiled for the best instruction set of this CPU; its bits do not depend on which that is, because
/// nothing here is contracted or reordered. `work`, and what it calls, must be `#[inline(always)]`.
#[inline(always)]
pub fn dispatch<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
        fn with_avx512<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        #[target_feature(enable = "avx2")]
        fn with_avx2<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        match InstructionSet::chosen() {
            // SAFETY: the processor has the features.
            InstructionSet::Avx512 | InstructionSet::Avx512Bf16 => unsafe {
                return with_avx512(work);
            },
            // SAFETY: as above.
            InstructionSet::Avx2 => unsafe { return with_avx2(work) },
            InstructionSet::Scalar => {}
        }
    }
    work()
}

/// e^x to about one unit in the last place (Cephes' `expf`). Saturates below -87 and above 88; NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.000_000_3e-1;
    let y = p * (r * r) + r + 1.0;
    y * f32::from_bits((exponent.wrapping_add(127) << 23) as u32)
}

/// Keeps the compiler from turning a loop over groups of lanes inside out, one vector for the same lane of many groups,
/// gathered from all over memory. Nothing is executed.
#[inline(always)]
pub fn lanes_only() {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    // SAFETY: no instruction.
    unsafe {
        std::arch::asm!("", options(nomem, nostack, preserves_flags));
    }
}

#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh(x), to about 1e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

#[inline(always)]
fn reduce(lanes: [f32; LANES], add: impl Fn(f32, f32) -> f32) -> f32 {
    let (mut eight, mut four) = ([0.0; 8], [0.0; 4]);
    for lane in 0..8 {
        eight[lane] = add(lanes[lane], lanes[lane + 8]);
    }
    for lane in 0..4 {
        four[lane] = add(eight[lane], eight[lane + 4]);
    }
    add(add(four[0], four[2]), add(four[1], four[3]))
}

/// Sum over i of `term(a[i], b[i])`.
#[inline(always)]
pub fn sum2(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_chunks.remainder(), b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks) {
        lanes_only();
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane]);
        }
    }
    for (lane, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[lane] += term(*a, *b);
    }
    reduce(lanes, |a, b| a + b)
}

/// Sum over i of `term(a[i], b[i], c[i])`.
#[inline(always)]
pub fn sum3(a: &[f32], b: &[f32], c: &[f32], term: impl Fn(f32, f32, f32) -> f32) -> f32 {
    assert!(a.len() == b.len() && b.len() == c.len());
    let mut lanes = [0.0f32; LANES];
    let whole = a.len() / LANES * LANES;
    let groups = a.chunks_exact(LANES).zip(b.chunks_exact(LANES));
    for ((a, b), c) in groups.zip(c.chunks_exact(LANES)) {
        lanes_only();
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane], c[lane]);
        }
    }
    for (lane, i) in (whole..a.len()).enumerate() {
        lanes[lane] += term(a[i], b[i], c[i]);
    }
    reduce(lanes, |a, b| a + b)
}

#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum2(a, b, |a, b| a * b)
}

#[inline(always)]
pub fn sum_squares(a: &[f32]) -> f32 {
    dot(a, a)
}

/// The largest value; negative infinity for none. NaNs are passed over.
#[inline(always)]
pub fn max(a: &[f32]) -> f32 {
    let larger = |m: f32, v: f32| if v > m { v } else { m };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = a.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        lanes_only();
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    for (lane, &v) in rest.iter().enumerate() {
        lanes[lane] = larger(lanes[lane], v);
    }
    reduce(lanes, larger)
}

/// Replaces each x by e^(x - shift) and returns their sum.
#[inline(always)]
pub fn exp_shifted_sum(a: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let mut chunks = a.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        lanes_only();
        let mut group = [0.0; LANES];
        for lane in 0..LANES {
            group[lane] = exp(chunk[lane] - shift);
            lanes[lane] += group[lane];
        }
        chunk.copy_from_slice(&group);
    }
    for (lane, x) in chunks.into_remainder().iter_mut().enumerate() {
        *x = exp(*x - shift);
        lanes[lane] += *x;
    }
    reduce(lanes, |a, b| a + b)
}

#[inline(always)]
pub fn scale(a: &mut [f32], factor: f32) {
    for x in a {
        *x *= factor;
    }
}

/// Limits each x to `cap · tanh(x / cap)`.
#[inline(always)]
pub fn limit(a: &mut [f32], cap: f32) {
    for x in a {
        *x = cap * tanh(*x / cap);
    }
}

/// `to[i] = f(a[i])`, as [`map3`].
#[inline(always)]
pub fn map1<T: Copy>(to: &mut [T], a: &[f32], f: impl Fn(f32) -> T) {
    let (to, to_rest) = to.as_chunks_mut::<LANES>();
    let (a, a_rest) = a.as_chunks::<LANES>();
    for (to, a) in to.iter_mut().zip(a) {
        lanes_only();
        let mut group = *to;
        for lane in 0..LANES {
            group[lane] = f(a[lane]);
        }
        *to = group;
    }
    for (to, a) in to_rest.iter_mut().zip(a_rest) {
        *to = f(*a);
    }
}

/// `x[i] = f(x[i], a[i])`, as [`map3`].
#[inline(always)]
pub fn update1(x: &mut [f32], a: &[f32], f: impl Fn(f32, f32) -> f32) {
    let (x, x_rest) = x.as_chunks_mut::<LANES>();
    let (a, a_rest) = a.as_chunks::<LANES>();
    for (x, a) in x.iter_mut().zip(a) {
        lanes_only();
        let mut group = *x;
        for lane in 0..LANES {
            group[lane] = f(group[lane], a[lane]);
        }
        *x = group;
    }
    for (x, a) in x_rest.iter_mut().zip(a_rest) {
        *x = f(*x, *a);
    }
}

/// `x[i] = f(x[i], a[i], b[i])`, as [`map3`].
#[inline(always)]
pub fn update2(x: &mut [f32], a: &[f32], b: &[f32], f: impl Fn(f32, f32, f32) -> f32) {
    let (x, x_rest) = x.as_chunks_mut::<LANES>();
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for ((x, a), b) in x.iter_mut().zip(a).zip(b) {
        lanes_only();
        let mut group = *x;
        for lane in 0..LANES {
            group[lane] = f(group[lane], a[lane], b[lane]);
        }
        *x = group;
    }
    for ((x, a), b) in x_rest.iter_mut().zip(a_rest).zip(b_rest) {
        *x = f(*x, *a, *b);
    }
}

/// `to[i] = f(a[i], b[i], c[i])`. In groups of fixed length: with so many slices the compiler would not see that none
/// overlaps, and make no vector code.
#[inline(always)]
pub fn map3<T: Copy>(
    to: &mut [T],
    a: &[f32],
    b: &[f32],
    c: &[f32],
    f: impl Fn(f32, f32, f32) -> T,
) {
    let (to, to_rest) = to.as_chunks_mut::<LANES>();
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let (c, c_rest) = c.as_chunks::<LANES>();
    for (((to, a), b), c) in to.iter_mut().zip(a).zip(b).zip(c) {
        lanes_only();
        let mut group = *to;
        for lane in 0..LANES {
            group[lane] = f(a[lane], b[lane], c[lane]);
        }
        *to = group;
    }
    for (((to, a), b), c) in to_rest.iter_mut().zip(a_rest).zip(b_rest).zip(c_rest) {
        *to = f(*a, *b, *c);
    }
}

/// `(first[i], second[i]) = f(a[i], b[i], c[i], d[i])`, as [`map3`].
#[inline(always)]
pub fn map4<T: Copy>(
    from: [&[f32]; 4],
    (first, second): (&mut [T], &mut [T]),
    f: impl Fn(f32, f32, f32, f32) -> (T, T),
) {
    let ([a, b, c, d], rest) = (from.map(|x| x.as_chunks::<LANES>().0), from);
    let whole = first.len() / LANES * LANES;
    let (firsts, first_rest) = first.as_chunks_mut::<LANES>();
    let (seconds, second_rest) = second.as_chunks_mut::<LANES>();
    let outs = firsts.iter_mut().zip(seconds);
    for (((out, a), b), (c, d)) in outs.zip(a).zip(b).zip(c.iter().zip(d)) {
        lanes_only();
        let (mut first, mut second) = (*out.0, *out.1);
        for lane in 0..LANES {
            (first[lane], second[lane]) = f(a[lane], b[lane], c[lane], d[lane]);
        }
        (*out.0, *out.1) = (first, second);
    }
    for (i, out) in first_rest.iter_mut().zip(second_rest).enumerate() {
        let [a, b, c, d] = rest.map(|x| x[whole + i]);
        (*out.0, *out.1) = f(a, b, c, d);
    }
}

/// `a += factor * b`
#[inline(always)]
pub fn add_scaled(a: &mut [f32], b: &[f32], factor: f32) {
    for (a, b) in a.iter_mut().zip(b) {
        *a += factor * b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in -8700..=8800 {
            let x = i as f32 * 0.01;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) / expected - 1.0).abs();
            assert!(error < 2.5e-7, "exp({x}): relative error {error}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn sums_do_not_depend_on_the_instruction_set() {
        let a: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut b = a.clone();
        let mut c = a.clone();
        assert_eq!(dispatch(|| dot(&a, &a)).to_bits(), dot(&a, &a).to_bits());
        let (p, q) = (
            dispatch(|| exp_shifted_sum(&mut b, 0.5)),
            exp_shifted_sum(&mut c, 0.5),
        );
        assert_eq!(p.to_bits(), q.to_bits());
        assert_eq!(b, c);
        assert_eq!(max(&a), a.iter().copied().fold(f32::MIN, f32::max));
    }
}
