//! Which rows of a dataset a split names: all of one split, or slices of it as the library `datasets` writes them (`train[100:200]`,
//! `train[:20%]`, `train[-100:]`), several of them joined by `+`.

use super::quote::shorten;

/// Slices of the rows of splits, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split(Vec<Slice>);

/// Rows from `from` to before `to` of one split; those below 0 count from the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    name: String,
    from: Option<i64>,
    to: Option<i64>,
    unit: Unit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Rows,
    Percent,
}

/// The split that is meant where none is named.
pub const TRAIN: &str = "train";

/// Every split of a dataset, as the library `datasets` calls them together.
const ALL: &str = "all";

/// The first row, from 0, and the one after the last.
pub type RowRange = (usize, usize);

impl Default for Split {
    /// Every row.
    fn default() -> Self {
        Self(vec![Slice::whole(TRAIN)])
    }
}

impl Split {
    /// Reads a split; the error goes after the field's name.
    pub fn parse(text: &str) -> Result<Self, String> {
        let slices = text.split('+').map(|slice| Slice::parse(slice, text));
        let slices = slices.collect::<Result<Vec<Slice>, String>>()?;
        // One without rows asks for nothing beside others.
        match slices.iter().all(Slice::is_empty) {
            true => Err(no_rows(text)),
            false => Ok(Self(slices)),
        }
    }

    /// The same, of a dataset with these splits: `all` is each of them.
    pub fn among(self, names: &[&str]) -> Self {
        match self.is_all() && !names.is_empty() {
            true => Self(names.iter().map(|name| Slice::whole(name)).collect()),
            false => self,
        }
    }

    /// Whether every split is meant, whatever there is.
    pub fn is_all(&self) -> bool {
        self.0 == [Slice::whole(ALL)]
    }

    /// Whether rows of the split of this name are meant.
    pub fn reads(&self, name: &str) -> bool {
        self.is_all() || self.0.iter().any(|slice| slice.name() == name)
    }

    pub fn slices(&self) -> &[Slice] {
        &self.0
    }
}

impl Slice {
    fn whole(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            from: None,
            to: None,
            unit: Unit::Rows,
        }
    }

    /// Name of the split that it is of.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the split's rows must be counted before it is known which are meant.
    pub fn needs_count(&self) -> bool {
        let from_end = |bound: Option<i64>| bound.is_some_and(|bound| bound < 0);
        self.unit == Unit::Percent || from_end(self.from) || from_end(self.to)
    }

    /// `split` is the whole, for people.
    fn parse(text: &str, split: &str) -> Result<Self, String> {
        let (name, bounds) = match text.split_once('[') {
            Some((name, bounds)) => (name.trim(), Some(bounds)),
            None => (text.trim(), None),
        };
        let is_name = |c: char| c.is_alphanumeric() || "_.-".contains(c);
        if name.is_empty() || !name.chars().all(is_name) {
            return Err(format!(
                "is `{}`, which names no split: write train, or the name of another one",
                shorten(split)
            ));
        }
        let Some(bounds) = bounds else {
            return Ok(Self::whole(name));
        };
        bounds
            .trim_end()
            .strip_suffix(']')
            .and_then(|bounds| bounds.split_once(':'))
            .and_then(|(from, to)| Self::of_bounds(name, from.trim(), to.trim()))
            .ok_or_else(|| no_rows(split))
    }

    /// Whether it names no rows, whatever the file holds.
    fn is_empty(&self) -> bool {
        let (from, to) = (self.from.unwrap_or(0), self.to.unwrap_or(i64::MAX));
        (from < 0) == (to < 0) && from >= to || self.to == Some(0)
    }

    /// None where these are no bounds.
    fn of_bounds(name: &str, from: &str, to: &str) -> Option<Self> {
        let unit = match from.ends_with('%') || to.ends_with('%') {
            true => Unit::Percent,
            false => Unit::Rows,
        };
        let bound = |text: &str| -> Option<Option<i64>> {
            let number = text.strip_suffix('%').unwrap_or(text);
            if number.is_empty() {
                return text.is_empty().then_some(None);
            }
            let number: i64 = number.replace('_', "").parse().ok()?;
            let is_share = (-100..=100).contains(&number);
            (unit == Unit::Rows || is_share).then_some(Some(number))
        };
        Some(Self {
            name: name.to_owned(),
            from: bound(from)?,
            to: bound(to)?,
            unit,
        })
    }

    /// The rows that are meant, of a split of `rows` where [`needs_count`](Self::needs_count) asks for that. They may be none, or end
    /// beyond the split.
    pub fn range(&self, rows: usize) -> RowRange {
        let absolute = |bound: i64| -> usize {
            let row = match self.unit {
                Unit::Rows => bound,
                // Rounded to the nearest row, of two equally near ones to the even, as `datasets` does.
                Unit::Percent => (bound as f64 * rows as f64 / 100.0).round_ties_even() as i64,
            };
            // A share that rounds to no row counts from neither end, as there.
            let row = match row {
                ..0 => row.saturating_add_unsigned(rows as u64).max(0),
                row => row,
            };
            usize::try_from(row).unwrap_or(usize::MAX)
        };
        let from = self.from.map_or(0, absolute);
        let to = self.to.map_or(usize::MAX, absolute);
        (from, to.max(from))
    }
}

fn no_rows(split: &str) -> String {
    format!(
        "is `{}`, which names no rows: write train, train[100:200] with the numbers of rows, from 0, or train[:20%]",
        shorten(split)
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ranges(split: &str, rows: usize) -> Vec<RowRange> {
        let split = Split::parse(split).unwrap();
        split
            .slices()
            .iter()
            .map(|slice| slice.range(rows))
            .collect()
    }

    #[test]
    fn shares_and_rows_from_the_end_are_those_of_the_library_datasets() {
        // datasets 5.2: `load_dataset("json", data_files=..., split=...)` on a file of so many rows.
        for (split, rows, expected) in [
            ("train[:20%]", 10, vec![(0, 2)]),
            ("train[:50%]", 5, vec![(0, 2)]),
            ("train[50%:]", 5, vec![(2, usize::MAX)]),
            ("train[:30%]", 5, vec![(0, 2)]),
            ("train[-10%:]", 30, vec![(27, usize::MAX)]),
            ("train[10%:-10%]", 30, vec![(3, 27)]),
            ("train[-3:]", 10, vec![(7, usize::MAX)]),
            ("train[-30:]", 10, vec![(0, usize::MAX)]),
            ("train[2:-2]", 10, vec![(2, 8)]),
            ("train[:1_000]", 10, vec![(0, 1000)]),
            ("train[10:20%]", 10, vec![(1, 2)]),
            ("train[:100%]", 7, vec![(0, 7)]),
            ("train[:-4%]", 10, vec![(0, 0)]),
            ("train[-4%:]", 10, vec![(0, usize::MAX)]),
            ("train[:2]+train[-2:]", 10, vec![(0, 2), (8, usize::MAX)]),
            ("train", 10, vec![(0, usize::MAX)]),
        ] {
            assert_eq!(ranges(split, rows), expected, "{split} of {rows}");
        }
    }

    #[test]
    fn slices_without_rows_ask_for_nothing_beside_others() {
        // datasets 5.2: `train[:0]+test` is `test`, and `train[:0]` alone an error.
        assert_eq!(
            ranges("train[:0]+test+train[5:5]", 10),
            [(0, 0), (0, usize::MAX), (5, 5)]
        );
        assert!(Split::parse("train[:0]+test[2:1]").is_err());
    }

    #[test]
    fn all_is_every_split_and_nothing_but_the_word() {
        // datasets 5.2 knows no slice of `all`, and no sum with it.
        let all = Split::parse("all").unwrap();
        assert!(all.is_all() && all.reads("test"));
        let known = all.among(&["test", "train"]);
        let names: Vec<&str> = known.slices().iter().map(Slice::name).collect();
        assert_eq!(names, ["test", "train"]);
        for other in ["all[:2]", "all+test", "train"] {
            let other = Split::parse(other).unwrap();
            assert!(!other.is_all() && !other.reads("validation"));
            assert_eq!(other.clone().among(&["test"]), other);
        }
    }

    #[test]
    fn the_rows_are_counted_only_where_it_takes_that() {
        for (split, needs) in [
            ("train", false),
            ("train[5:]", false),
            ("train[:5]+train[7:9]", false),
            ("train[:5%]", true),
            ("train[-5:]", true),
            ("train[:-5]", true),
        ] {
            let parsed = Split::parse(split).unwrap();
            let found = parsed.slices().iter().any(Slice::needs_count);
            assert_eq!(found, needs, "{split}");
        }
    }

    #[test]
    fn what_names_no_rows_is_refused() {
        for split in [
            "train[5:5]",
            "train[:0]",
            "train[-3:-3]",
            "train[60%:40%]",
            "train[:120%]",
            "train[a:b]",
            "train[5]",
            "train[:%]",
            "train[",
            "train[1:2",
            "train[1:2]x",
        ] {
            let error = Split::parse(split).unwrap_err();
            assert!(error.contains("names no rows"), "{split}: {error}");
        }
        for split in ["", "train+", "a b", "train[:2]+[3:4]"] {
            let error = Split::parse(split).unwrap_err();
            assert!(error.contains("names no split"), "{split}: {error}");
        }
    }
}
