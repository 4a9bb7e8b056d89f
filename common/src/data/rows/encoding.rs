//! Text as UTF-8, whichever way its file encodes it.
//!
//! Enters: bytes of a text file. Leaves: the same text as UTF-8 without a byte order mark, where the file begins with one of UTF-8 or
//! UTF-16; else the bytes as they are, which the readers of rows check. Never guesses an encoding.

use std::io::{self, BufRead, Read};

/// How a text file is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Utf8,
    Utf8WithMark,
    Utf16Le,
    Utf16Be,
}

impl Encoding {
    pub fn of(start: &[u8]) -> Self {
        match start {
            [0xef, 0xbb, 0xbf, ..] => Self::Utf8WithMark,
            [0xff, 0xfe, ..] => Self::Utf16Le,
            [0xfe, 0xff, ..] => Self::Utf16Be,
            _ => Self::Utf8,
        }
    }

    /// Number of bytes of the byte order mark.
    pub fn mark_bytes(self) -> usize {
        match self {
            Self::Utf8 => 0,
            Self::Utf8WithMark => 3,
            Self::Utf16Le | Self::Utf16Be => 2,
        }
    }

    /// Reads text that is encoded like this, from behind its byte order mark, as UTF-8.
    pub fn decode(self, text: impl BufRead + Send + 'static) -> Box<dyn Read + Send> {
        match self {
            Self::Utf8 | Self::Utf8WithMark => Box::new(text),
            Self::Utf16Le => Box::new(Utf16::new(text, u16::from_le_bytes)),
            Self::Utf16Be => Box::new(Utf16::new(text, u16::from_be_bytes)),
        }
    }
}

/// What to do with text that is not UTF-8, and where it is wrong: `at` is the number of bytes of `of` before `bytes`.
pub fn not_utf8(bytes: &[u8], at: u64, of: &str) -> Option<String> {
    let error = std::str::from_utf8(bytes).err()?;
    let valid = error.valid_up_to();
    let byte = bytes.get(valid).copied().unwrap_or_default();
    Some(format!(
        "not UTF-8 at byte {} of {of} (0x{byte:02x}): save the file as UTF-8 (`iconv -f WINDOWS-1252 -t UTF-8`, if it is from Windows)",
        at + valid as u64 + 1
    ))
}

/// Bytes that are decoded at a time.
const STEP_BYTES: usize = 64 << 10;

struct Utf16<R> {
    reader: R,
    unit_of: fn([u8; 2]) -> u16,
    /// First half of a unit, whose other half is not read yet.
    half: Option<u8>,
    /// First half of a pair.
    high: Option<u16>,
    /// Number of bytes of the file that were decoded.
    offset: u64,
    out: Vec<u8>,
    taken: usize,
    /// What is wrong behind `out`.
    error: Option<String>,
}

impl<R: BufRead> Utf16<R> {
    fn new(reader: R, unit_of: fn([u8; 2]) -> u16) -> Self {
        Self {
            reader,
            unit_of,
            half: None,
            high: None,
            offset: 2,
            out: Vec::new(),
            taken: 0,
            error: None,
        }
    }

    /// Decodes some more; leaves `out` empty at the end of the file.
    fn fill(&mut self) -> io::Result<()> {
        self.out.clear();
        self.taken = 0;
        while self.out.is_empty() && self.error.is_none() {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                if self.half.is_some() || self.high.is_some() {
                    self.error = Some(format!(
                        "the UTF-16 text ends within a character, after byte {} of the file: is the file cut off?",
                        self.offset
                    ));
                }
                return Ok(());
            }
            let bytes = buffer[..buffer.len().min(STEP_BYTES)].to_vec();
            self.reader.consume(bytes.len());
            for byte in bytes {
                self.offset += 1;
                let Some(first) = self.half.take() else {
                    self.half = Some(byte);
                    continue;
                };
                if !self.push((self.unit_of)([first, byte])) {
                    self.error = Some(format!(
                        "half a character at byte {} of the file, which is UTF-16: save it as UTF-8",
                        self.offset - 1
                    ));
                    break;
                }
            }
        }
        Ok(())
    }

    /// Takes the next unit. False where it does not fit to the one before.
    fn push(&mut self, unit: u16) -> bool {
        let decoded = match (self.high.take(), unit) {
            (None, 0xd800..=0xdbff) => {
                self.high = Some(unit);
                return true;
            }
            (None, unit) => char::from_u32(unit.into()),
            (Some(high), 0xdc00..=0xdfff) => {
                let (high, low) = (u32::from(high - 0xd800), u32::from(unit - 0xdc00));
                char::from_u32(0x10000 + (high << 10) + low)
            }
            (Some(_), _) => None,
        };
        let Some(decoded) = decoded else {
            return false;
        };
        let mut utf8 = [0; 4];
        self.out
            .extend_from_slice(decoded.encode_utf8(&mut utf8).as_bytes());
        true
    }
}

impl<R: BufRead> Read for Utf16<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.out.len() {
            if let Some(error) = &self.error {
                return Err(io::Error::other(error.clone()));
            }
            self.fill()?;
            if let (true, Some(error)) = (self.out.is_empty(), &self.error) {
                return Err(io::Error::other(error.clone()));
            }
        }
        let rest = &self.out[self.taken..];
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        self.taken += length;
        Ok(length)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn decode(bytes: &'static [u8]) -> Result<String, String> {
        let encoding = Encoding::of(bytes);
        let mut text = String::new();
        // Two bytes at a time and one in between: units and pairs come in parts.
        let reader = io::BufReader::with_capacity(3, &bytes[encoding.mark_bytes()..]);
        match encoding.decode(reader).read_to_string(&mut text) {
            Ok(_) => Ok(text),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn utf_16_of_both_orders_becomes_utf_8() {
        assert_eq!(
            decode(b"\xff\xfeh\0\xe4\0\x3d\xd8\x00\xde").unwrap(),
            "hä😀"
        );
        assert_eq!(
            decode(b"\xfe\xff\0h\0\xe4\xd8\x3d\xde\x00").unwrap(),
            "hä😀"
        );
        assert_eq!(decode(b"\xef\xbb\xbfh").unwrap(), "h");
    }

    #[test]
    fn broken_utf_16_is_told_with_its_byte() {
        let half = decode(b"\xff\xfeh\0\x3d\xd8h\0").unwrap_err();
        assert!(half.contains("half a character at byte 7"), "{half}");
        let cut = decode(b"\xff\xfeh\0h").unwrap_err();
        assert!(cut.contains("after byte 5"), "{cut}");
    }

    #[test]
    fn bytes_that_are_not_utf_8_are_told_with_their_place_in_the_file() {
        assert_eq!(not_utf8("hä".as_bytes(), 0, "the file"), None);
        let reason = not_utf8(b"caf\xe9 x", 100, "the file").unwrap();
        assert!(
            reason.starts_with("not UTF-8 at byte 104 of the file (0xe9)"),
            "{reason}"
        );
    }
}
