//! Products of activations and weights: sums of `a · w` or `a · wᵀ` over any number of terms, several outputs side by
//! side, in one pass.
//!
//! In: factors in float32 or bfloat16. Out: float32 sums, rounded where the target is bfloat16. A LoRA update is a term
//! beside the frozen weight's, so its skinny factors travel with the large product. The sum of an output element runs
//! in one fixed order, whoever computes it: the same bits for any number of threads.

use super::element::Element;
use super::kernels;
use super::matrix::{Along, MatrixMut, Part, Start, Target, Term, View, Weights};
use common::instruction_set::InstructionSet;

/// Fills the parts' columns of the target.
pub fn product<E: Element>(target: Target, parts: &[Part<E>]) {
    product_with(InstructionSet::chosen(), target, parts);
}

/// [`product`] with other instructions.
fn product_with<E: Element>(set: InstructionSet, target: Target, parts: &[Part<E>]) {
    for part in parts {
        check(&target, part);
    }
    if target.rows == 0 {
        return;
    }
    kernels::product(set, target, parts);
}

/// `target = a · wᵀ` or `a · w`
pub fn multiply<'a, E: Element>(
    target: Target,
    a: View<'a, E>,
    w: impl Into<Weights<'a, E>>,
    along: Along,
) {
    let w = w.into();
    let part = Part {
        first: 0,
        start: Start::Zero,
        terms: vec![Term { a, w, along }],
    };
    product(target, &[part]);
}

/// `c = a · wᵀ` or `a · w`, or with `add` `c += ...`: a small product, on the calling thread alone.
///
/// The sum of an element runs in the same order as in [`product`]. Where the sum ends within a word of 32 bits, `a` has one
/// column more, of any finite numbers: nothing is copied then.
pub fn multiply_small<E: Element>(c: MatrixMut, add: bool, term: Term<E>) {
    let per_word = size_of::<u32>() / size_of::<E>();
    assert!(
        (c.rows, c.columns) == (term.a.rows, term.width())
            && term.a.columns == term.sum().next_multiple_of(per_word),
        "a product of {}x{} and {}x{} ({:?}) into {}x{}",
        term.a.rows,
        term.a.columns,
        term.w.rows(),
        term.w.columns(),
        term.along,
        c.rows,
        c.columns
    );
    if c.rows == 0 {
        return;
    }
    kernels::multiply_small(InstructionSet::chosen(), c, add, term);
}

/// `c = aᵀ · w`, or with `add` `c += aᵀ · w`, on all threads: the gradient of weights.
///
/// `a`, `[sum][rows of c]`, is the gradient of what the weights give, and `w`, `[sum][columns of c]`, is what they read.
pub fn multiply_turned<E: Element>(c: MatrixMut, add: bool, a: View<E>, w: View<E>) {
    turned_with(InstructionSet::chosen(), c, add, a, w);
}

/// [`multiply_turned`] with other instructions.
fn turned_with<E: Element>(set: InstructionSet, c: MatrixMut, add: bool, a: View<E>, w: View<E>) {
    check_turned(&c, a, w);
    if c.rows > 0 {
        kernels::multiply_turned(set, c, add, a, w);
    }
}

/// Computes a small [`multiply_turned`] on the calling thread alone.
pub fn multiply_small_turned(c: MatrixMut, add: bool, a: View<f32>, w: View<f32>) {
    check_turned(&c, a, w);
    if c.rows > 0 {
        kernels::multiply_small_turned(InstructionSet::chosen(), c, add, a, w);
    }
}

fn check_turned<E>(c: &MatrixMut, a: View<E>, w: View<E>) {
    assert!(
        (c.rows, c.columns, a.rows) == (a.columns, w.columns, w.rows) && a.rows > 0,
        "a product of {}x{} turned and {}x{} into {}x{}",
        a.rows,
        a.columns,
        w.rows,
        w.columns,
        c.rows,
        c.columns
    );
}

fn check<E>(target: &Target, part: &Part<E>) {
    let width = part.width();
    assert!(
        part.first + width <= target.columns,
        "a product outside its target"
    );
    for term in &part.terms {
        assert!(
            term.width() == width && term.a.rows == target.rows && term.a.columns == term.sum(),
            "a product of {}x{} and {}x{} ({:?}) into {}x{width}",
            term.a.rows,
            term.a.columns,
            term.w.rows(),
            term.w.columns(),
            term.along,
            target.rows
        );
    }
    match part.start {
        Start::Zero => {}
        Start::Row(row) => assert_eq!(row.len(), width, "a bias of another width"),
        Start::Rows(rows) => assert!(
            part.first == 0 && width == target.columns && rows.len() == target.rows * width,
            "a residual of another shape"
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
