//! Files of another format where Muster expects its own. In: the first bytes of a file. Out: what it is and what to do,
//! for an error message.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Number of bytes that [`recognised`] looks at.
const HEAD_BYTES: u64 = 64;

const FORMATS: [(&[u8], &str); 6] = [
    (
        b"version https://git-lfs.github.com/spec/",
        "is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download the file again",
    ),
    (
        b"GGUF",
        "is a GGUF file, which is not read: use the Hugging Face model that it was made from (config.json, *.safetensors, tokenizer.json)",
    ),
    (
        b"PK\x03\x04",
        "is a zip archive, as PyTorch writes (.bin, .pt): save the model as safetensors",
    ),
    (b"\x1f\x8b\x08", "is compressed with gzip: unpack it first"),
    (
        b"<!DOCTYPE",
        "is a web page, not the file itself: download the file again",
    ),
    (
        b"<html",
        "is a web page, not the file itself: download the file again",
    ),
];

/// What a file that begins with these bytes is instead of JSON or safetensors, and what to do. None: nothing known.
pub fn recognised(head: &[u8]) -> Option<&'static str> {
    let begins =
        |magic: &[u8]| head.len() >= magic.len() && head[..magic.len()].eq_ignore_ascii_case(magic);
    let format = FORMATS.iter().find(|(magic, _)| begins(magic));
    format.map(|(_, what)| *what)
}

/// What a file on disk is instead of JSON or safetensors, and what to do. None also where it cannot be read.
pub fn recognised_file(path: &Path) -> Option<&'static str> {
    let mut head = Vec::new();
    let file = File::open(path).ok()?;
    file.take(HEAD_BYTES).read_to_end(&mut head).ok()?;
    recognised(&head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_other_formats_are_recognised_by_their_first_bytes() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n";
        for (head, word) in [
            (&pointer[..], "git lfs pull"),
            (b"GGUF\x03\0\0\0", "GGUF"),
            (b"PK\x03\x04\0\0", "PyTorch"),
            (b"<!doctype html>", "web page"),
        ] {
            let found = recognised(head);
            assert!(found.is_some_and(|what| what.contains(word)), "{found:?}");
        }
        for head in [&b"{\"a\": 1}"[..], b"", b"version", b"\x10\0\0\0\0\0\0\0{"] {
            assert_eq!(recognised(head), None);
        }
    }
}
