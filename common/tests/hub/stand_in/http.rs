//! The wire of the stand-in: requests in, answers out, faults in between.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Fault, State, answer};

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// It came to the second port.
    pub is_other_host: bool,
}

/// An answer before it is sent.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self
            .headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    pub fn line(&self) -> String {
        format!("{} {}", self.method, self.target)
    }
}

impl Answer {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
        }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers
            .retain(|(key, _)| !key.eq_ignore_ascii_case(name));
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

pub fn serve(listener: &TcpListener, state: &Arc<State>) {
    let port = listener.local_addr().map_or(0, |address| address.port());
    for stream in listener.incoming() {
        if state.is_stopped.load(Ordering::SeqCst) {
            break;
        }
        let Ok(stream) = stream else { continue };
        let state = state.clone();
        let is_other_host = port == state.ports[1];
        std::thread::spawn(move || {
            // A client that hangs up ends the thread.
            let _ = converse(&stream, &state, is_other_host);
        });
    }
}

fn converse(stream: &TcpStream, state: &State, is_other_host: bool) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    while let Some(request) = read(&mut reader, is_other_host)? {
        if request.method == "CONNECT" {
            state.lock().requests.push(request);
            writer.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
            continue;
        }
        let fault = {
            let mut inner = state.lock();
            inner.requests.push(request.clone());
            inner.take_fault(&request.line())
        };
        let is_head = request.method == "HEAD";
        match fault {
            Some(Fault::Stall) => {
                reader.read_to_end(&mut Vec::new())?;
                return Ok(());
            }
            Some(Fault::Cut(count)) => {
                let answer = answer::answer(state, &request);
                let mut bytes = head(&answer).into_bytes();
                bytes.extend(answer.body.iter().take(count));
                writer.write_all(&bytes)?;
                return stream.shutdown(std::net::Shutdown::Both);
            }
            fault => {
                let answer = with_fault(state, request, fault);
                let mut bytes = head(&answer).into_bytes();
                if !is_head {
                    bytes.extend(&answer.body);
                }
                writer.write_all(&bytes)?;
            }
        }
    }
    Ok(())
}

fn with_fault(state: &State, mut request: Request, fault: Option<Fault>) -> Answer {
    let answer = match &fault {
        Some(Fault::Status(status, headers)) => {
            let plain = Answer::new(*status, "{}");
            return headers
                .iter()
                .fold(plain, |answer, (name, value)| answer.header(name, value));
        }
        Some(Fault::Redirect(to)) => return Answer::new(302, "").header("Location", to),
        Some(Fault::Body(body)) => return Answer::new(200, body.as_bytes()),
        Some(Fault::IgnoreRange) => {
            request
                .headers
                .retain(|(name, _)| !name.eq_ignore_ascii_case("range"));
            answer::answer(state, &request)
        }
        _ => answer::answer(state, &request),
    };
    match fault {
        Some(Fault::Short(count)) => Answer {
            body: answer.body[..count.min(answer.body.len())].to_vec(),
            ..answer
        },
        Some(Fault::OtherBytes) => Answer {
            body: answer.body.iter().map(|byte| byte ^ 1).collect(),
            ..answer
        },
        Some(Fault::TooLong) => Answer {
            body: [answer.body, b"more".to_vec()].concat(),
            ..answer
        },
        Some(Fault::Etag(etag)) => {
            let quoted = format!("\"{etag}\"");
            answer
                .header("ETag", &quoted)
                .header("X-Linked-Etag", quoted)
        }
        Some(Fault::Commit(repo, files)) => {
            state.lock().commit(repo, "main", files);
            answer
        }
        _ => answer,
    }
}

fn head(answer: &Answer) -> String {
    let mut head = format!("HTTP/1.1 {} Answer\r\n", answer.status);
    let has_length = answer
        .headers
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !has_length && answer.status != 304 {
        head += &format!("Content-Length: {}\r\n", answer.body.len());
    }
    head + "\r\n"
}

fn read(reader: &mut impl BufRead, is_other_host: bool) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        return Ok(None);
    };
    let mut request = Request {
        method,
        target,
        headers: Vec::new(),
        body: Vec::new(),
        is_other_host,
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        request
            .headers
            .push((name.to_owned(), value.trim().to_owned()));
    }
    let length = request
        .header("content-length")
        .and_then(|value| value.parse().ok());
    if request.header("expect").is_some() {
        return Err(std::io::ErrorKind::Unsupported.into());
    }
    reader
        .take(length.unwrap_or(0))
        .read_to_end(&mut request.body)?;
    Ok(Some(request))
}
