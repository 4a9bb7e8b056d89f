//! What a worker prints because the user asked for it, where that cannot be written.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::process::{Command, Stdio};

#[test]
fn what_was_asked_for_and_cannot_be_printed_is_an_error() {
    for words in [
        &["man"][..],
        &["man", "join"],
        &["completions", "zsh"],
        &["--help"],
        &["--version"],
    ] {
        let print = |stdout: Stdio| {
            Command::new(env!("CARGO_BIN_EXE_worker"))
                .args(words)
                .stdout(stdout)
                .output()
                .unwrap()
        };
        let full = File::options().write(true).open("/dev/full").unwrap();
        let full = print(full.into());
        let said = String::from_utf8(full.stderr).unwrap();
        assert_eq!(full.status.code(), Some(1), "{words:?}: {said}");
        let expected = "error: standard output cannot be written: No space left on device";
        assert!(said.starts_with(expected), "{words:?}: {said}");
        // As where `head` has seen enough.
        let (_, closed) = std::io::pipe().unwrap();
        let closed = print(closed.into());
        assert!(closed.status.success(), "{words:?}");
        assert!(closed.stderr.is_empty(), "{words:?}");
    }
}
