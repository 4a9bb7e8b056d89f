//! `{% generation %}` blocks: which bytes of a rendered text come from inside them.
//!
//! Enters: a text with a private character at each end of a block. Leaves: the text without them, and the ranges. The
//! characters are chosen so that the text has them from nowhere else: no row can forge a mark.

use std::collections::BTreeSet;
use std::ops::Range;

/// A rendered text, and which bytes of it the template marks as learned, in order and apart from each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    pub generated: Vec<Range<usize>>,
}

/// Two characters that stand at the start and at the end of a generation block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Marks {
    start: char,
    end: char,
}

impl Marks {
    /// Two marks that the text does not have, of Unicode's last private plane.
    pub(super) fn absent_from(text: &str) -> Self {
        let plane = '\u{100000}'..='\u{10fffd}';
        let used: BTreeSet<char> = text.chars().filter(|c| plane.contains(c)).collect();
        let mut free = plane.filter(|mark| !used.contains(mark));
        let start = free.next().unwrap_or('\u{100000}');
        let end = free.next().unwrap_or('\u{100001}');
        Self { start, end }
    }

    pub(super) fn pair(self) -> (char, char) {
        (self.start, self.end)
    }

    /// The text without its marks, and what they enclose. None where they do not pair, as when a template reverses
    /// what is inside.
    pub(super) fn take_out(self, marked: &str) -> Option<Rendered> {
        let mut text = String::with_capacity(marked.len());
        let mut generated: Vec<Range<usize>> = Vec::new();
        let (mut depth, mut outermost) = (0_usize, 0);
        for c in marked.chars() {
            if c == self.start {
                if depth == 0 {
                    outermost = text.len();
                }
                depth += 1;
            } else if c == self.end {
                depth = depth.checked_sub(1)?;
                match generated.last_mut() {
                    _ if depth > 0 || outermost == text.len() => {}
                    Some(last) if last.end == outermost => last.end = text.len(),
                    _ => generated.push(outermost..text.len()),
                }
            } else {
                text.push(c);
            }
        }
        (depth == 0).then_some(Rendered { text, generated })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_none_that_the_text_has() {
        let text = "a\u{100000}b\u{100002}";
        let marks = Marks::absent_from(text);
        assert!(!text.contains(marks.start) && !text.contains(marks.end));
        assert_ne!(marks.start, marks.end);
    }

    #[test]
    fn ranges_are_of_the_text_without_marks() {
        let marks = Marks {
            start: '[',
            end: ']',
        };
        let found = |marked: &str| {
            marks
                .take_out(marked)
                .map(|found| (found.text, found.generated))
        };
        let text = |text: &str| text.to_owned();
        assert_eq!(found("ab"), Some((text("ab"), vec![])));
        assert_eq!(found("a[é]c[d]"), Some((text("aécd"), vec![1..3, 4..5])));
        assert_eq!(
            found("[a[b]c][d]e[]f[g]"),
            Some((text("abcdefg"), vec![0..4, 6..7]))
        );
        assert_eq!(found("]a["), None);
        assert_eq!(found("[a"), None);
    }
}
