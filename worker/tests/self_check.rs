//! The self-check comes to its end whatever becomes of the processes that compute its rows.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::process::Command;

/// Five rows of each of ten shapes, and one more where the base is in 4 bits.
const ROWS: usize = 62;

/// What it prints on processors where each process misbehaves so.
fn rows(failpoint: &str, options: &[&str]) -> Vec<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_worker"))
        .args(["self-check", "--device", "cpu"])
        .args(options)
        .env("MUSTER_FAILPOINT", failpoint)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stdout = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<_> = stdout.lines().map(str::to_owned).collect();
    rows.into_iter()
        .filter(|line| line.starts_with("pass") || line.starts_with("FAIL"))
        .collect()
}

#[test]
fn a_row_that_kills_its_process_is_a_failure_and_the_next_one_begins() {
    // A gradient takes six forward passes in all, two steps of two slots four; the other rows take more than six.
    let rows = rows("forward:7", &[]);
    assert_eq!(rows.len(), ROWS, "{rows:#?}");
    for row in &rows {
        let is_short = row.contains("gradient and loss") || row.contains("three processes");
        let ended = "the process ended before it answered: signal: 9";
        let expected = if is_short { "pass" } else { "FAIL" };
        assert!(row.starts_with(expected), "{row}");
        assert_eq!(row.contains(ended), !is_short, "{row}");
    }
}

#[test]
fn a_row_that_hangs_is_a_failure_at_its_deadline_and_the_table_has_an_end() {
    let rows = rows("forward=stop", &["--row-timeout", "1", "--timeout", "2"]);
    assert_eq!(rows.len(), ROWS, "{rows:#?}");
    assert!(rows[0].contains("did not answer within 1 s"), "{rows:#?}");
    assert!(
        rows[ROWS - 1].contains("not begun: the time is up"),
        "{rows:#?}"
    );
}
