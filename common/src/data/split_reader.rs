//! The rows that a dataset's split names, in the order in which it names them, from all files of the dataset.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use super::rows::{Format, RawRow, RowReader, Unit};
use super::selection::Chooser;
use crate::job::{DatasetSpec, RowRange, STANDARD_INPUT, Selection};

/// A row and where it is from.
pub struct FileRow {
    pub place: Place,
    pub row: RawRow,
}

/// Where a row is: in which of the dataset's files, and what its number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index among [`DatasetSpec::files`], split after split.
    pub file: usize,
    pub unit: Unit,
}

/// Reads the rows of a split, slice by slice.
pub struct SplitReader {
    splits: Vec<Files>,
    /// Slices that are still to be read, the first of them in part: the split that each is of, and its rows.
    slices: VecDeque<(usize, RowRange)>,
    open: Option<Open>,
    format: Option<Format>,
    /// Which of the rows are given out.
    chooser: Chooser,
    /// Rows that may still be given out.
    left: u64,
    /// Bytes of the packed files that were read before the one that is open.
    packed_before: u64,
    /// Whether the files are copies of what came through standard input.
    is_stdin: bool,
    /// What of the files is not read, a line each.
    notes: Vec<String>,
}

/// The files of one split.
struct Files {
    paths: Vec<PathBuf>,
    /// Index of the first of them among all files of the dataset.
    first: usize,
    /// Row after the last one that is asked for; None where all there are are.
    asked: Option<usize>,
    /// Number of rows, where a slice needs to know that; else 0.
    counted: usize,
    /// Most rows that were passed so far.
    most_seen: usize,
}

/// What is being read.
struct Open {
    split: usize,
    /// Index of the file among those of the split.
    file: usize,
    rows: RowReader,
    /// Number of rows of the split that were passed, those outside of the slices too.
    seen: usize,
}

impl SplitReader {
    /// Opens what the dataset says. `seed` draws the parts that it may be cut into.
    pub fn open(dataset: &DatasetSpec, seed: u64) -> Result<Self, String> {
        let split = dataset.rows().map_err(|reason| format!("split {reason}"))?;
        let format = dataset.format.as_deref().and_then(Format::of_ending);
        let mut splits: Vec<(String, Files)> = Vec::new();
        let mut first = 0;
        for (name, paths) in dataset.files() {
            let count = paths.len();
            let files = Files {
                paths,
                first,
                asked: None,
                counted: 0,
                most_seen: 0,
            };
            splits.push((name, files));
            first += count;
        }
        let mut slices = VecDeque::new();
        for slice in split.slices() {
            let index = splits.iter().position(|(name, _)| name == slice.name());
            let index = index.ok_or_else(|| {
                let names: Vec<&str> = splits.iter().map(|(name, _)| name.as_str()).collect();
                format!(
                    "split {}: there is no split of this name, but {}",
                    slice.name(),
                    names.join(", ")
                )
            })?;
            let files = &mut splits[index].1;
            if slice.needs_count() && files.counted == 0 {
                files.counted = files.count(format)?;
            }
            let range = slice.range(files.counted);
            let asked = match range {
                (from, usize::MAX) => from.saturating_add(1),
                (_, to) => to,
            };
            let is_all = range == (0, usize::MAX);
            files.asked = files.asked.max(Some(asked).filter(|_| !is_all));
            slices.push_back((index, range));
        }
        let chooser = Chooser::new(&dataset.selection, seed, || {
            let all = DatasetSpec {
                selection: Selection::default(),
                max_samples: None,
                ..dataset.clone()
            };
            Self::open(&all, seed).map(Iterator::count)
        })?;
        let mut reader = Self {
            splits: splits.into_iter().map(|(_, files)| files).collect(),
            slices,
            open: None,
            format,
            chooser,
            left: dataset.max_samples.unwrap_or(u64::MAX),
            packed_before: 0,
            is_stdin: dataset.is_stdin(),
            notes: Vec::new(),
        };
        // What cannot be read at all is told at once.
        if let Some((split, _)) = reader.slices.front() {
            reader.open = reader.opened(*split)?;
        }
        Ok(reader)
    }

    /// How many rows the split has of which more were asked for. For a split that was read to its end.
    pub fn rows_beyond(&self) -> Option<usize> {
        let beyond = |files: &&Files| files.asked.is_some_and(|asked| files.most_seen < asked);
        let is_whole = self.left > 0;
        let files = self.splits.iter().find(beyond).filter(|_| is_whole)?;
        Some(files.most_seen)
    }

    /// Rows of the files, where the split was made of shares of them or counts from the end; else 0.
    pub fn counted(&self) -> usize {
        self.splits.iter().map(|files| files.counted).sum()
    }

    /// What of the files is not read, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Number of bytes of the files that were read, where the one that is open is packed.
    pub fn packed_bytes(&self) -> Option<u64> {
        let open = self.open.as_ref()?;
        Some(self.packed_before + open.rows.packed_bytes()?)
    }

    /// Opens the first file of a split; None where it has none.
    fn opened(&mut self, split: usize) -> Result<Option<Open>, String> {
        let Some(path) = self.splits[split].paths.first().cloned() else {
            return Ok(None);
        };
        Ok(Some(Open {
            split,
            file: 0,
            rows: self.rows_of(&path)?,
            seen: 0,
        }))
    }

    fn rows_of(&mut self, path: &Path) -> Result<RowReader, String> {
        let rows = RowReader::open_as(path, self.format)?;
        for note in rows.notes() {
            let note = match self.is_stdin {
                true => format!("{STANDARD_INPUT}: {note}"),
                false => format!("{}: {note}", path.display()),
            };
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
        Ok(rows)
    }

    /// The next row of the first slice; None where that is over.
    fn next_of_slice(&mut self, (from, to): RowRange) -> Result<Option<FileRow>, FileRow> {
        while let Some(open) = &mut self.open
            && open.seen < to
        {
            let files = &mut self.splits[open.split];
            let place = Place {
                file: files.first + open.file,
                unit: open.rows.unit(),
            };
            let Some(row) = open.rows.next() else {
                let Some(next) = files.paths.get(open.file + 1).cloned() else {
                    return Ok(None);
                };
                let file = open.file + 1;
                self.packed_before += open.rows.packed_bytes().unwrap_or(0);
                let rows = self.rows_of(&next);
                let failed = |reason| FileRow {
                    place: Place {
                        file: place.file + 1,
                        ..place
                    },
                    row: RawRow::Unreadable(0, reason),
                };
                let rows = rows.map_err(failed)?;
                if let Some(open) = &mut self.open {
                    (open.file, open.rows) = (file, rows);
                }
                continue;
            };
            open.seen += 1;
            files.most_seen = files.most_seen.max(open.seen);
            if open.seen > from {
                return Ok(Some(FileRow { place, row }));
            }
        }
        Ok(None)
    }

    /// Goes on with the next slice: from where the reading is, or from the beginning of its split.
    fn next_slice(&mut self) -> Result<(), FileRow> {
        self.slices.pop_front();
        let Some((split, (from, _))) = self.slices.front().copied() else {
            return Ok(());
        };
        let goes_on = |open: &Open| open.split == split && open.seen <= from;
        if self.open.as_ref().is_some_and(goes_on) {
            return Ok(());
        }
        let file = self.splits[split].first;
        self.open = self.opened(split).map_err(|reason| FileRow {
            place: Place {
                file,
                unit: Unit::Line,
            },
            row: RawRow::Unreadable(0, reason),
        })?;
        Ok(())
    }
}

impl Iterator for SplitReader {
    type Item = FileRow;

    fn next(&mut self) -> Option<FileRow> {
        loop {
            if self.left == 0 {
                return None;
            }
            let (_, range) = *self.slices.front()?;
            let next = match self.next_of_slice(range) {
                Ok(None) => self.next_slice().map(|()| None),
                other => other,
            };
            match next {
                Ok(Some(row)) if self.chooser.takes_next() => {
                    self.left -= 1;
                    return Some(row);
                }
                Ok(Some(_)) => {}
                Ok(None) => {}
                // Without this file it is not known which rows the others have.
                Err(row) => {
                    self.slices.clear();
                    return Some(row);
                }
            }
        }
    }
}

impl Files {
    fn count(&self, format: Option<Format>) -> Result<usize, String> {
        let mut rows = 0;
        for path in &self.paths {
            rows += RowReader::open_as(path, format)?.count();
        }
        Ok(rows)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::job::{DatasetKind, FieldNames};

    fn dataset(files: Vec<(String, Vec<PathBuf>)>, split: &str) -> DatasetSpec {
        DatasetSpec {
            split: Some(split.to_owned()),
            files,
            ..DatasetSpec::new(PathBuf::new(), DatasetKind::Auto, FieldNames::default())
        }
    }

    /// A folder with two files of a split `train`, of 6 and 4 rows, and one of a split `test`, of 3.
    fn files(folder: &Path) -> Vec<(String, Vec<PathBuf>)> {
        let file = |name: &str, rows: std::ops::Range<usize>| {
            let path = folder.join(name);
            let rows: String = rows
                .map(|row| format!("{{\"text\": \"{row}\"}}\n"))
                .collect();
            std::fs::write(&path, rows).unwrap();
            path
        };
        let train = vec![file("a.jsonl", 0..6), file("b.jsonl", 6..10)];
        vec![
            ("train".to_owned(), train),
            ("test".to_owned(), vec![file("c.jsonl", 20..23)]),
        ]
    }

    fn texts(reader: &mut SplitReader) -> Vec<usize> {
        let rows = reader.map(|row| match row.row {
            RawRow::Value(_, json) => {
                let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
                json["text"].as_str().unwrap().parse().unwrap()
            }
            other => panic!("{other:?}"),
        });
        rows.collect()
    }

    #[test]
    fn slices_are_read_in_the_order_in_which_they_stand_over_all_files() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        let read = |split: &str| {
            texts(&mut SplitReader::open(&dataset(files.clone(), split), 42).unwrap())
        };
        assert_eq!(read("train"), (0..10).collect::<Vec<_>>());
        assert_eq!(read("train[:30%]"), [0, 1, 2]);
        assert_eq!(read("train[-20%:]"), [8, 9]);
        assert_eq!(read("train[:2]+train[-2:]"), [0, 1, 8, 9]);
        assert_eq!(read("train[-2:]+train[:2]"), [8, 9, 0, 1]);
        assert_eq!(read("train[5:7]+train[6:8]"), [5, 6, 6, 7]);
        assert_eq!(read("test+train[9:]+test[:1]"), [20, 21, 22, 9, 20]);
    }

    #[test]
    fn rows_know_their_file_and_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let rows = SplitReader::open(&dataset(files(folder.path()), "train[5:7]+test[2:]"), 42);
        let places = rows.unwrap().map(|row| match row.row {
            RawRow::Value(line, _) => (row.place.file, line),
            other => panic!("{other:?}"),
        });
        assert_eq!(places.collect::<Vec<_>>(), [(0, 6), (1, 1), (2, 3)]);
    }

    #[test]
    fn what_a_split_asks_for_beyond_the_rows_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        let open = |split: &str| SplitReader::open(&dataset(files.clone(), split), 42).unwrap();
        let mut beyond = open("train[8:20]");
        assert_eq!(texts(&mut beyond), [8, 9]);
        assert_eq!(beyond.rows_beyond(), Some(10));
        let mut within = open("train[-2:]+train[:2]");
        assert_eq!(texts(&mut within).len(), 4);
        assert_eq!(within.rows_beyond(), None);
        let mut nothing = open("train[:1%]");
        assert!(nothing.next().is_none() && nothing.counted() == 10);
        let Err(unknown) = SplitReader::open(&dataset(files.clone(), "validation"), 42) else {
            panic!("there is no such split")
        };
        assert!(unknown.contains("but train, test"), "{unknown}");
    }

    #[test]
    fn no_more_rows_are_read_than_the_job_takes() {
        let folder = tempfile::tempdir().unwrap();
        let few = DatasetSpec {
            max_samples: Some(7),
            ..dataset(files(folder.path()), "train[1:]")
        };
        let mut reader = SplitReader::open(&few, 42).unwrap();
        assert_eq!(texts(&mut reader), (1..8).collect::<Vec<_>>());
        assert_eq!(reader.rows_beyond(), None);
    }

    #[test]
    fn a_later_file_that_cannot_be_read_ends_the_reading_with_its_reason() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = files(folder.path());
        files[0].1[1] = folder.path().join("gone.jsonl");
        let rows: Vec<FileRow> = SplitReader::open(&dataset(files, "train+test"), 42)
            .unwrap()
            .collect();
        assert_eq!(rows.len(), 7);
        assert!(matches!(&rows[6].row, RawRow::Unreadable(0, _)));
        assert_eq!(rows[6].place.file, 1);
    }

    #[test]
    fn of_packed_files_the_bytes_are_known_that_were_read() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let rows: String = (0..40_000)
            .map(|row| {
                let text = blake3::hash(&u64::to_le_bytes(row)).to_hex();
                format!("{{\"text\": \"{text}{text}\"}}\n")
            })
            .collect();
        let path = folder.path().join("rows.jsonl.gz");
        let file = std::fs::File::create(&path).unwrap();
        let mut packed = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        packed.write_all(rows.as_bytes()).unwrap();
        packed.finish().unwrap();
        let size = std::fs::metadata(&path).unwrap().len();
        assert!(size < rows.len() as u64 / 2);
        let of = |path: PathBuf| {
            let files = vec![("train".to_owned(), vec![path])];
            SplitReader::open(&dataset(files, "train"), 42).unwrap()
        };
        let mut reader = of(path);
        assert_eq!(reader.by_ref().take(20_000).count(), 20_000);
        let half = reader.packed_bytes().unwrap() * 100 / size;
        assert!((45..80).contains(&half), "{half}%");
        assert_eq!(reader.by_ref().count(), 20_000);
        assert_eq!(reader.packed_bytes(), Some(size));
        let plain = folder.path().join("rows.jsonl");
        std::fs::write(&plain, &rows).unwrap();
        let mut reader = of(plain);
        assert_eq!(reader.by_ref().count(), 40_000);
        assert_eq!(reader.packed_bytes(), None, "those of its rows");
    }
}
