//! The header of a safetensors file: a table of tensors, none of them twice, which fills the data behind it without a hole.

use std::collections::{BTreeMap, btree_map};
use std::fmt;
use std::path::Path;

use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::Dtype;
use crate::files::FileError;

pub(super) const METADATA: &str = "__metadata__";

/// Most tensors in a file, far more than any model has: a hostile header is given up before it has taken much memory.
const MAX_TENSORS: usize = 1 << 20;
const MAX_DIMENSIONS: usize = 16;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    pub dtype: Dtype,
    #[serde(deserialize_with = "shape")]
    pub shape: Vec<usize>,
    /// First byte and end of its data, relative to the end of the header.
    pub data_offsets: (u64, u64),
}

/// Checks that every tensor lies inside the data, has the bytes its type and shape need, and that none overlaps or leaves a hole.
pub(super) fn check_ranges(
    path: &Path,
    tensors: &BTreeMap<String, Entry>,
    data_bytes: u64,
    data_start: u64,
) -> Result<(), FileError> {
    let malformed = |reason: String| FileError::malformed(path, reason);
    let mut ranges: Vec<(u64, u64, &str)> = Vec::with_capacity(tensors.len());
    for (name, entry) in tensors {
        let (begin, end) = entry.data_offsets;
        let bytes = byte_len(entry.dtype, &entry.shape)
            .ok_or_else(|| malformed(format!("tensor {name} has an impossible shape")))?;
        if begin.checked_add(bytes) != Some(end) {
            return Err(malformed(format!(
                "tensor {name} needs {bytes} bytes, but its header gives it bytes {begin} to {end}"
            )));
        }
        ranges.push((begin, end, name));
    }
    ranges.sort_unstable();
    let mut position = 0;
    for (begin, end, name) in ranges {
        if begin != position {
            return Err(malformed(format!(
                "tensor {name} begins at byte {begin} of the data where {position} was expected"
            )));
        }
        if end > data_bytes {
            return Err(FileError::Truncated {
                path: path.to_owned(),
                tensor: name.to_owned(),
                expected: end.saturating_add(data_start),
                found: data_bytes + data_start,
            });
        }
        position = end;
    }
    if position != data_bytes {
        let extra = data_bytes - position;
        return Err(malformed(format!(
            "has {extra} bytes more than its header describes"
        )));
    }
    Ok(())
}

pub(super) fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let bits = shape
        .iter()
        .try_fold(dtype.bitsize() as u64, |bits, &size| {
            bits.checked_mul(size as u64)
        })?;
    (bits % 8 == 0).then_some(bits / 8)
}

pub(super) struct Header {
    pub tensors: BTreeMap<String, Entry>,
    pub metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

fn shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    deserializer.deserialize_seq(ShapeVisitor)
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Vec<usize>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a list of sizes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sizes: A) -> Result<Vec<usize>, A::Error> {
        let mut shape = Vec::new();
        while let Some(size) = sizes.next_element()? {
            if shape.len() == MAX_DIMENSIONS {
                let reason = format!("more than {MAX_DIMENSIONS} dimensions");
                return Err(A::Error::custom(reason));
            }
            shape.push(size);
        }
        Ok(shape)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a table of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header {
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
        };
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                header.metadata = map.next_value()?;
                continue;
            }
            if header.tensors.len() == MAX_TENSORS {
                let reason = format!("more than {MAX_TENSORS} tensors");
                return Err(A::Error::custom(reason));
            }
            let entry = map
                .next_value()
                .map_err(|error| A::Error::custom(format!("tensor {name}: {error}")))?;
            match header.tensors.entry(name) {
                btree_map::Entry::Vacant(place) => _ = place.insert(entry),
                btree_map::Entry::Occupied(place) => {
                    let name = place.key();
                    return Err(A::Error::custom(format!("tensor {name} is listed twice")));
                }
            }
        }
        Ok(header)
    }
}
