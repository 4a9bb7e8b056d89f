//! Whether a request is signed as S3 wants it (signature version 4), by the test's one key.

use common::hub::sha256_hex;

use super::{KEY_ID, REGION, Request, SECRET};

const BLOCK_BYTES: usize = 64;

/// Why a signature does not count.
#[derive(Debug)]
pub enum Refusal {
    Key,
    Region,
    Signature,
}

/// Computes the signature of what came, and compares.
pub fn check(request: &Request) -> Result<(), Refusal> {
    let header = request.header("authorization").unwrap_or_default();
    let field = |name: &str| {
        let (_, rest) = header.split_once(&format!("{name}="))?;
        rest.split(',').next().map(str::trim)
    };
    let credential = field("Credential").ok_or(Refusal::Signature)?;
    let scope: Vec<&str> = credential.split('/').collect();
    let [key, date, region, service, end] = scope[..] else {
        return Err(Refusal::Signature);
    };
    if key != KEY_ID {
        return Err(Refusal::Key);
    }
    if region != REGION {
        return Err(Refusal::Region);
    }
    let signed = field("SignedHeaders").ok_or(Refusal::Signature)?;
    let (path, query) = request
        .target
        .split_once('?')
        .unwrap_or((&request.target, ""));
    let mut pairs: Vec<&str> = query.split('&').filter(|pair| !pair.is_empty()).collect();
    pairs.sort_unstable();
    let headers = signed.split(';').map(|name| {
        let value = request.header(name).unwrap_or_default();
        format!("{name}:{value}\n")
    });
    let headers: String = headers.collect();
    let payload = request.header("x-amz-content-sha256").unwrap_or_default();
    let canonical = format!(
        "{}\n{path}\n{}\n{headers}\n{signed}\n{payload}",
        request.method,
        pairs.join("&")
    );
    let time = request.header("x-amz-date").unwrap_or_default();
    let text = format!(
        "AWS4-HMAC-SHA256\n{time}\n{date}/{region}/{service}/{end}\n{}",
        sha256_hex(canonical.as_bytes())
    );
    let start = format!("AWS4{SECRET}").into_bytes();
    let scope = [date, region, service, end];
    let key = scope
        .iter()
        .fold(start, |key, part| hmac(&key, part.as_bytes()));
    let expected = hmac(&key, text.as_bytes());
    let expected: String = expected.iter().map(|byte| format!("{byte:02x}")).collect();
    match field("Signature") == Some(&expected) {
        true => Ok(()),
        false => Err(Refusal::Signature),
    }
}

/// HMAC-SHA256 (RFC 2104) by a key that is no longer than a block.
fn hmac(key: &[u8], text: &[u8]) -> Vec<u8> {
    let padded = |with: u8| -> Vec<u8> {
        let key = key.iter().copied().chain(std::iter::repeat(0));
        key.take(BLOCK_BYTES).map(|byte| byte ^ with).collect()
    };
    let inner = sha256(&[padded(0x36), text.to_vec()].concat());
    sha256(&[padded(0x5c), inner].concat())
}

fn sha256(bytes: &[u8]) -> Vec<u8> {
    let hex = sha256_hex(bytes);
    let pairs = (0..hex.len()).step_by(2);
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    pairs.map(byte).collect()
}
