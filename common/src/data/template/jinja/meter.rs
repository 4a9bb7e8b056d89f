//! What one rendering may use: steps, and bytes held at a time.
//!
//! Templates are code of somebody else's making. All that they can build counts itself here, on the thread that renders,
//! and stops counting when it is dropped.

use std::cell::Cell;

use super::failure::{Failure, Reason, Result};

/// Steps for one conversation: a value looked at, or [`BYTES_PER_STEP`] bytes copied (a long one takes about a million).
const MAX_STEPS: u64 = 10_000_000;

/// Bytes of what is given for which there is another step: a long row takes longer.
const BYTES_PER_MORE_STEP: u64 = 4;

const BYTES_PER_STEP: usize = 1024;

/// Bytes that a template may hold beside what it is given.
pub const MAX_BYTES: usize = 256 << 20;

/// Of the thread's stack, in bytes (threads have 2 MiB at least).
const MAX_STACK_BYTES: usize = 1 << 20;

struct Meter {
    steps: Cell<u64>,
    held: Cell<usize>,
    limit: Cell<usize>,
    stack_start: Cell<usize>,
}

thread_local! {
    static METER: Meter = const {
        Meter {
            steps: Cell::new(u64::MAX),
            held: Cell::new(0),
            limit: Cell::new(usize::MAX),
            stack_start: Cell::new(0),
        }
    };
}

/// Runs `render` within the bounds of one rendering.
pub fn metered<T>(render: impl FnOnce() -> T) -> T {
    METER.with(|meter| {
        let given = meter.held.get() as u64;
        meter.steps.set(MAX_STEPS + given / BYTES_PER_MORE_STEP);
        meter.limit.set(meter.held.get().saturating_add(MAX_BYTES));
        meter.stack_start.set(stack_address());
    });
    let result = render();
    METER.with(|meter| {
        meter.steps.set(u64::MAX);
        meter.limit.set(usize::MAX);
        meter.stack_start.set(0);
    });
    result
}

/// Counts steps.
pub fn spend(steps: usize) -> Result<()> {
    METER.with(|meter| match meter.steps.get().checked_sub(steps as u64) {
        Some(left) => {
            meter.steps.set(left);
            Ok(())
        }
        None => {
            meter.steps.set(0);
            Err(Failure::new(Reason::Endless))
        }
    })
}

/// Says before they are made whether so many bytes more may be held, and counts the steps of writing them.
pub fn reserve(bytes: usize) -> Result<()> {
    let fits = METER.with(|meter| meter.held.get().saturating_add(bytes) <= meter.limit.get());
    if !fits {
        return Err(Failure::new(Reason::TooLarge));
    }
    spend(bytes / BYTES_PER_STEP)
}

/// Says whether the stack has room for one more level.
pub fn descend() -> Result<()> {
    let start = METER.with(|meter| meter.stack_start.get());
    if start != 0 && start.abs_diff(stack_address()) > MAX_STACK_BYTES {
        return super::failure::fail("it is nested too deep, or calls itself without an end");
    }
    Ok(())
}

fn stack_address() -> usize {
    let here = 0_u8;
    std::hint::black_box(&raw const here) as usize
}

/// Bytes that are held as long as this lives.
#[derive(Debug)]
pub struct Held(usize);

impl Held {
    pub fn new(bytes: usize) -> Self {
        let _ = METER.try_with(|meter| meter.held.set(meter.held.get().saturating_add(bytes)));
        Self(bytes)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = METER.try_with(|meter| meter.held.set(meter.held.get().saturating_sub(self.0)));
    }
}
