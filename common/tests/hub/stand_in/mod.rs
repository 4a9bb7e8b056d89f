//! A hub of our own for tests: repositories in memory, served on a free port of this machine, with faults on demand.
//!
//! In: repositories, and the faults that the next requests meet. Out: answers as the hub gives them; every request, for the
//! test to look at. Large files come from a second port, as from another host. It needs only `common` and `serde_json`, so
//! that other crates' tests can include this folder.

mod answer;
mod http;
mod write;

use std::collections::{BTreeMap, HashMap};
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use common::hub::{git_hex, sha256_hex};

pub use http::Request;

/// Files by their paths.
pub type Files = BTreeMap<String, Vec<u8>>;

/// What a request meets instead of, or besides, a plain answer.
#[derive(Clone, Debug)]
pub enum Fault {
    /// A status with headers, and nothing is done.
    Status(u16, Vec<(&'static str, String)>),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// Only so many bytes, and a length to match.
    Short(usize),
    /// A body of the right length with other bytes.
    OtherBytes,
    /// A body with bytes too many.
    TooLong,
    /// Another etag.
    Etag(String),
    /// A redirect.
    Redirect(String),
    /// No answer until the client hangs up.
    Stall,
    /// The whole file, although a part was asked for.
    IgnoreRange,
    /// The answer is given, and then `main` of the repository gets a commit.
    Commit(&'static str, Files),
    /// The body is this one.
    Body(String),
}

/// A hub that runs until it is dropped.
pub struct StandIn {
    pub state: Arc<State>,
}

/// What the threads of the stand-in share.
pub struct State {
    inner: Mutex<Inner>,
    /// Address of the hub itself, and of the host of large files.
    ports: [u16; 2],
    is_stopped: AtomicBool,
}

#[derive(Default)]
pub struct Inner {
    repos: HashMap<String, Repo>,
    objects: HashMap<String, Vec<u8>>,
    parts: BTreeMap<(String, usize), Vec<u8>>,
    faults: Vec<(String, Fault, bool)>,
    requests: Vec<Request>,
    token: Option<String>,
    page_files: usize,
    /// Uploads of more bytes come in parts of so many.
    part_bytes: Option<usize>,
    are_all_regular: bool,
}

/// A repository; its key is `models/owner/name`.
#[derive(Default)]
struct Repo {
    commits: BTreeMap<String, Files>,
    refs: BTreeMap<String, String>,
    is_private: bool,
    is_gated: bool,
}

impl StandIn {
    pub fn start() -> Self {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
        let ports = [0, 1].map(|index: usize| {
            let address = listeners[index].local_addr();
            address.expect("a bound port has an address").port()
        });
        let inner = Inner {
            page_files: 1000,
            ..Inner::default()
        };
        let state = Arc::new(State {
            inner: Mutex::new(inner),
            ports,
            is_stopped: AtomicBool::new(false),
        });
        for listener in listeners {
            let state = state.clone();
            std::thread::spawn(move || http::serve(&listener, &state));
        }
        Self { state }
    }

    /// For HF_ENDPOINT.
    pub fn endpoint(&self) -> String {
        self.state.hub()
    }

    /// Host and port of large files, and of redirects to another host.
    pub fn other_host(&self) -> String {
        self.state.storage()
    }

    /// Adds a commit to `main` of `models/owner/name` or `datasets/owner/name`, with these files and no others.
    pub fn commit(&self, repo: &str, files: &[(&str, &[u8])]) -> String {
        let files = files
            .iter()
            .map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec()));
        self.state.lock().commit(repo, "main", files.collect())
    }

    /// Adds a commit to another branch.
    #[allow(dead_code)]
    pub fn commit_to(&self, repo: &str, branch: &str, files: &[(&str, &[u8])]) -> String {
        let files = files
            .iter()
            .map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec()));
        self.state.lock().commit(repo, branch, files.collect())
    }

    /// The next request whose method and target contain the text meets the fault; several wait in line.
    pub fn play(&self, text: &str, fault: Fault) {
        self.state
            .lock()
            .faults
            .push((text.to_owned(), fault, false));
    }

    /// Every request whose method and target contain the text meets the fault.
    pub fn play_always(&self, text: &str, fault: Fault) {
        self.state
            .lock()
            .faults
            .push((text.to_owned(), fault, true));
    }

    pub fn stop_playing(&self) {
        self.state.lock().faults.clear();
    }

    /// The token that opens what is not public, and with which may be written.
    pub fn require_token(&self, token: &str) {
        self.state.lock().token = Some(token.to_owned());
    }

    pub fn make_private(&self, repo: &str) {
        self.state.lock().repo_mut(repo).is_private = true;
    }

    pub fn make_gated(&self, repo: &str) {
        self.state.lock().repo_mut(repo).is_gated = true;
    }

    pub fn page_files(&self, count: usize) {
        self.state.lock().page_files = count;
    }

    pub fn part_bytes(&self, bytes: usize) {
        self.state.lock().part_bytes = Some(bytes);
    }

    pub fn want_all_regular(&self) {
        self.state.lock().are_all_regular = true;
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().requests)
    }

    /// The files at a branch; None where there is no such repository.
    pub fn files(&self, repo: &str, branch: &str) -> Option<Files> {
        let inner = self.state.lock();
        let repo = inner.repos.get(repo)?;
        Some(repo.commits[repo.refs.get(branch)?].clone())
    }

    pub fn commit_count(&self, repo: &str) -> usize {
        self.state
            .lock()
            .repos
            .get(repo)
            .map_or(0, |repo| repo.commits.len())
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.state.is_stopped.store(true, Ordering::SeqCst);
        for port in self.state.ports {
            // Wakes the thread that waits for connections.
            let _ = std::net::TcpStream::connect_timeout(
                &([127, 0, 0, 1], port).into(),
                Duration::from_secs(1),
            );
        }
    }
}

impl State {
    pub fn hub(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0])
    }

    pub fn storage(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[1])
    }

    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|error| error.into_inner())
    }
}

impl Inner {
    fn commit(&mut self, repo: &str, branch: &str, files: Files) -> String {
        for (path, bytes) in &files {
            if is_large(path) {
                self.objects.insert(sha256_hex(bytes), bytes.clone());
            }
        }
        let repo = self.repos.entry(repo.to_owned()).or_default();
        let commit = git_hex(format!("{branch} {} {files:?}", repo.commits.len()).as_bytes());
        repo.commits.insert(commit.clone(), files);
        repo.refs.insert(branch.to_owned(), commit.clone());
        commit
    }

    fn repo_mut(&mut self, repo: &str) -> &mut Repo {
        self.repos.get_mut(repo).expect("a repository of the test")
    }

    /// The first fault that waits for the request.
    fn take_fault(&mut self, line: &str) -> Option<Fault> {
        let found = self
            .faults
            .iter()
            .position(|(text, _, _)| line.contains(text.as_str()))?;
        match self.faults[found].2 {
            true => Some(self.faults[found].1.clone()),
            false => Some(self.faults.remove(found).1),
        }
    }
}

/// Whether the hub keeps a file of this name in the storage of large files.
fn is_large(path: &str) -> bool {
    [".safetensors", ".bin", ".parquet"]
        .iter()
        .any(|end| path.ends_with(end))
}
