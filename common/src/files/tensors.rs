//! Safetensors files: read through a memory map with every header field checked against the file's length; written by
//! [`writer`].
//!
//! The map is valid as long as nobody shortens the file under us; Muster replaces files by renaming, which is safe.

mod header;
mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
pub use safetensors::Dtype;

use thiserror::Error;

use super::{FileError, stray};
use header::{Entry, Header, byte_len, check_ranges};
pub use writer::{TensorSpec, write, write_streaming};

/// Largest header of a file, as the safetensors library has it.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open safetensors file.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    /// Byte of the map at which tensor data begins.
    data: usize,
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

/// One tensor, in the file's own bytes.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    /// The scalars, little-endian, rows first. May be aligned to no more than a byte.
    pub bytes: &'a [u8],
}

impl TensorFile {
    /// Maps a file and checks its header against its length.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let file = File::open(path).map_err(FileError::io("read", path))?;
        let length = file.metadata().map_err(FileError::io("read", path))?.len();
        let malformed = |reason: String| FileError::malformed(path, reason);
        if length < 8 {
            return Err(malformed(format!(
                "has {length} bytes, too few for a safetensors file"
            )));
        }
        // SAFETY: the map is read-only, and the file is not written in place (see the head of this file).
        let map = unsafe { Mmap::map(&file) }.map_err(FileError::io("read", path))?;
        // The JSON of a header begins behind its length.
        if map.get(8) != Some(&b'{')
            && let Some(reason) = stray::recognised(&map)
        {
            return Err(malformed(reason.into()));
        }
        let mut prefix = [0; 8];
        prefix.copy_from_slice(&map[..8]);
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > MAX_HEADER_BYTES {
            return Err(malformed(
                "is not a safetensors file: its header would be too large".into(),
            ));
        }
        if header_bytes > length - 8 {
            return Err(malformed(format!(
                "is truncated in its header: {} bytes expected, {length} found; copy or download it again",
                header_bytes + 8
            )));
        }
        let data = 8 + header_bytes as usize;
        let header: Header = serde_json::from_slice(&map[8..data])
            .map_err(|error| malformed(format!("the safetensors header is not valid: {error}")))?;
        check_ranges(path, &header.tensors, length - data as u64, data as u64)?;
        Ok(Self {
            path: path.to_owned(),
            map,
            data,
            tensors: header.tensors,
            metadata: header.metadata,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The tensor of that name, if there is one.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let entry = self.tensors.get(name)?;
        let (begin, end) = entry.data_offsets;
        Some(TensorView {
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: &self.map[self.data + begin as usize..self.data + end as usize],
        })
    }

    /// The tensor, which must have this shape.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, FileError> {
        let view = self.get(name).ok_or_else(|| FileError::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
        })?;
        if view.shape != shape {
            return Err(FileError::Shape {
                path: self.path.clone(),
                tensor: name.to_owned(),
                expected: shape.to_vec(),
                found: view.shape.to_vec(),
            });
        }
        Ok(view)
    }

    /// Writes the tensor's scalars as float32 to `out`, which has as many.
    pub fn read_f32(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<(), FileError> {
        let view = self.expect(name, shape)?;
        view.to_f32(out)
            .map_err(|reason| FileError::malformed(&self.path, format!("tensor {name} {reason}")))
    }
}

impl TensorView<'_> {
    pub fn scalars(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether [`Self::to_f32`] reads this type.
    pub fn is_readable(&self) -> bool {
        matches!(
            self.dtype,
            Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64
        )
    }

    /// Writes the scalars as float32 to `out`, which has as many.
    pub fn to_f32(&self, out: &mut [f32]) -> Result<(), NotFloat32> {
        assert_eq!(
            out.len(),
            self.scalars(),
            "the buffer does not fit the tensor"
        );
        self.part_to_f32(0, out)
    }

    /// Writes the scalars from `first` on as float32 to `out`, which has no more than there are.
    pub fn part_to_f32(&self, first: usize, out: &mut [f32]) -> Result<(), NotFloat32> {
        let size = self.dtype.bitsize() / 8;
        let part = Self {
            bytes: &self.bytes[first * size..][..out.len() * size],
            ..*self
        };
        match part.dtype {
            Dtype::F32 => bytemuck::cast_slice_mut::<f32, u8>(out).copy_from_slice(part.bytes),
            Dtype::BF16 => convert(part.bytes, out, |bits| bf16::from_bits(bits).to_f32()),
            Dtype::F16 => convert(part.bytes, out, |bits| f16::from_bits(bits).to_f32()),
            Dtype::F64 => {
                part.check_range()?;
                for (scalar, wide) in out.iter_mut().zip(part.doubles()) {
                    *scalar = wide as f32;
                }
            }
            other => return Err(NotFloat32::Type(other)),
        }
        Ok(())
    }

    /// Refuses finite numbers in double precision that float32 would make infinite.
    pub fn check_range(&self) -> Result<(), NotFloat32> {
        if self.dtype != Dtype::F64 {
            return Ok(());
        }
        let is_beyond = |wide: &f64| wide.is_finite() && (*wide as f32).is_infinite();
        match self.doubles().find(is_beyond) {
            Some(wide) => Err(NotFloat32::TooLarge(wide)),
            None => Ok(()),
        }
    }

    /// Refuses finite numbers that bfloat16 would make infinite. Reads all of a tensor in single or double precision.
    pub fn check_bfloat16(&self) -> Result<(), NotBfloat16> {
        let is_beyond = |wide: &f32| wide.is_finite() && bf16::from_f32(*wide).is_infinite();
        let beyond = match self.dtype {
            Dtype::F32 => {
                let (words, _) = self.bytes.as_chunks();
                let mut singles = words.iter().map(|word| f32::from_le_bytes(*word));
                singles.find(is_beyond)
            }
            Dtype::F64 => self.doubles().map(|wide| wide as f32).find(is_beyond),
            _ => None,
        };
        match beyond {
            Some(wide) => Err(NotBfloat16(wide)),
            None => Ok(()),
        }
    }

    fn doubles(&self) -> impl Iterator<Item = f64> {
        let (words, _) = self.bytes.as_chunks();
        words.iter().map(|word| f64::from_le_bytes(*word))
    }
}

/// Why a tensor has no float32 values, in words that follow its name.
#[derive(Clone, Copy, Debug, PartialEq, Error)]
pub enum NotFloat32 {
    #[error("is {0:?}; floating-point numbers are needed")]
    Type(Dtype),
    #[error("holds {0:e}, which is beyond float32: it would become infinite")]
    TooLarge(f64),
}

/// A number that bfloat16 does not have, in words that follow the name of its tensor.
#[derive(Clone, Copy, Debug, PartialEq, Error)]
#[error(
    "holds {0:e}, which is beyond bfloat16: it would become infinite; use base_dtype: float32, and no pure_bf16"
)]
pub struct NotBfloat16(pub f32);

fn convert(bytes: &[u8], out: &mut [f32], to_f32: impl Fn(u16) -> f32) {
    for (scalar, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *scalar = to_f32(u16::from_le_bytes([pair[0], pair[1]]));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample(folder: &Path) -> PathBuf {
        let path = folder.join("model.safetensors");
        let weights: Vec<u8> = [1.0f32, -2.0, 3.5]
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect();
        let halves: Vec<u8> = [bf16::from_f32(0.5), bf16::from_f32(-4.0)]
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect();
        write(
            folder,
            "model.safetensors",
            [
                ("w".to_owned(), Dtype::F32, vec![3, 1], &weights[..]),
                ("h".to_owned(), Dtype::BF16, vec![2], &halves[..]),
            ],
            &[("step", "7")],
        )
        .unwrap();
        path
    }

    fn raw(folder: &Path, header: &str, data_bytes: usize) -> FileError {
        let path = folder.join("raw.safetensors");
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data_bytes, 0);
        std::fs::write(&path, bytes).unwrap();
        TensorFile::open(&path).unwrap_err()
    }

    #[test]
    fn what_was_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let file = TensorFile::open(&sample(folder.path())).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["h", "w"]);
        assert_eq!(file.metadata("format"), Some("pt"));
        assert_eq!(file.metadata("step"), Some("7"));
        let mut w = [0.0; 3];
        file.read_f32("w", &[3, 1], &mut w).unwrap();
        assert_eq!(w, [1.0, -2.0, 3.5]);
        let mut h = [0.0; 2];
        file.read_f32("h", &[2], &mut h).unwrap();
        assert_eq!(h, [0.5, -4.0]);
    }

    #[test]
    fn the_safetensors_library_reads_our_files() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = std::fs::read(sample(folder.path())).unwrap();
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.tensor("w").unwrap().shape(), [3, 1]);
    }

    #[test]
    fn a_truncated_file_names_tensor_and_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = sample(folder.path());
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let message = TensorFile::open(&path).unwrap_err().to_string();
        for part in [
            "model.safetensors",
            "truncated",
            "tensor h",
            &bytes.len().to_string(),
            &(bytes.len() - 1).to_string(),
        ] {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert!(TensorFile::open(&path).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn hostile_headers_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let tensor = |shape: &str, offsets: &str| {
            format!(r#"{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let max = u64::MAX;
        for header in [
            String::new(),
            "[]".into(),
            tensor("[2]", "[0,4]"),
            tensor("[1]", "[4,8]"),
            tensor("[1]", "[4,0]"),
            tensor("[-1]", "[0,4]"),
            tensor(&format!("[{max},{max}]"), "[0,4]"),
            tensor(&format!("[{}1]", "1,".repeat(16)), "[0,4]"),
            tensor(&format!("[{}]", max / 4), &format!("[8,{max}]")),
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#.into(),
            r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#.into(),
            r#"{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}"#.into(),
        ] {
            raw(folder.path(), &header, 4);
        }
        let path = folder.path().join("raw.safetensors");
        std::fs::write(&path, [255; 16]).unwrap();
        assert!(TensorFile::open(&path).is_err());
    }

    #[test]
    fn numbers_beyond_float32_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let read = |values: [f64; 3]| {
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let tensor = ("wide".to_owned(), Dtype::F64, vec![3], &bytes[..]);
            write(folder.path(), "wide.safetensors", [tensor], &[]).unwrap();
            let mut out = [0.0; 3];
            let file = TensorFile::open(&folder.path().join("wide.safetensors")).unwrap();
            file.read_f32("wide", &[3], &mut out)
                .map(|()| out)
                .map_err(|error| error.to_string())
        };
        let most = f64::from(f32::MAX);
        assert_eq!(read([most, -1.0, 1e-300]).unwrap(), [f32::MAX, -1.0, 0.0]);
        let infinite = [f64::INFINITY, 0.0, 0.0];
        assert_eq!(read(infinite).unwrap()[0], f32::INFINITY);
        for beyond in [1e39, -1e300] {
            let error = read([0.0, beyond, 0.0]).unwrap_err();
            let said = format!("tensor wide holds {beyond:e}, which is beyond float32");
            assert!(error.contains(&said), "{error}");
        }
    }

    #[test]
    fn numbers_beyond_bfloat16_are_found_where_the_type_may_hold_them() {
        let folder = tempfile::tempdir().unwrap();
        let check = |dtype, bytes: Vec<u8>| {
            let shape = vec![bytes.len() / dtype_bytes(dtype)];
            let tensor = ("w".to_owned(), dtype, shape, &bytes[..]);
            write(folder.path(), "w.safetensors", [tensor], &[]).unwrap();
            let file = TensorFile::open(&folder.path().join("w.safetensors")).unwrap();
            file.get("w").unwrap().check_bfloat16()
        };
        fn dtype_bytes(dtype: Dtype) -> usize {
            match dtype {
                Dtype::F64 => 8,
                Dtype::F32 => 4,
                _ => 2,
            }
        }
        let single = |values: [f32; 2]| values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let most = bf16::MAX.to_f32();
        assert_eq!(check(Dtype::F32, single([most, f32::INFINITY])), Ok(()));
        assert_eq!(
            check(Dtype::F32, single([0.0, -f32::MAX])),
            Err(NotBfloat16(-f32::MAX))
        );
        let double = f64::from(f32::MAX).to_le_bytes().to_vec();
        assert_eq!(check(Dtype::F64, double), Err(NotBfloat16(f32::MAX)));
        assert_eq!(check(Dtype::BF16, vec![0x7f, 0x7f]), Ok(()));
    }

    #[test]
    fn a_wrong_shape_names_both() {
        let folder = tempfile::tempdir().unwrap();
        let file = TensorFile::open(&sample(folder.path())).unwrap();
        let message = file.expect("w", &[3]).unwrap_err().to_string();
        assert!(
            message.contains("[3, 1]") && message.contains("[3]"),
            "{message}"
        );
        assert!(file.expect("absent", &[3]).is_err());
    }
}
