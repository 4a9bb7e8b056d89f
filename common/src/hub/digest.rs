//! Digests by which the hub knows the content of files: sha256, or git's own of a blob.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use crate::progress::Progress;

const READ_BYTES: usize = 1 << 20;

/// What a file's content must digest to; also the name of its blob in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Digest {
    /// sha1 of git's header and the content, as 40 hex digits: files that are in git itself.
    GitSha1(String),
    /// sha256 of the content, as 64 hex digits: files in git's large file storage.
    Sha256(String),
}

impl Digest {
    /// Reads hex digits, by their number. None where they are neither.
    pub fn from_hex(text: &str) -> Option<Self> {
        let is_hex = text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match text.len() {
            40 if is_hex => Some(Self::GitSha1(text.to_owned())),
            64 if is_hex => Some(Self::Sha256(text.to_owned())),
            _ => None,
        }
    }

    pub fn hex(&self) -> &str {
        match self {
            Self::GitSha1(hex) | Self::Sha256(hex) => hex,
        }
    }

    /// `sha256`, for messages.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::GitSha1(_) => "git digest",
            Self::Sha256(_) => "sha256",
        }
    }

    /// A hasher whose result can be compared with this digest.
    pub(super) fn hasher(&self, size: u64) -> Hasher {
        match self {
            Self::GitSha1(_) => Hasher::git(size),
            Self::Sha256(_) => Hasher::Sha256(Sha256::new()),
        }
    }
}

/// A digest in the making.
pub(super) enum Hasher {
    Git(Sha1),
    Sha256(Sha256),
}

impl Hasher {
    fn git(size: u64) -> Self {
        let mut hasher = Sha1::new();
        hasher.update(format!("blob {size}\0"));
        Self::Git(hasher)
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Git(hasher) => hasher.update(bytes),
            Self::Sha256(hasher) => hasher.update(bytes),
        }
    }

    pub(super) fn finish(self) -> String {
        match self {
            Self::Git(hasher) => hex(&hasher.finalize()),
            Self::Sha256(hasher) => hex(&hasher.finalize()),
        }
    }

    /// Takes `size` bytes in; an error where there are fewer.
    pub(super) fn take(
        &mut self,
        reader: &mut impl Read,
        size: u64,
        progress: &Progress,
    ) -> io::Result<()> {
        let mut buffer = vec![0; READ_BYTES];
        let mut left = size;
        while left > 0 {
            progress.check()?;
            let wanted = usize::try_from(left).map_or(READ_BYTES, |left| left.min(READ_BYTES));
            let count = reader.read(&mut buffer[..wanted])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.update(&buffer[..count]);
            left -= count as u64;
        }
        Ok(())
    }
}

/// sha256 of bytes, as hex digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// git's digest of a blob of these bytes, as hex digits.
pub fn git_hex(bytes: &[u8]) -> String {
    let mut hasher = Hasher::git(bytes.len() as u64);
    hasher.update(bytes);
    hasher.finish()
}

/// Size and sha256 of a file.
pub(super) fn file_sha256(path: &Path, progress: &Progress) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut hasher = Hasher::Sha256(Sha256::new());
    hasher.take(&mut file, size, progress)?;
    Ok((size, hasher.finish()))
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits
        .map(|digit| char::from(DIGITS[usize::from(digit)]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_git_and_of_sha256sum() {
        assert_eq!(
            git_hex(b"hello\n"),
            "ce013625030ba8dba906f756967f9e9ca394464a"
        );
        assert_eq!(
            sha256_hex(b"hello\n"),
            "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
        );
    }

    #[test]
    fn only_hex_digits_of_the_right_number_name_a_blob() {
        for text in ["", "../../a", "ABCDEF0123ABCDEF0123ABCDEF0123ABCDEF0123"] {
            assert_eq!(Digest::from_hex(text), None);
        }
    }
}
