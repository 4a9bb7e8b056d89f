//! Where the files of a folder came from, for people.

use std::fmt;

use common::text::count;

/// Number and bytes of a folder's files by where they came from.
#[derive(Debug, Default)]
pub struct Tally {
    /// They were in the folder.
    pub here: (usize, u64),
    /// From the hub's cache.
    pub snapshots: (usize, u64),
    pub coordinator: (usize, u64),
    /// From other workers, to their last byte.
    pub workers: (usize, u64),
}

/// `3 files (12 MiB) fetched from the coordinator`.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            (self.coordinator, "fetched from the coordinator"),
            (self.workers, "from other workers"),
            (self.snapshots, "copied from the hub's cache"),
            (self.here, "here before"),
        ];
        let told = parts.iter().filter(|((files, _), _)| *files > 0);
        let told = told.map(|((files, bytes), how)| {
            let files = count(*files as u64, "file");
            format!("{files} ({} MiB) {how}", bytes.div_ceil(1 << 20))
        });
        f.write_str(&told.collect::<Vec<_>>().join(", "))
    }
}
