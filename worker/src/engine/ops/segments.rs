//! Which tokens of a batch may attend to which, and the tiles that attention works in: a function of the segment
//! lengths alone.

use std::ops::Range;
use std::sync::Arc;

/// Most query rows in one tile.
const QUERY_TILE: usize = 64;
/// Rows up to which short segments are gathered in one run.
const RUN_ROWS: usize = 256;

/// Segments, as they are and as layers with a window see them.
#[derive(Debug)]
pub struct SegmentViews {
    whole: Arc<Segments>,
    windowed: Vec<(usize, Segments)>,
}

impl SegmentViews {
    /// Views through these windows. One that reaches over the longest segment hides nothing.
    pub fn new(whole: Arc<Segments>, windows: &[usize], longest: usize) -> Self {
        let narrow = windows.iter().filter(|window| **window < longest);
        Self {
            windowed: narrow
                .map(|window| (*window, whole.windowed(*window)))
                .collect(),
            whole,
        }
    }

    pub fn through(&self, window: Option<usize>) -> &Segments {
        let found = self.windowed.iter().find(|(own, _)| Some(*own) == window);
        found.map_or(&self.whole, |(_, segments)| segments)
    }
}

/// Segments in order: token i sees `starts[i]..=i`.
#[derive(Debug)]
pub struct Segments {
    starts: Vec<usize>,
    /// Runs of whole segments, together covering all tokens; or the last tokens of one segment, whose others only are seen.
    runs: Vec<Range<usize>>,
}

impl Segments {
    /// Makes segments of their lengths, in order.
    pub fn new(lengths: &[usize]) -> Self {
        let mut starts = Vec::with_capacity(lengths.iter().sum());
        let mut runs: Vec<Range<usize>> = Vec::new();
        for &length in lengths {
            let start = starts.len();
            starts.resize(start + length, start);
            match runs.last_mut() {
                Some(run) if run.len() + length <= RUN_ROWS => run.end += length,
                _ => runs.push(start..start + length),
            }
        }
        Self { starts, runs }
    }

    /// One segment of so many tokens, of which those from `first` on look and all are seen.
    pub fn continuing(tokens: usize, first: usize) -> Self {
        Self {
            starts: vec![0; tokens],
            runs: std::iter::once(first..tokens).collect(),
        }
    }

    /// The tokens that look: all but in a segment that is [continued](Self::continuing).
    pub(super) fn looking(&self) -> Range<usize> {
        self.runs.first().map_or(0, |run| run.start)..self.tokens()
    }

    /// The same segments, in which a token sees no more than `window` tokens, itself among them.
    pub fn windowed(&self, window: usize) -> Self {
        let starts = self.starts.iter().enumerate();
        let starts = starts.map(|(token, start)| *start.max(&(token + 1).saturating_sub(window)));
        Self {
            starts: starts.collect(),
            runs: self.runs.clone(),
        }
    }

    pub(super) fn runs(&self) -> &[Range<usize>] {
        &self.runs
    }

    pub fn tokens(&self) -> usize {
        self.starts.len()
    }

    /// The query tiles of a run.
    pub(super) fn tiles(&self, run: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let end = run.end;
        run.clone()
            .step_by(QUERY_TILE)
            .map(move |start| start..(start + QUERY_TILE).min(end))
    }

    /// The keys that any row of the tile sees.
    pub(super) fn keys(&self, rows: &Range<usize>) -> Range<usize> {
        self.starts[rows.start]..rows.end
    }

    /// The columns of a tile's scores that its row sees.
    pub(super) fn visible(&self, row: usize, keys: &Range<usize>) -> Range<usize> {
        self.starts[row].max(keys.start) - keys.start..row + 1 - keys.start
    }

    /// The rows of the tile that see a key, counted from its first row: [`visible`](Self::visible) from the other side.
    pub(super) fn viewers(&self, key: usize, rows: &Range<usize>) -> Range<usize> {
        let first = key.max(rows.start) - rows.start;
        let starts = &self.starts[rows.start + first..rows.end];
        first..first + starts.partition_point(|start| *start <= key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_hold_whole_segments() {
        let segments = Segments::new(&[200, 56, 1, 300, 10]);
        assert_eq!(segments.runs, [0..256, 256..257, 257..557, 557..567]);
        assert_eq!(segments.keys(&(204..220)), 200..220);
        assert_eq!(segments.visible(205, &(200..220)), 0..6);
    }

    #[test]
    fn through_a_window_a_token_sees_the_last_few_of_its_segment() {
        let segments = Segments::new(&[5, 3]);
        let windowed = segments.windowed(2);
        let seen = |row| windowed.visible(row, &(0..8));
        assert_eq!([seen(0), seen(1), seen(4)], [0..1, 0..2, 3..5]);
        assert_eq!([seen(5), seen(7)], [5..6, 6..8]);
        assert_eq!(windowed.viewers(3, &(0..8)), 3..5);
        assert_eq!(windowed.keys(&(4..8)), 3..8);
        let views = SegmentViews::new(segments.into(), &[2, 5], 5);
        assert_eq!(views.through(Some(2)).starts, windowed.starts);
        assert_eq!(views.through(Some(5)).starts, views.through(None).starts);
    }

    #[test]
    fn a_key_is_seen_by_the_rows_that_see_it() {
        let segments = Segments::new(&[70, 1, 1, 130, 64, 3]);
        let run = 0..segments.tokens();
        for rows in segments.tiles(&run) {
            let keys = segments.keys(&rows);
            for key in keys.clone() {
                let sees =
                    |row: &usize| segments.visible(*row, &keys).contains(&(key - keys.start));
                let expected: Vec<usize> = rows.clone().filter(sees).collect();
                let found = segments.viewers(key, &rows);
                let found: Vec<usize> = found.map(|row| rows.start + row).collect();
                assert_eq!(found, expected, "key {key} in {rows:?}");
            }
        }
    }
}
