//! The hub client against a hub of our own: one fact per test, nothing but this machine's loopback.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod cache;
mod faults;
mod log_lines;
mod reading;
mod refusals;
mod stand_in;
mod uploads;
mod web;

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::hub::{Environment, Hub, HubError, RepoId, RepoKind, Snapshot};
use common::progress::Progress;
use stand_in::StandIn;
use tempfile::TempDir;

/// The repository that most tests read.
const REPO: &str = "models/org/name";

/// A hub, and an empty cache for its files.
struct Fixture {
    server: StandIn,
    home: TempDir,
    /// What was waited in all: the waits themselves are not done.
    waited: Arc<Mutex<Duration>>,
}

impl Fixture {
    fn new() -> Self {
        Self {
            server: StandIn::start(),
            home: tempfile::tempdir().unwrap(),
            waited: Arc::default(),
        }
    }

    /// A hub with a small file, one in a folder and a large one.
    fn with_model() -> Self {
        let fixture = Self::new();
        fixture.server.commit(REPO, &model());
        fixture
    }

    fn environment(&self, pairs: &[(&str, &str)]) -> Environment {
        let endpoint = self.server.endpoint();
        let home = self.home.path().to_str().unwrap().to_owned();
        let all = [
            &[
                ("HF_ENDPOINT", endpoint.as_str()),
                ("HF_HOME", home.as_str()),
            ],
            pairs,
        ]
        .concat();
        let get = |name: &str| {
            // The last one counts.
            let found = all.iter().rev().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Environment::read(&get).unwrap()
    }

    fn hub(&self, pairs: &[(&str, &str)]) -> Hub {
        let waited = self.waited.clone();
        let sleep = move |time| {
            *waited.lock().unwrap() += time;
            std::thread::yield_now();
        };
        Hub::with_sleep(self.environment(pairs), sleep).unwrap()
    }

    fn snapshot(&self, pairs: &[(&str, &str)]) -> Result<Snapshot, HubError> {
        let progress = Progress::default();
        self.hub(pairs)
            .snapshot(&model_id("org/name"), "main", &|_| true, &progress)
    }

    fn folder(&self) -> PathBuf {
        self.home.path().join("hub/models--org--name")
    }

    /// Methods and targets of the requests since the last call.
    fn lines(&self) -> Vec<String> {
        let requests = self.server.requests();
        requests.iter().map(|request| request.line()).collect()
    }

    fn waited_seconds(&self) -> f64 {
        self.waited.lock().unwrap().as_secs_f64()
    }
}

fn model() -> [(&'static str, &'static [u8]); 3] {
    [
        ("config.json", b"{\"model_type\": \"llama\"}"),
        ("model.safetensors", WEIGHTS),
        ("onnx/a b.json", b"{}"),
    ]
}

/// Content of the large file.
static WEIGHTS: &[u8] = &{
    let mut bytes = [0; 5000];
    let mut index = 0;
    while index < bytes.len() {
        bytes[index] = (index * index % 251) as u8;
        index += 1;
    }
    bytes
};

fn model_id(id: &str) -> RepoId {
    RepoId::parse(RepoKind::Model, id).unwrap()
}

/// Asserts that the result is an error of one line with all of these words.
fn assert_error<T: Debug>(result: Result<T, HubError>, words: &[&str]) {
    let message = result.unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    for word in words {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
}
