//! Shows how far the preparation of a run is: a bar on a terminal, a line every so often where there is none.
//!
//! Short preparations are not shown at all. The work is never waited for, nor does it wait for this.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use common::progress::Progress;
use common::streams;
use indicatif::{ProgressBar, ProgressStyle};

use super::bar_target;
use super::progress::bar_signs;
use super::screen::Screen;

/// Time between two looks at the work.
const LOOK: Duration = Duration::from_millis(100);
/// Time before a bar is shown: what is done sooner is not shown at all.
const BAR_AFTER: Duration = Duration::from_millis(500);
/// Time between two lines, and before the first one.
const PREPARATION_LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Does the work, and shows meanwhile how far it is.
pub fn showing<T>(progress: &Progress, work: impl FnOnce() -> T) -> T {
    let screen = Screen::of_stdout();
    let (working, done) = channel::<()>();
    let watched = progress.clone();
    let shown = std::thread::spawn(move || match screen {
        Some(screen) => draw(&watched, &done, &screen),
        None => tell(&watched, &done),
    });
    let result = work();
    drop(working);
    // It does nothing but look at the clock: its end is near.
    let _ = shown.join();
    result
}

/// Whether the work went on for so long.
fn goes_on(done: &Receiver<()>, time: Duration) -> bool {
    matches!(done.recv_timeout(time), Err(RecvTimeoutError::Timeout))
}

fn draw(progress: &Progress, done: &Receiver<()>, screen: &Screen) {
    if !goes_on(done, BAR_AFTER) {
        return;
    }
    let bar = ProgressBar::with_draw_target(Some(100), bar_target());
    bar.set_style(
        ProgressStyle::with_template("{bar:12} {wide_msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars(bar_signs(screen.style())),
    );
    loop {
        let now = progress.now();
        bar.set_position(now.percent.unwrap_or(0));
        bar.set_message(format!("preparing: {now}"));
        if !goes_on(done, LOOK) {
            return bar.finish_and_clear();
        }
    }
}

fn tell(progress: &Progress, done: &Receiver<()>) {
    while goes_on(done, PREPARATION_LINE_INTERVAL) {
        streams::stdout().say(&format!("preparing: {}", progress.now()));
    }
}
