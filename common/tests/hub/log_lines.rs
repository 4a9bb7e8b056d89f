//! What the HTTP client tells the log, at the level that tells most.

use std::sync::Mutex;

use super::*;

static LINES: Mutex<Vec<(log::Level, String)>> = Mutex::new(Vec::new());

struct Keeping;

impl log::Log for Keeping {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        let line = (record.level(), record.args().to_string());
        LINES.lock().unwrap().push(line);
    }

    fn flush(&self) {}
}

#[test]
fn the_token_is_never_in_the_log() {
    log::set_logger(&Keeping).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let fixture = Fixture::with_model();
    fixture.server.require_token("hf_secret");
    fixture.snapshot(&[("HF_TOKEN", "hf_secret")]).unwrap();
    let lines = LINES.lock().unwrap();
    assert!(!lines.is_empty());
    for (level, line) in lines.iter() {
        // Traces hold the bytes that are sent, in rows that no search for the token would find.
        assert!(*level < log::Level::Trace, "{line}");
        assert!(!line.contains("hf_secret"), "{line}");
    }
}
