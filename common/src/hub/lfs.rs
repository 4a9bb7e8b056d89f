//! Large files into the hub's storage of them, by git's protocol for it: whole, or in parts that the hub puts together.
//!
//! In: files with their sha256. Out: they are there, as the hub has confirmed. What it has already is not sent.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use ureq::http::{HeaderMap, Method, header};

use super::all_at_once::all_at_once;
use super::call::{Call, Payload};
use super::client::Client;
use super::failure::Subject;
use super::id::Revision;
use super::{HubError, RepoId, Source};
use crate::progress::Progress;

const CONTENT_TYPE: &str = "application/vnd.git-lfs+json";
const OBJECTS_PER_CALL: usize = 100;
const MAX_PARTS: usize = 10_000;
/// Most time until the storage confirms what it was sent.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(120);

/// A file for the storage.
pub(super) struct Object<'a> {
    pub source: &'a Source,
    pub size: u64,
    pub oid: String,
}

#[derive(Deserialize)]
struct Batch {
    objects: Vec<Instruction>,
}

/// What is to be done with one object.
#[derive(Deserialize)]
struct Instruction {
    oid: String,
    /// None where the storage has it.
    actions: Option<Actions>,
    error: Option<ObjectError>,
}

#[derive(Deserialize)]
struct ObjectError {
    message: String,
}

#[derive(Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: HashMap<String, Value>,
}

/// What the transfers of one commit share.
struct Transfers<'a> {
    client: &'a Client,
    repo: &'a RepoId,
    progress: &'a Progress,
}

/// Brings the objects into the storage.
pub(super) fn upload(
    client: &Client,
    repo: &RepoId,
    branch: &Revision,
    objects: &[Object],
    progress: &Progress,
) -> Result<(), HubError> {
    let transfers = Transfers {
        client,
        repo,
        progress,
    };
    let total = objects.iter().map(|object| object.size).sum();
    progress.begin("pushing to the hub", total);
    for chunk in objects.chunks(OBJECTS_PER_CALL) {
        let instructions = transfers.ask(chunk, branch)?;
        let is_stopped = AtomicBool::new(false);
        all_at_once(chunk, &is_stopped, |object| {
            let instruction = instructions.iter().find(|found| found.oid == object.oid);
            let instruction = instruction.ok_or_else(|| {
                transfers.error(format!(
                    "the storage does not say where {} goes",
                    object.oid
                ))
            })?;
            transfers.follow(object, instruction)
        })?;
    }
    Ok(())
}

impl Transfers<'_> {
    fn ask(&self, objects: &[Object], branch: &Revision) -> Result<Vec<Instruction>, HubError> {
        let listed: Vec<Value> = objects
            .iter()
            .map(|object| json!({"oid": object.oid, "size": object.size}))
            .collect();
        let body = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": listed,
            "hash_algo": "sha256",
            "ref": {"name": branch.as_str()},
        });
        let body = body.to_string();
        let url = format!("{}.git/info/lfs/objects/batch", self.client.page(self.repo));
        let (batch, _): (Batch, HeaderMap) = self
            .client
            .json(&self.post(url, body.as_bytes()), self.progress)?;
        Ok(batch.objects)
    }

    fn follow(&self, object: &Object, instruction: &Instruction) -> Result<(), HubError> {
        if let Some(error) = &instruction.error {
            return Err(self.error(format!("the storage refuses a file: {}", error.message)));
        }
        let Some(actions) = &instruction.actions else {
            self.progress.advance(object.size);
            return Ok(());
        };
        if let Some(upload) = &actions.upload {
            match upload.header.get("chunk_size") {
                None => self.send_whole(object, upload)?,
                Some(size) => {
                    let size = number(size).filter(|size| *size > 0);
                    let size = size.ok_or_else(|| {
                        self.error("the storage's `chunk_size` is no number".to_owned())
                    })?;
                    self.send_parts(object, upload, size)?;
                }
            }
        }
        if let Some(verify) = &actions.verify {
            let body = json!({"oid": object.oid, "size": object.size}).to_string();
            let call = self.with_headers(self.post(verify.href.clone(), body.as_bytes()), verify);
            self.client.done(&call, self.progress)?;
        }
        Ok(())
    }

    fn send_whole(&self, object: &Object, action: &Action) -> Result<(), HubError> {
        let counted = AtomicU64::new(0);
        let call = self.put(&action.href, object, 0, object.size, &counted)?;
        let call = self.with_headers(call, action);
        self.client.done(&call, self.progress)?;
        Ok(())
    }

    /// Sends part after part to the numbered addresses, and has them put together.
    fn send_parts(&self, object: &Object, action: &Action, size: u64) -> Result<(), HubError> {
        let mut addresses: Vec<(u64, &str)> = action
            .header
            .iter()
            .filter_map(|(name, value)| Some((name.parse().ok()?, value.as_str()?)))
            .collect();
        addresses.sort_unstable();
        let count = object.size.div_ceil(size);
        if addresses.len() > MAX_PARTS || addresses.len() as u64 != count {
            let found = addresses.len();
            return Err(self.error(format!(
                "the storage names {found} parts for a file that has {count}"
            )));
        }
        let mut parts = Vec::with_capacity(addresses.len());
        for (index, (number, address)) in addresses.iter().enumerate() {
            let offset = index as u64 * size;
            let counted = AtomicU64::new(0);
            let length = size.min(object.size - offset);
            let call = self.put(address, object, offset, length, &counted)?;
            let headers = self.client.done(&call, self.progress)?;
            let etag = headers
                .get(header::ETAG)
                .and_then(|etag| etag.to_str().ok())
                .filter(|etag| !etag.is_empty());
            let etag = etag
                .ok_or_else(|| self.error(format!("the storage does not confirm part {number}")))?;
            parts.push(json!({"partNumber": number, "etag": etag}));
        }
        let body = json!({"oid": object.oid, "parts": parts}).to_string();
        let call = self.post(action.href.clone(), body.as_bytes());
        self.client.done(&call, self.progress)?;
        Ok(())
    }

    /// Sends part of the object's content.
    fn put<'a>(
        &self,
        address: &str,
        object: &'a Object,
        offset: u64,
        size: u64,
        counted: &'a AtomicU64,
    ) -> Result<Call<'a>, HubError> {
        let payload = match object.source {
            Source::File(path) => Payload::Slice {
                path,
                offset,
                size,
                counted,
            },
            Source::Bytes(bytes) => {
                let part = bytes.get(offset as usize..(offset + size) as usize);
                self.progress.advance(size);
                Payload::Bytes(part.unwrap_or_default())
            }
        };
        let call = Call::new(Method::PUT, address.to_owned(), Subject::of(self.repo));
        Ok(call.payload(payload).answer_timeout(CONFIRM_TIMEOUT))
    }

    fn post<'a>(&self, url: String, body: &'a [u8]) -> Call<'a> {
        Call::new(Method::POST, url, Subject::of(self.repo))
            .header("accept", CONTENT_TYPE)
            .header("content-type", CONTENT_TYPE)
            .payload(Payload::Bytes(body))
            .answer_timeout(CONFIRM_TIMEOUT)
    }

    /// The headers that the action asks for; numbers and `chunk_size` are none.
    fn with_headers<'a>(&self, mut call: Call<'a>, action: &Action) -> Call<'a> {
        for (name, value) in &action.header {
            let is_part = name == "chunk_size" || name.parse::<u64>().is_ok();
            if let Some(value) = value.as_str().filter(|_| !is_part) {
                call = call.header(name, value);
            }
        }
        call
    }

    fn error(&self, reason: String) -> HubError {
        HubError::Upload {
            repo: self.repo.clone(),
            reason,
        }
    }
}

fn number(value: &Value) -> Option<u64> {
    match value {
        Value::String(text) => text.parse().ok(),
        value => value.as_u64(),
    }
}
