//! Where the bytes of a data file are: a file, or a part of an archive.
//!
//! Enters: a path. Leaves: its bytes, as often as they are asked for, or why there are none. Never writes.

use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::compression::Compression;
use super::content::{Content, PackedBytes};
use super::format::Format;
use super::{tar, zip};

/// A data file that can be read from its start again and again.
#[derive(Clone, Debug)]
pub struct Source {
    path: PathBuf,
    /// Name of the file, or of the part of the archive, without the ending that says how it is compressed.
    name: String,
    part: Part,
    /// How far the file is read, where it is packed.
    packed: PackedBytes,
}

#[derive(Clone, Debug)]
enum Part {
    Whole,
    Tar(tar::Member),
    Zip(zip::Member),
}

impl Source {
    /// The file at a path.
    pub fn file(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Self {
            path: path.to_owned(),
            name: Compression::strip(&name).to_owned(),
            part: Part::Whole,
            packed: PackedBytes::default(),
        }
    }

    pub fn tar_member(&self, member: tar::Member) -> Self {
        Self {
            path: self.path.clone(),
            name: Compression::strip(&member.name).to_owned(),
            part: Part::Tar(member),
            packed: self.packed.clone(),
        }
    }

    pub fn zip_member(&self, member: zip::Member) -> Self {
        Self {
            path: self.path.clone(),
            name: Compression::strip(&member.name).to_owned(),
            part: Part::Zip(member),
            packed: self.packed.clone(),
        }
    }

    /// Its name without the ending that says how it is compressed; of a part of an archive with its folders.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file itself, where the source is no part of one.
    #[cfg(feature = "arrow")]
    pub fn whole(&self) -> Result<Option<File>, String> {
        match self.part {
            Part::Whole => self.open().map(Some),
            Part::Tar(_) | Part::Zip(_) => Ok(None),
        }
    }

    /// What it holds, from the start.
    pub fn content(&self) -> Result<Content, String> {
        let file = self.open()?;
        match &self.part {
            Part::Whole => Ok(Content::of(file, &self.packed)),
            // What is packed in the archive once more counts as its rows do.
            Part::Tar(member) => {
                let mut archive = Content::of(file, &self.packed);
                member.find(&mut archive)?;
                Ok(Content::of(member.read(archive), &PackedBytes::default()))
            }
            Part::Zip(member) => {
                let part = member.read(file, &self.packed)?;
                Ok(Content::of(part, &PackedBytes::default()))
            }
        }
    }

    /// How far the file is read, where it is packed.
    pub fn packed(&self) -> &PackedBytes {
        &self.packed
    }

    pub fn open(&self) -> Result<File, String> {
        File::open(&self.path).map_err(|error| error.to_string())
    }
}

/// Checks that a path is a file that may hold rows, and returns its metadata; an error says why it cannot.
pub fn file_of_rows(path: &Path) -> Result<Metadata, String> {
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => no_such_file(path),
        _ => error.to_string(),
    })?;
    if metadata.is_dir() {
        return Err(is_a_folder(path));
    }
    if !metadata.is_file() {
        return Err("is not a file: name a file of rows".to_owned());
    }
    Ok(metadata)
}

/// Why there is no file of rows here, and what to do, where the system says that there is none.
fn no_such_file(path: &Path) -> String {
    let text = path.to_string_lossy();
    if text.contains("://") {
        return "no such file: data is read from this machine only; download it first".to_owned();
    }
    match hub_id(path) {
        Some(id) => {
            format!("no such file; for a dataset on the Hugging Face hub write its id, {id}")
        }
        None => "no such file".to_owned(),
    }
}

/// The end of the path that has the form of a hub id, `owner/name`, where its folder is not there either.
fn hub_id(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let folder = path.parent()?;
    let owner = folder.file_name()?.to_str()?;
    let is_part = |part: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        !part.is_empty() && part.chars().all(fits)
    };
    let looks_like_a_file = [".jsonl", ".json", ".txt", ".csv", ".parquet", ".gz"]
        .iter()
        .any(|end| name.to_lowercase().ends_with(end));
    (is_part(owner) && is_part(name) && !looks_like_a_file && !folder.exists())
        .then(|| format!("{owner}/{name}"))
}

/// What to do with a folder where a file of rows is wanted.
fn is_a_folder(path: &Path) -> String {
    const SHOWN: usize = 4;
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| Format::of_name(Compression::strip(name)).is_some())
        .take(1000)
        .collect();
    names.sort_unstable();
    let more = if names.len() > SHOWN { ", ..." } else { "" };
    names.truncate(SHOWN);
    match names.is_empty() {
        true => "is a folder without data files: name a file of rows".to_owned(),
        false => format!(
            "is a folder: name a file in it ({}{more})",
            names.join(", ")
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_looks_like_a_hub_id_is_called_one() {
        let of = |path: &str| hub_id(Path::new(path));
        assert_eq!(
            of("/nowhere/at/all/HuggingFaceH4/no_robots").as_deref(),
            Some("HuggingFaceH4/no_robots")
        );
        assert_eq!(of("/nowhere/data/train.jsonl"), None);
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(hub_id(&folder.path().join("train")), None);
    }
}
