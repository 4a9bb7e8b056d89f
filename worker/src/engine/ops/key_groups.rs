//! Columns of what linear attention reads that lie key head by key head (Qwen3-Next): of each head its query, its key, its values and
//! their gates; and behind those of all heads, of each what says how much its value heads write, then how much they keep.
//!
//! In: rows of such columns. Out: the same rows, part by part: all queries, all keys, and so on; or the other way round.

use rayon::prelude::*;

use super::ROW_TILE;
use super::delta_rule::DeltaHeads;
use super::element::Element;

/// The two orders of the columns of these heads.
#[derive(Clone, Copy, Debug)]
pub struct KeyGroups(pub DeltaHeads);

/// Columns that lie together in both orders.
#[derive(Clone, Copy, Debug)]
struct Span {
    /// The first of them, key head by key head.
    grouped: usize,
    /// The first of them, part by part.
    split: usize,
    columns: usize,
}

impl KeyGroups {
    /// Columns of a row.
    pub fn width(&self) -> usize {
        self.0.width() + self.0.values() + 2 * self.0.value_heads
    }

    fn spans(&self) -> Vec<Span> {
        let DeltaHeads {
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        } = self.0;
        let shared = value_heads / key_heads;
        let values = shared * value_dim;
        // The parts of a key head in each of the two linears that project them.
        let linears: [&[usize]; 2] = [&[key_dim, key_dim, values, values], &[shared, shared]];
        let (mut spans, mut first) = (Vec::new(), 0);
        for parts in linears {
            let of_head: usize = parts.iter().sum();
            for head in 0..key_heads {
                let mut before = 0;
                spans.extend(parts.iter().map(|columns| {
                    let span = Span {
                        grouped: first + head * of_head + before,
                        split: first + key_heads * before + head * columns,
                        columns: *columns,
                    };
                    before += columns;
                    span
                }));
            }
            first += key_heads * of_head;
        }
        spans
    }

    /// Puts the columns of each row part by part, where they lay key head by key head.
    pub fn split<E: Element>(&self, rows: &mut [E]) {
        self.reorder(rows, |span| (span.grouped, span.split));
    }

    /// Undoes [`split`](Self::split).
    pub fn join<E: Element>(&self, rows: &mut [E]) {
        self.reorder(rows, |span| (span.split, span.grouped));
    }

    fn reorder<E: Element>(&self, rows: &mut [E], places: impl Fn(&Span) -> (usize, usize) + Sync) {
        let (spans, width) = (self.spans(), self.width());
        rows.par_chunks_mut(ROW_TILE * width).for_each(|rows| {
            let mut before = vec![E::zeroed(); width];
            for row in rows.chunks_exact_mut(width) {
                before.copy_from_slice(row);
                for span in &spans {
                    let (from, to) = places(span);
                    row[to..][..span.columns].copy_from_slice(&before[from..][..span.columns]);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two key heads of three columns, with two value heads each, of two columns.
    const HEADS: DeltaHeads = DeltaHeads {
        key_heads: 2,
        value_heads: 4,
        key_dim: 3,
        value_dim: 2,
    };

    #[test]
    fn columns_of_each_key_head_go_to_those_of_their_part() {
        // Hundreds: the part. Tens: the key head.
        let [q, k, v, z, b, a] = [0, 100, 200, 300, 400, 500];
        let run = |part: i32, head: i32, columns: i32| (0..columns).map(move |c| part + head + c);
        let grouped = [0, 10].into_iter().flat_map(|head| {
            let keys = run(q, head, 3).chain(run(k, head, 3));
            keys.chain(run(v, head, 4)).chain(run(z, head, 4))
        });
        let gates = [0, 10].into_iter();
        let gates = gates.flat_map(|head| run(b, head, 2).chain(run(a, head, 2)));
        let row: Vec<f32> = grouped.chain(gates).map(|x| x as f32).collect();
        let sizes = [(q, 3), (k, 3), (v, 4), (z, 4), (b, 2), (a, 2)];
        let expected: Vec<f32> = sizes
            .into_iter()
            .flat_map(|(part, columns)| run(part, 0, columns).chain(run(part, 10, columns)))
            .map(|x| x as f32)
            .collect();
        let groups = KeyGroups(HEADS);
        assert_eq!(row.len(), groups.width());
        // More rows than a task takes.
        let mut rows = row.repeat(130);
        groups.split(&mut rows);
        assert_eq!(rows, expected.repeat(130));
        groups.join(&mut rows);
        assert_eq!(rows, row.repeat(130));
    }
}
