//! Matrices of tokens in 4 bits, tile by tile, beside the same widened before.

use common::nf4::Nf4;
use half::bf16;

use super::*;
use crate::engine::cuda::testing::gpu;
use crate::engine::ops::element::Element;
use crate::engine::ops::nf4::Nf4View;
use crate::engine::testing::random_values;

/// Logits, the gradient of the rows, and some rows of a matrix.
fn results<E: Element + GpuElement>(
    gpu: &Gpu,
    matrix: &TokenMatrix<E>,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    const ROWS: usize = 5;
    let (vocabulary, width) = (matrix.vocabulary, matrix.width);
    let rounded = |values: Vec<f32>| -> Vec<E> { values.into_iter().map(E::round_from).collect() };
    let x = gpu
        .upload(&rounded(random_values(ROWS * width, 2)))
        .unwrap();
    let d_logits = random_values(ROWS * vocabulary, 3);
    let d_logits = gpu.upload(&rounded(d_logits)).unwrap();
    let mut logits = gpu.take::<f32>(ROWS * vocabulary).unwrap();
    let out = &mut logits.as_view_mut();
    matrix.logits(gpu, (&x.as_view(), ROWS), out, 0.5).unwrap();
    let mut dx = gpu.take::<f32>(ROWS * width).unwrap();
    let (d_logits, out) = ((&d_logits.as_view(), ROWS), &mut dx.as_view_mut());
    matrix.backward_input(gpu, d_logits, out).unwrap();
    let ids = gpu.upload(&[3u32, 0, vocabulary as u32 - 1, 3]).unwrap();
    let mut rows = gpu.take::<f32>(4 * width).unwrap();
    let out = &mut rows.as_view_mut();
    matrix.gather(gpu, &ids.as_view(), out, 2.0).unwrap();
    let read = |buffer: &DeviceBuffer<f32>, length| gpu.download(buffer, length).unwrap();
    (
        read(&logits, ROWS * vocabulary),
        read(&dx, ROWS * width),
        read(&rows, 4 * width),
    )
}

fn check<E: Element + GpuElement>(gpu: &Gpu, vocabulary: usize, width: usize) {
    let shape = [vocabulary, width];
    let values = random_values(vocabulary * width, 1);
    let quantised = Nf4::quantise(&values, true).unwrap();
    let view = Nf4View::new(&quantised, vocabulary, width);
    let mut wide = vec![E::zeroed(); values.len()];
    for (row, out) in wide.chunks_exact_mut(width).enumerate() {
        view.widen(row, 0, out);
    }
    let scratch = Arc::new(Scratch::default());
    let wide = Frozen::Wide(gpu.upload(&wide).unwrap());
    let expected = results(gpu, &TokenMatrix::frozen(shape, wide, &scratch));
    for tile in [[vocabulary, width], [8, 16], [64, 7], [1, width]] {
        let matrix = TokenMatrix::<E> {
            values: Values::FourBits {
                matrix: FourBits::upload(gpu, &quantised).unwrap(),
                tile,
                scratch: scratch.clone(),
            },
            vocabulary,
            width,
            range: None,
        };
        let what = format!("{shape:?} in tiles of {tile:?}");
        assert!(results(gpu, &matrix) == expected, "{what}");
    }
}

/// On GPUs a product of a tile may be computed by another algorithm than that of the whole.
#[test]
fn tiles_have_the_bits_of_the_whole() {
    let Some(gpu) = gpu() else { return };
    if !gpu.name().contains("emulated") {
        return;
    }
    for (vocabulary, width) in [(61, 36), (100, 64), (7, 9)] {
        check::<f32>(gpu, vocabulary, width);
        check::<bf16>(gpu, vocabulary, width);
    }
}
