//! What the hub answers to whoever writes, and what it keeps of it.

use common::hub::{git_hex, sha256_hex};
use serde_json::{Value, json};

use super::answer::Target;
use super::http::{Answer, Request};
use super::{Inner, State, is_large};

/// Calls that are about no repository that is there yet.
pub fn answer(state: &State, inner: &mut Inner, request: &Request, path: &str) -> Option<Answer> {
    let _ = state;
    match path {
        "/api/whoami-v2" => Some(match is_allowed(inner, request) {
            true => Answer::new(200, json!({"name": "tester", "type": "user"}).to_string()),
            false => Answer::new(401, "{}"),
        }),
        "/api/repos/create" => Some(create(inner, request)),
        "/lfs-verify" => {
            let body: Value = parse(&request.body);
            let oid = body["oid"].as_str().unwrap_or("");
            let stored = inner.objects.get(oid).map(Vec::len);
            Some(
                match stored == body["size"].as_u64().map(|size| size as usize) {
                    true => Answer::new(200, "{}"),
                    false => Answer::new(422, json!({"error": "not the size"}).to_string()),
                },
            )
        }
        "/lfs-complete" => Some(complete(inner, request)),
        _ => None,
    }
}

/// Changes of a repository that is there.
pub fn change(state: &State, inner: &mut Inner, request: &Request, target: &Target) -> Answer {
    if !is_allowed(inner, request) {
        return Answer::new(403, json!({"error": "no write access"}).to_string());
    }
    match target.mark {
        "/preupload/" => preupload(inner, request, target),
        "/commit/" => commit(state, inner, request, target),
        _ => batch(state, inner, request),
    }
}

/// What is put onto the host of large files.
pub fn store(inner: &mut Inner, request: &Request, path: &str) -> Answer {
    let Some(rest) = path
        .strip_prefix("/put/")
        .filter(|_| request.method == "PUT")
    else {
        return Answer::new(404, "");
    };
    match rest.split_once('/') {
        Some((oid, part)) => {
            let part = part.parse().unwrap_or(0);
            inner
                .parts
                .insert((oid.to_owned(), part), request.body.clone());
            Answer::new(200, "").header("ETag", format!("\"part-{part}\""))
        }
        None if sha256_hex(&request.body) == rest => {
            inner.objects.insert(rest.to_owned(), request.body.clone());
            Answer::new(200, "")
        }
        None => Answer::new(400, ""),
    }
}

fn is_allowed(inner: &Inner, request: &Request) -> bool {
    let wanted = inner.token.as_ref().map(|token| format!("Bearer {token}"));
    wanted.is_some() && request.header("authorization") == wanted.as_deref()
}

fn create(inner: &mut Inner, request: &Request) -> Answer {
    if !is_allowed(inner, request) {
        return Answer::new(401, "{}");
    }
    let body = parse(&request.body);
    let text = |name: &str| body[name].as_str().unwrap_or("").to_owned();
    // Python leaves the type of a model out.
    let kind = match body["type"] == "dataset" {
        true => "datasets",
        false => "models",
    };
    let key = format!("{kind}/{}/{}", text("organization"), text("name"));
    if inner.repos.contains_key(&key) {
        return Answer::new(
            409,
            json!({"error": "You already created this repo"}).to_string(),
        );
    }
    inner.commit(
        &key,
        "main",
        [(".gitattributes".to_owned(), Vec::new())].into(),
    );
    let is_private = body["private"].as_bool();
    inner.repo_mut(&key).is_private = is_private.unwrap_or(false);
    Answer::new(200, json!({"url": key}).to_string())
}

fn preupload(inner: &Inner, request: &Request, target: &Target) -> Answer {
    let body = parse(&request.body);
    let repo = &inner.repos[&target.repo];
    let files = repo
        .refs
        .get(&target.rest)
        .map(|commit| &repo.commits[commit]);
    let Some(files) = files else {
        return super::answer::not_found("RevisionNotFound");
    };
    let modes = body["files"].as_array().into_iter().flatten().map(|file| {
        let path = file["path"].as_str().unwrap_or("");
        let is_large = is_large(path) && !inner.are_all_regular;
        let there = files.get(path).map(|bytes| match is_large && !bytes.is_empty() {
            true => sha256_hex(bytes),
            false => git_hex(bytes),
        });
        let mode = if is_large { "lfs" } else { "regular" };
        json!({"path": path, "uploadMode": mode, "shouldIgnore": path.ends_with(".ignored"), "oid": there})
    });
    Answer::new(200, json!({"files": modes.collect::<Vec<_>>()}).to_string())
}

fn batch(state: &State, inner: &Inner, request: &Request) -> Answer {
    let body = parse(&request.body);
    let objects = body["objects"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|object| {
            let oid = object["oid"].as_str().unwrap_or("");
            let size = object["size"].as_u64().unwrap_or(0) as usize;
            let mut answer = json!({"oid": oid, "size": size});
            if inner.objects.contains_key(oid) {
                return answer;
            }
            let (hub, storage) = (state.hub(), state.storage());
            let upload = match inner.part_bytes.filter(|part| size > *part) {
                None => json!({"href": format!("{storage}/put/{oid}")}),
                Some(part) => {
                    let mut header = json!({"chunk_size": part.to_string()});
                    for number in 1..=size.div_ceil(part) {
                        header[number.to_string()] = json!(format!("{storage}/put/{oid}/{number}"));
                    }
                    json!({"href": format!("{hub}/lfs-complete"), "header": header})
                }
            };
            answer["actions"] =
                json!({"upload": upload, "verify": {"href": format!("{hub}/lfs-verify")}});
            answer
        });
    let objects: Vec<_> = objects.collect();
    Answer::new(
        200,
        json!({"transfer": "basic", "objects": objects}).to_string(),
    )
}

fn complete(inner: &mut Inner, request: &Request) -> Answer {
    let body = parse(&request.body);
    let oid = body["oid"].as_str().unwrap_or("").to_owned();
    let mut whole = Vec::new();
    for part in body["parts"].as_array().into_iter().flatten() {
        let number = part["partNumber"].as_u64().unwrap_or(0) as usize;
        let is_known = part["etag"] == json!(format!("\"part-{number}\""));
        let Some(bytes) = inner.parts.get(&(oid.clone(), number)).filter(|_| is_known) else {
            return Answer::new(400, json!({"error": "no such part"}).to_string());
        };
        whole.extend(bytes);
    }
    if sha256_hex(&whole) != oid {
        return Answer::new(400, json!({"error": "not the digest"}).to_string());
    }
    inner.objects.insert(oid, whole);
    Answer::new(200, "{}")
}

fn commit(state: &State, inner: &mut Inner, request: &Request, target: &Target) -> Answer {
    let repo = &inner.repos[&target.repo];
    let Some(parent) = repo.refs.get(&target.rest) else {
        return super::answer::not_found("RevisionNotFound");
    };
    let mut files = repo.commits[parent].clone();
    for line in request.body.split(|byte| *byte == b'\n') {
        let line = parse(line);
        let value = &line["value"];
        let path = value["path"].as_str().unwrap_or("").to_owned();
        match line["key"].as_str() {
            Some("file") => {
                files.insert(path, base64(value["content"].as_str().unwrap_or("")));
            }
            Some("lfsFile") => {
                let oid = value["oid"].as_str().unwrap_or("");
                let Some(bytes) = inner.objects.get(oid) else {
                    return Answer::new(400, json!({"error": "not in the storage"}).to_string());
                };
                files.insert(path, bytes.clone());
            }
            _ => {}
        }
    }
    let commit = inner.commit(&target.repo, &target.rest, files);
    let url = format!("{}/{}/commit/{commit}", state.hub(), target.repo);
    Answer::new(
        200,
        json!({"success": true, "commitOid": commit, "commitUrl": url}).to_string(),
    )
}

fn parse(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or(Value::Null)
}

fn base64(text: &str) -> Vec<u8> {
    const DIGITS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0);
    for digit in text.chars().filter_map(|c| DIGITS.find(c)) {
        bits = bits << 6 | digit as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 255) as u8);
        }
    }
    bytes
}
