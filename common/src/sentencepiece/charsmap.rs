//! Checks SentencePiece's compiled rules for text: the library that applies them follows every number that they hold, wherever
//! it leads.
//!
//! The bytes are the length of a trie, the trie (a double array of 32-bit units, Darts), and texts that end with a NUL. A walk
//! begins at unit 0; a byte leads to another unit, and a unit with a leaf to one whose value says where in the texts its
//! replacement begins.

const UNIT_BYTES: usize = 4;
const OFFSET_WIDE: u32 = 1 << 9;
const HAS_LEAF: u32 = 1 << 8;
const LABEL: u32 = 1 << 31 | 0xff;
const VALUE: u32 = (1 << 31) - 1;

/// Refuses rules from which a walk could leave the array or the texts.
pub(super) fn check(bytes: &[u8]) -> Result<(), &'static str> {
    let (length, rest) = bytes.split_first_chunk().ok_or("has no length")?;
    let length = u32::from_le_bytes(*length) as usize;
    let (trie, texts) = rest
        .split_at_checked(length)
        .ok_or("is shorter than it says")?;
    let texts = std::str::from_utf8(texts).map_err(|_| "has texts that are not UTF-8")?;
    let (units, left) = trie.as_chunks::<UNIT_BYTES>();
    if units.is_empty() || !left.is_empty() {
        return Err("has no whole number of units");
    }
    let units: Vec<u32> = units.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
    let mut seen = vec![false; units.len()];
    let mut nodes = vec![offset(units[0])];
    while let Some(node) = nodes.pop() {
        // Any byte may come next.
        if node | 0xff >= units.len() {
            return Err("leads out of its trie");
        }
        for byte in 1..=0xff_u32 {
            let at = node ^ byte as usize;
            let unit = units[at];
            if unit & LABEL != byte || std::mem::replace(&mut seen[at], true) {
                continue;
            }
            let node = at ^ offset(unit);
            if unit & HAS_LEAF != 0 {
                let leaf = *units.get(node).ok_or("leads out of its trie")?;
                if !texts.is_char_boundary((leaf & VALUE) as usize) {
                    return Err("leads out of its texts");
                }
            }
            nodes.push(node);
        }
    }
    Ok(())
}

fn offset(unit: u32) -> usize {
    (unit as usize >> 10) << ((unit & OFFSET_WIDE) >> 6)
}
