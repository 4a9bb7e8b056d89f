//! Where the files of a state go, one after the other: into a folder, or over the wire. In: names, sizes known before, and
//! what writes the bytes. Out: files that appear whole, or what each of them is.

use std::io::{self, Write};
use std::path::Path;

use super::atomic::AtomicFile;
use super::{FileEntry, FileError};

/// Writes the bytes of one file.
pub type Fill<'a> = &'a mut dyn FnMut(&mut dyn Write) -> io::Result<()>;

/// Where files go: a folder, a connection, or a list of what they are.
pub trait Sink {
    /// Takes a file, of which `fill` writes `size` bytes.
    fn file(&mut self, name: &str, size: u64, fill: Fill) -> Result<(), FileError>;

    fn small_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), FileError> {
        self.file(name, bytes.len() as u64, &mut |out| out.write_all(bytes))
    }
}

/// A sink into an existing folder, in which each file appears whole.
impl Sink for &Path {
    fn file(&mut self, name: &str, _size: u64, fill: Fill) -> Result<(), FileError> {
        let path = self.join(name);
        let mut file = AtomicFile::create(&path)?;
        fill(&mut file).map_err(FileError::io("write", &path))?;
        file.commit()
    }
}

impl<S: Sink + ?Sized> Sink for &mut S {
    fn file(&mut self, name: &str, size: u64, fill: Fill) -> Result<(), FileError> {
        (**self).file(name, size, fill)
    }
}

/// A sink that keeps only name, size and digest of each file, in the order in which they came.
#[derive(Debug, Default)]
pub struct Entries(pub Vec<FileEntry>);

impl Sink for Entries {
    fn file(&mut self, name: &str, size: u64, fill: Fill) -> Result<(), FileError> {
        let mut hasher = blake3::Hasher::new();
        fill(&mut hasher).map_err(FileError::io("digest", Path::new(name)))?;
        self.0.push(FileEntry {
            path: name.to_owned(),
            size,
            digest: hasher.finalize().to_hex().to_string(),
        });
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::files::WeightsFormat;
    use crate::files::snapshot::tests::{adapter, snapshot};
    use crate::files::tensors::Dtype;

    #[test]
    fn files_are_described_as_they_are_written() {
        let config = serde_json::json!({"architectures": ["LlamaForCausalLM"]});
        let model = |dtype| WeightsFormat::Model {
            config: config.clone(),
            dtype,
            frozen: None,
        };
        for format in [adapter(), model(Dtype::F32), model(Dtype::BF16)] {
            let folder = tempfile::tempdir().unwrap();
            snapshot().write_files(folder.path(), &format).unwrap();
            let mut described = Entries::default();
            snapshot().write_files(&mut described, &format).unwrap();
            let count = std::fs::read_dir(folder.path()).unwrap().count();
            assert_eq!(described.0.len(), count);
            for entry in described.0 {
                assert_eq!(FileEntry::of(folder.path(), &entry.path).unwrap(), entry);
            }
        }
    }
}
