//! Matrices of 4 bits on the GPU have the processor's bits, whichever part of them is asked for.

use common::nf4::{NF4_LEVELS, Nested, Nf4, Scales};
use half::bf16;

use super::*;
use crate::engine::cuda::testing::gpu;
use crate::engine::ops::element::Element;
use crate::engine::ops::nf4::Nf4View;
use crate::engine::testing::random_values;

/// The values of FP4 (bitsandbytes, `functional.py`, `get_4bit_type`).
const FP4_LEVELS: [f32; 16] = [
    0.0,
    0.005_208_333,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    -0.0,
    -0.005_208_333,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// A matrix of any codes, in blocks of any length.
fn matrix(scalars: usize, block: usize, levels: [f32; 16], is_nested: bool) -> Nf4 {
    let codes = random_values(scalars.div_ceil(2), 1);
    let codes = codes.iter().map(|x| (x * 1000.0) as i64 as u8).collect();
    let absmax = random_values(scalars.div_ceil(block), 2);
    let absmax: Vec<f32> = absmax.iter().map(|x| 0.01 + x.abs()).collect();
    let scales = match is_nested {
        true => Scales::Nested(Nested::quantise(&absmax)),
        false => Scales::Plain(absmax),
    };
    Nf4::of_parts(codes, scalars, block, levels, scales).unwrap()
}

/// What the processor makes of a window.
fn expected<E: Element>(matrix: &Nf4, rows: usize, window: Window) -> Vec<E> {
    let view = Nf4View::new(matrix, rows, window.width);
    let mut all = vec![E::zeroed(); window.rows * window.columns];
    for (row, out) in all.chunks_exact_mut(window.columns).enumerate() {
        view.widen(window.first_row + row, window.first_column, out);
    }
    all
}

fn bits<E: Element>(values: &[E]) -> Vec<u32> {
    values.iter().map(|x| x.wide().to_bits()).collect()
}

/// Compares a window, in rows `gap` scalars apart that begin `skip` scalars into a buffer, whose other scalars stay as they are.
fn check<E: Element + GpuElement>(
    gpu: &Gpu,
    (matrix, rows): (&Nf4, usize),
    window: Window,
    [skip, gap]: [usize; 2],
) {
    let on_gpu = FourBits::upload(gpu, matrix).unwrap();
    let stride = window.columns + gap;
    let before = vec![E::round_from(-77.0); skip + window.rows * stride];
    let mut buffer = gpu.upload(&before).unwrap();
    let to = (&mut buffer.slice_mut(skip..), stride);
    on_gpu.widen(gpu, window, to).unwrap();
    let mut wanted = before.clone();
    let values = expected::<E>(matrix, rows, window);
    let to = wanted[skip..].chunks_exact_mut(stride);
    for (to, values) in to.zip(values.chunks_exact(window.columns)) {
        to[..window.columns].copy_from_slice(values);
    }
    let found = gpu.download(&buffer, before.len()).unwrap();
    assert!(
        bits(&found) == bits(&wanted),
        "{window:?} of {rows} rows in blocks of {}, {skip} skipped, {gap} between",
        matrix.block()
    );
}

#[test]
fn every_window_has_the_processor_s_bits() {
    let Some(gpu) = gpu() else { return };
    // Blocks that end with rows, that cross them, that have many rows; columns that are no multiple of what a thread widens.
    for (rows, width) in [(5, 64), (7, 50), (3, 7), (2, 300), (70, 24), (33, 1)] {
        for (block, levels, is_nested) in [
            (64, NF4_LEVELS, true),
            (64, NF4_LEVELS, false),
            (32, FP4_LEVELS, true),
            (128, FP4_LEVELS, false),
            (4096, NF4_LEVELS, true),
        ] {
            let matrix = matrix(rows * width, block, levels, is_nested);
            let whole = Window::whole([rows, width]);
            let part = Window {
                first_row: rows / 3,
                rows: rows - rows / 3 - 1,
                first_column: width / 5,
                columns: width - width / 5,
                width,
            };
            let aligned = Window {
                first_column: width / 2 / 8 * 8,
                columns: width - width / 2 / 8 * 8,
                ..whole
            };
            for window in [whole, part, aligned] {
                for place in [[0, 0], [0, 8], [1, 3], [8, 16]] {
                    check::<f32>(gpu, (&matrix, rows), window, place);
                    check::<bf16>(gpu, (&matrix, rows), window, place);
                }
            }
        }
    }
}

#[test]
fn rows_by_number_are_those_of_the_widened_matrix() {
    let Some(gpu) = gpu() else { return };
    for (vocabulary, width, is_nested) in [(61, 36, true), (9, 7, false), (40, 64, true)] {
        let matrix = matrix(vocabulary * width, 64, NF4_LEVELS, is_nested);
        let on_gpu = FourBits::upload(gpu, &matrix).unwrap();
        let rows: Vec<u32> = (0..30)
            .map(|row| row * 7 % vocabulary as u32)
            .chain([0, vocabulary as u32 - 1])
            .collect();
        let ids = gpu.upload(&rows).unwrap();
        let found = |is_narrow: bool| {
            let mut out = gpu.take::<f32>(rows.len() * width).unwrap();
            let to = (&mut out.as_view_mut(), width);
            let ids = ids.as_view();
            match is_narrow {
                true => on_gpu.gather::<bf16>(gpu, &ids, to, 3.0).unwrap(),
                false => on_gpu.gather::<f32>(gpu, &ids, to, 3.0).unwrap(),
            }
            gpu.download(&out, rows.len() * width).unwrap()
        };
        let window = Window::whole([vocabulary, width]);
        let row = |all: &[f32], row: u32| all[row as usize * width..][..width].to_vec();
        let gathered = |all: Vec<f32>| -> Vec<u32> {
            let values = rows.iter().flat_map(|number| row(&all, *number));
            values.map(|x| (3.0 * x).to_bits()).collect()
        };
        let wide = expected::<f32>(&matrix, vocabulary, window);
        assert_eq!(bits(&found(false)), gathered(wide));
        let narrow = expected::<bf16>(&matrix, vocabulary, window);
        let narrow = narrow.iter().map(|x| x.wide()).collect();
        assert_eq!(bits(&found(true)), gathered(narrow));
    }
}

#[test]
fn a_matrix_takes_what_is_told_of_one() {
    let Some(gpu) = gpu() else { return };
    let values = random_values(512 * 1024, 1);
    for (is_nested, share) in [(true, 0.26), (false, 0.29)] {
        let matrix = Nf4::quantise(&values, is_nested).unwrap();
        let bytes = FourBits::upload(gpu, &matrix).unwrap().bytes();
        let told = common::nf4::bytes(values.len() as u64, is_nested) as usize;
        // And what the codes stand for.
        assert_eq!(bytes, told + 16 * size_of::<f32>());
        let of_bfloat16 = bytes as f64 / (2 * values.len()) as f64;
        assert!(of_bfloat16 <= share, "{of_bfloat16}");
    }
}

#[test]
fn rows_are_copied_and_nothing_beside_them() {
    let Some(gpu) = gpu() else { return };
    let values = random_values(5 * 12, 1);
    let from = gpu.upload(&values).unwrap();
    let mut to = gpu.upload(&[-1.0f32; 5 * 20]).unwrap();
    let rows = Rows::strided(5, 7, 12);
    let target = (&mut to.slice_mut(3..), 19);
    copy_rows(gpu, (&from.slice(2..), rows), target).unwrap();
    let mut wanted = vec![-1.0; 5 * 20];
    for row in 0..5 {
        wanted[3 + row * 19..][..7].copy_from_slice(&values[2 + row * 12..][..7]);
    }
    assert_eq!(gpu.download(&to, wanted.len()).unwrap(), wanted);
}
