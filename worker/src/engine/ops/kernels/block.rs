//! What a kernel is told to compute: where factors, panel and sums lie.

/// Bytes of a cache line.
pub(super) const LINE_BYTES: usize = 64;

/// Where sums go to: the address of an element, and the number of elements from row to row.
#[derive(Clone, Copy)]
pub(super) enum Out {
    F32(*mut f32, usize),
    Bf16(*mut u16, usize),
}
// SAFETY: tasks write disjoint rows or columns, see `super::product`.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// The target from this row and column on.
    ///
    /// # Safety
    /// The row and column must lie within it.
    pub(super) unsafe fn at(self, row: usize, column: usize) -> Self {
        // SAFETY: as the caller says.
        unsafe {
            match self {
                Self::F32(out, stride) => Self::F32(out.add(row * stride + column), stride),
                Self::Bf16(out, stride) => Self::Bf16(out.add(row * stride + column), stride),
            }
        }
    }
}

/// Memory that is read soon and is prefetched bit by bit along the way: rows of whole cache lines.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    pub row: *const u8,
    pub stride: usize,
    pub line: usize,
    pub lines: usize,
    pub rows: usize,
}

impl Ahead {
    pub(super) const NONE: Self = Self {
        row: std::ptr::null(),
        stride: 0,
        line: 0,
        lines: 0,
        rows: 0,
    };

    #[inline(always)]
    pub(super) fn fetch(&mut self, lines: usize) {
        for _ in 0..lines {
            if self.rows == 0 {
                return;
            }
            prefetch(self.row.wrapping_add(self.line * LINE_BYTES));
            self.line += 1;
            if self.line == self.lines {
                self.line = 0;
                self.rows -= 1;
                self.row = self.row.wrapping_add(self.stride);
            }
        }
    }
}

#[inline(always)]
fn prefetch(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is only a hint, and every x86-64 processor knows it.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// A factor's words along the sum, on the side of the rows.
#[derive(Clone, Copy)]
pub(super) struct Factor {
    pub data: *const u8,
    /// Bytes from row to row.
    pub row: usize,
    /// Bytes from word to word.
    pub word: usize,
    pub words: usize,
}

impl Factor {
    pub(super) const NONE: Self = Self {
        data: std::ptr::null(),
        row: 0,
        word: 0,
        words: 0,
    };
}

/// One block of the sum, for all rows of a task and the columns of a strip: one factor's words, then another's, and the part of the
/// panel that both are packed in.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub factors: [Factor; 2],
    pub panel: *const u32,
    /// What the sums are added to, with the number of elements from row to row; null for nothing.
    pub from: (*const f32, usize),
    pub to: Out,
    pub columns: usize,
    pub ahead: Ahead,
}

impl Block {
    /// # Safety
    /// There is such a row.
    #[inline(always)]
    pub(super) unsafe fn of_row(self, row: usize) -> Self {
        // SAFETY: the caller's word.
        unsafe {
            Self {
                factors: self.factors.map(|factor| Factor {
                    data: factor.data.wrapping_add(row * factor.row),
                    ..factor
                }),
                ..self.of_element(row, 0)
            }
        }
    }

    /// The same with the sums from this row and column on.
    ///
    /// # Safety
    /// There is such an element.
    #[inline(always)]
    pub(super) unsafe fn of_element(self, row: usize, column: usize) -> Self {
        // SAFETY: the caller's word.
        unsafe {
            Self {
                from: match self.from.0.is_null() {
                    true => self.from,
                    false => (self.from.0.add(row * self.from.1 + column), self.from.1),
                },
                to: self.to.at(row, column),
                ..self
            }
        }
    }
}
