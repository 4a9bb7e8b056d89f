//! An object store of our own for tests: one bucket in memory, served on a free port of this machine, with faults on demand.
//!
//! In: objects, and the faults that the next requests meet. Out: answers as S3 gives them (ListObjectsV2, HEAD, GET with Range and
//! If-Match, errors in XML); every request, for the test to look at. A signature is checked as S3 checks it, so that what was
//! signed is what was sent.

mod answer;
mod signature;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub const BUCKET: &str = "data";
pub const REGION: &str = "eu-west-1";
pub const KEY_ID: &str = "AKIATESTKEY";
pub const SECRET: &str = "wJalrSecretOfThisTest";

/// Keys on a page of a list.
const PAGE: usize = 2;

/// What a request meets instead of, or before, a plain answer.
#[derive(Clone, Debug)]
pub enum Fault {
    /// A status with a code.
    Status(u16, &'static str),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// Before the answer, the object gets another content.
    Replace(&'static str, Vec<u8>),
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
}

/// An answer before it is sent.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

#[derive(Default)]
pub struct State {
    objects: BTreeMap<String, Vec<u8>>,
    faults: Vec<(String, Fault)>,
    requests: Vec<Request>,
    /// Who has no signature may read.
    is_public: bool,
}

/// A store that serves until the test ends.
pub struct StandIn {
    state: Arc<Mutex<State>>,
    host: String,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        let found = headers.find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// `GET /data/a.jsonl`, and behind it the range that is asked for.
    pub fn line(&self) -> String {
        let range = self.header("range").map(|range| format!(" {range}"));
        let range = range.unwrap_or_default();
        format!("{} {}{range}", self.method, self.target)
    }
}

impl StandIn {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let state: Arc<Mutex<State>> = Arc::default();
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                // A client that hangs up ends the thread.
                std::thread::spawn(move || converse(&stream, &state));
            }
        });
        Self { state, host }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.host)
    }

    pub fn put(&self, key: &str, content: impl Into<Vec<u8>>) {
        lock(&self.state)
            .objects
            .insert(key.to_owned(), content.into());
    }

    pub fn make_public(&self) {
        lock(&self.state).is_public = true;
    }

    /// The next request whose line has these words meets the fault.
    pub fn fault(&self, words: &str, fault: Fault) {
        lock(&self.state).faults.push((words.to_owned(), fault));
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut lock(&self.state).requests)
    }

    /// Those of them that asked for an object.
    pub fn gets(&self) -> Vec<String> {
        let lines = self.requests().into_iter().map(|request| request.line());
        let start = format!("GET /{BUCKET}/");
        lines.filter(|line| line.starts_with(&start)).collect()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn converse(stream: &TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    while let Some(request) = read(&mut reader)? {
        let (answer, cut) = {
            let mut state = lock(state);
            state.requests.push(request.clone());
            let line = request.line();
            let at = state
                .faults
                .iter()
                .position(|(words, _)| line.contains(words));
            let fault = at.map(|at| state.faults.remove(at).1);
            if let Some(Fault::Replace(key, content)) = &fault {
                state.objects.insert((*key).to_owned(), content.clone());
            }
            match fault {
                Some(Fault::Status(status, code)) => (answer::error(status, code), None),
                Some(Fault::Cut(count)) => (answer::answer(&state, &request), Some(count)),
                _ => (answer::answer(&state, &request), None),
            }
        };
        let mut head = format!("HTTP/1.1 {} Answer\r\n", answer.status);
        for (name, value) in &answer.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("Content-Length: {}\r\n\r\n", answer.body.len());
        writer.write_all(head.as_bytes())?;
        if request.method != "HEAD" {
            let count = cut.unwrap_or(answer.body.len());
            writer.write_all(&answer.body[..count])?;
        }
        if cut.is_some() {
            return stream.shutdown(Shutdown::Both);
        }
    }
    Ok(())
}

fn read(reader: &mut impl BufRead) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        return Ok(None);
    };
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
    Ok(Some(Request {
        method,
        target,
        headers,
    }))
}
