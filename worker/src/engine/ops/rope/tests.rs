//! Values and gradients of rotary positions, against a plain reference.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::engine::testing::{TestWeights, check_op, random_tensor};
use candle_core::{Device, Result, Tensor};

const LAYOUT: HeadLayout = HeadLayout {
    heads: 4,
    key_value_heads: 2,
    head_dim: 8,
};
const FREQUENCIES: [f32; 4] = [1.0, 0.3, 0.1, 0.02];

/// One head: `[tokens, head_dim]`.
fn rotate(x: &Tensor, positions: &[u32]) -> Result<Tensor> {
    let angles: Vec<f32> = positions
        .iter()
        .flat_map(|p| FREQUENCIES.map(|f| *p as f32 * f))
        .collect();
    let angles = Tensor::from_vec(angles, (positions.len(), 4), &Device::Cpu)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let (a, b) = (x.narrow(1, 0, 4)?, x.narrow(1, 4, 4)?);
    let first = ((&a * &cos)? - (&b * &sin)?)?;
    let second = ((&b * &cos)? + (&a * &sin)?)?;
    Tensor::cat(&[first, second], 1)
}

fn reference(qkv: &Tensor, norms: Option<(&Tensor, &Tensor)>, positions: &[u32]) -> Result<Tensor> {
    let mut parts = Vec::new();
    for head in 0..6 {
        let mut x = qkv.narrow(1, head * 8, 8)?;
        if let Some((query, key)) = norms {
            let mean = x.sqr()?.mean_keepdim(1)?;
            let weight = if head < 4 { query } else { key };
            x = x
                .broadcast_div(&(mean + 1e-6)?.sqrt()?)?
                .broadcast_mul(weight)?;
        }
        parts.push(rotate(&x, positions)?);
    }
    parts.push(qkv.narrow(1, 6 * 8, 2 * 8)?);
    Tensor::cat(&parts, 1)
}

#[test]
fn values_and_gradients_equal_the_reference() {
    let positions: Vec<u32> = (0..50).chain(0..37).collect();
    let table = RopeTable::new(&FREQUENCIES, 50, 1.0);
    let x = random_tensor(87, LAYOUT.width(), 1);
    let weights = TestWeights::new(&[("q", &[8]), ("k", &[8])]);
    let run = |x: &[f32], dy: &[f32], norms: Option<&HeadNorms>| {
        let rope = Rope {
            layout: LAYOUT,
            norms,
            values: Values::PLAIN,
            rows: &positions,
            table: Some(&table),
        };
        let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0f32; x.len()]);
        rope.forward(x, &mut y);
        rope.backward(x, dy, &mut dx);
        (y, dx)
    };
    let without = |x: &[f32], dy: &[f32]| run(x, dy, None);
    check_op(&x, &weights, &["q", "k"], &without, &|x| {
        reference(x, None, &positions)
    });
    let norms = HeadNorms {
        query: weights.trainable("q"),
        key: weights.trainable("k"),
        epsilon: 1e-6,
        offset: false,
    };
    let with = |x: &[f32], dy: &[f32]| run(x, dy, Some(&norms));
    check_op(&x, &weights, &[], &with, &|x| {
        let (query, key) = (weights.variable("q"), weights.variable("k"));
        reference(x, Some((&query, &key)), &positions)
    });
}

/// [`rotate`] of the first `2 * pairs` dimensions of a head of 8, whose pairs lie side by side or not.
fn rotate_part(x: &Tensor, positions: &[u32], table: (usize, RotaryPairs)) -> Result<Tensor> {
    let (pairs, kind) = table;
    let of_pair = |pair: usize| match kind {
        RotaryPairs::Halves => (pair, pair + pairs),
        RotaryPairs::Neighbours => (2 * pair, 2 * pair + 1),
    };
    let mut columns: Vec<Tensor> = (0..8)
        .map(|column| x.narrow(1, column, 1))
        .collect::<Result<_>>()?;
    for (pair, frequency) in FREQUENCIES.iter().enumerate().take(pairs) {
        let angles: Vec<f32> = positions.iter().map(|p| *p as f32 * frequency).collect();
        let angles = Tensor::from_vec(angles, (positions.len(), 1), &Device::Cpu)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let (first, second) = of_pair(pair);
        let (a, b) = (columns[first].clone(), columns[second].clone());
        columns[first] = ((&a * &cos)? - (&b * &sin)?)?;
        columns[second] = ((&b * &cos)? + (&a * &sin)?)?;
    }
    Tensor::cat(&columns, 1)
}

#[test]
fn a_part_of_each_head_and_pairs_side_by_side_equal_the_reference() {
    let positions: Vec<u32> = (0..50).chain(0..37).collect();
    let x = random_tensor(87, LAYOUT.width(), 1);
    let weights = TestWeights::new(&[]);
    for (pairs, kind) in [
        (3, RotaryPairs::Halves),
        (2, RotaryPairs::Neighbours),
        (4, RotaryPairs::Neighbours),
    ] {
        let table = RopeTable::new(&FREQUENCIES[..pairs], 50, 1.0).of_pairs(kind);
        let run = |x: &[f32], dy: &[f32]| {
            let rope = Rope {
                layout: LAYOUT,
                norms: None,
                values: Values::PLAIN,
                rows: &positions,
                table: Some(&table),
            };
            let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0f32; x.len()]);
            rope.forward(x, &mut y);
            rope.backward(x, dy, &mut dx);
            (y, dx)
        };
        check_op(&x, &weights, &[], &run, &|x| {
            let mut parts = Vec::new();
            for head in 0..6 {
                let head = x.narrow(1, head * 8, 8)?;
                parts.push(rotate_part(&head, &positions, (pairs, kind))?);
            }
            parts.push(x.narrow(1, 6 * 8, 2 * 8)?);
            Tensor::cat(&parts, 1)
        });
    }
}

/// Values with a norm of each head, of their own columns and of those of the keys; and queries alone.
#[test]
fn values_that_are_normed_and_those_that_are_keys_equal_the_reference() {
    let positions: Vec<u32> = (0..50).chain(0..37).collect();
    let table = RopeTable::new(&FREQUENCIES, 50, 1.0);
    let weights = TestWeights::new(&[("q", &[8]), ("k", &[8])]);
    let norms = HeadNorms {
        query: weights.trainable("q"),
        key: weights.trainable("k"),
        epsilon: 1e-6,
        offset: false,
    };
    for (source, first) in [(KeyValues::Apart, 6), (KeyValues::Same, 4)] {
        let run = |x: &[f32], dy: &[f32]| {
            let rope = Rope {
                layout: LAYOUT,
                norms: Some(&norms),
                values: Values {
                    norm: Some(1e-6),
                    source,
                },
                rows: &positions,
                table: Some(&table),
            };
            let mut y = vec![0.0; 87 * LAYOUT.width()];
            let mut dx = vec![0.0f32; x.len()];
            rope.forward(x, &mut y);
            rope.backward(x, dy, &mut dx);
            (y, dx)
        };
        let x = random_tensor(87, (first + 2) * 8, 1);
        check_op(&x, &weights, &[], &run, &|x| {
            let (query, key) = (weights.variable("q"), weights.variable("k"));
            let values = x.narrow(1, first * 8, 2 * 8)?;
            // What the reference has of values is as it was.
            let whole = Tensor::cat(&[x.narrow(1, 0, 6 * 8)?, values.clone()], 1)?;
            let whole = reference(&whole, Some((&query, &key)), &positions)?;
            let mut parts = vec![whole.narrow(1, 0, 6 * 8)?];
            for head in 0..2 {
                let value = values.narrow(1, head * 8, 8)?;
                let mean = value.sqr()?.mean_keepdim(1)?;
                parts.push(value.broadcast_div(&(mean + 1e-6)?.sqrt()?)?);
            }
            Tensor::cat(&parts, 1)
        });
    }
}

#[test]
fn of_queries_alone_the_other_columns_stay_as_they_are() {
    let table = RopeTable::new(&FREQUENCIES, 3, 1.0);
    let rope = |source| Rope {
        layout: LAYOUT,
        norms: None,
        values: Values { norm: None, source },
        rows: &[0, 1, 2],
        table: Some(&table),
    };
    let flat = |tensor: &Tensor| crate::engine::testing::flat(tensor);
    let whole = random_tensor(3, LAYOUT.width(), 1);
    let queries = flat(&whole.narrow(1, 0, 32).unwrap().contiguous().unwrap());
    let mut expected = vec![0.0f32; 3 * 64];
    rope(KeyValues::Apart).forward(&flat(&whole), &mut expected);
    let mut found = vec![7.0f32; 3 * 64];
    rope(KeyValues::Of(0)).forward(&queries, &mut found);
    for (found, expected) in found.chunks(64).zip(expected.chunks(64)) {
        assert_eq!(found[..32], expected[..32]);
        assert!(found[32..].iter().all(|x| *x == 7.0));
    }
    let mut d_whole = vec![0.0f32; 3 * 64];
    let mut d_queries = vec![0.0f32; 3 * 32];
    let dy = flat(&random_tensor(3, 64, 2));
    rope(KeyValues::Apart).backward(&flat(&whole), &dy, &mut d_whole);
    rope(KeyValues::Of(0)).backward(&queries, &dy, &mut d_queries);
    for (found, expected) in d_queries.chunks(32).zip(d_whole.chunks(64)) {
        assert_eq!(*found, expected[..32]);
    }
}
