//! Standard output and standard error for a program that must not wait for whoever reads them.
//!
//! In: text, a piece at a time. Out: the same pieces in the same order, written by a thread of its own. Where nobody reads
//! (a full pipe, a stopped terminal) or nothing can be written (a full disk), what does not fit into a bounded queue is
//! dropped, and where it is missing a line says how much. Nobody who writes here ever waits, and no error comes back.
//! [`print`] is the other way: for a text that the user asked for, which is waited for and whose errors come back.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long the last words may take to be read.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);
/// The same where somebody waits for the end.
const HURRIED_FLUSH_TIMEOUT: Duration = Duration::from_millis(200);
/// What may wait for the reader; a single piece may be larger.
const MAX_WAITING_BYTES: usize = 1 << 20;
/// What may wait before pictures are left out, so that there is room for lines.
const MAX_WAITING_BEFORE_A_PICTURE: usize = 16 << 10;
/// Between two attempts, where the other end was set not to block.
const FULL_PAUSE: Duration = Duration::from_millis(20);

/// Standard output.
pub fn stdout() -> Stream {
    static STREAM: OnceLock<Stream> = OnceLock::new();
    STREAM.get_or_init(|| Stream::over(io::stdout())).clone()
}

/// Standard error.
pub fn stderr() -> Stream {
    static STREAM: OnceLock<Stream> = OnceLock::new();
    STREAM.get_or_init(|| Stream::over(io::stderr())).clone()
}

/// Whether somebody asked this process to stop.
static IS_HURRIED: AtomicBool = AtomicBool::new(false);

/// The process was asked to stop: from now on its last words wait for a reader for a moment only.
pub fn hurry() {
    IS_HURRIED.store(true, Ordering::SeqCst);
}

/// Waits until both have been written, but not for long: the last words of the process.
pub fn finish() {
    let timeout = match IS_HURRIED.load(Ordering::SeqCst) {
        true => HURRIED_FLUSH_TIMEOUT,
        false => FLUSH_TIMEOUT,
    };
    let began = Instant::now();
    stdout().finish(timeout);
    stderr().finish(timeout.saturating_sub(began.elapsed()));
}

/// What the user asked for cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("standard output cannot be written: {0}")]
pub struct PrintError(#[from] io::Error);

/// Writes what the user asked for, such as a manual page or an answer, to standard output, however long the reader takes.
/// False where the reader has seen enough (`| head -1`), which is no error.
///
/// # Errors
/// It cannot be written, as on a full disk.
pub fn print(text: impl AsRef<[u8]>) -> Result<bool, PrintError> {
    print_to(&mut io::stdout().lock(), text.as_ref())
}

fn print_to(out: &mut impl Write, text: &[u8]) -> Result<bool, PrintError> {
    match out.write_all(text).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// One way out, shared by all who write there.
#[derive(Clone)]
pub struct Stream {
    shared: Arc<Shared>,
    /// Closes the queue when the last clone is dropped.
    _closing: Arc<Closing>,
}

struct Closing(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    pieces: VecDeque<Piece>,
    bytes: usize,
    /// A piece was taken out, and is not written yet.
    is_writing: bool,
    /// Every [`Stream`] is gone.
    is_closed: bool,
}

enum Piece {
    Text(Vec<u8>),
    /// Lines that were dropped here.
    Missing(u64),
}

impl Stream {
    /// Over any target, on a new thread that ends with the last clone of the stream.
    pub fn over(target: impl Write + Send + 'static) -> Self {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            changed: Condvar::new(),
        });
        let reading = shared.clone();
        std::thread::spawn(move || pass_on(&reading, target));
        let _closing = Arc::new(Closing(shared.clone()));
        Self { shared, _closing }
    }

    /// A line of its own.
    pub fn say(&self, line: &str) {
        self.put(format!("{line}\n").as_bytes());
    }

    /// A picture that the next one replaces, such as a progress bar: nobody misses it.
    pub fn draw(&self, picture: &[u8]) {
        let mut queue = self.shared.lock();
        if queue.bytes + picture.len() <= MAX_WAITING_BEFORE_A_PICTURE {
            queue.push(picture);
            self.shared.changed.notify_all();
        }
    }

    fn put(&self, bytes: &[u8]) {
        let mut queue = self.shared.lock();
        // However large it is, one piece alone is no backlog.
        if queue.bytes == 0 || queue.bytes + bytes.len() <= MAX_WAITING_BYTES {
            queue.push(bytes);
        } else {
            queue.miss(lines(bytes));
        }
        self.shared.changed.notify_all();
    }

    /// Waits until everything so far is written, but not for longer than `timeout`. Says whether it is.
    pub fn finish(&self, timeout: Duration) -> bool {
        let waits = |queue: &mut Queue| !queue.pieces.is_empty() || queue.is_writing;
        let queue = self.shared.lock();
        let waited = self
            .shared
            .changed
            .wait_timeout_while(queue, timeout, waits);
        match waited {
            Ok((_, result)) => !result.timed_out(),
            Err(_) => false,
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_all();
    }
}

impl Queue {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len();
        self.pieces.push_back(Piece::Text(bytes.to_vec()));
    }

    fn miss(&mut self, lines: u64) {
        match self.pieces.back_mut() {
            Some(Piece::Missing(before)) => *before += lines,
            _ => self.pieces.push_back(Piece::Missing(lines)),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece, or nothing once all is written and nobody is left who could write.
    fn next(&self) -> Option<Piece> {
        let mut queue = self.lock();
        queue.is_writing = false;
        self.changed.notify_all();
        let waits = |queue: &mut Queue| queue.pieces.is_empty() && !queue.is_closed;
        let mut queue = self
            .changed
            .wait_while(queue, waits)
            .unwrap_or_else(PoisonError::into_inner);
        let piece = queue.pieces.pop_front()?;
        if let Piece::Text(bytes) = &piece {
            queue.bytes -= bytes.len();
        }
        queue.is_writing = true;
        Some(piece)
    }
}

/// Writes until the stream is closed. What cannot be written is counted, and told once something can.
fn pass_on(shared: &Shared, mut target: impl Write) {
    let mut lost = 0;
    while let Some(piece) = shared.next() {
        let (text, more) = match piece {
            Piece::Text(bytes) => {
                let more = lines(&bytes);
                (bytes, more)
            }
            Piece::Missing(more) => {
                lost += more;
                (Vec::new(), 0)
            }
        };
        let told = match lost {
            0 => Vec::new(),
            lost => missing_line(lost),
        };
        match write(&mut target, &told).and_then(|()| write(&mut target, &text)) {
            Ok(()) => lost = 0,
            Err(_) => lost += more,
        }
    }
}

fn missing_line(lines: u64) -> Vec<u8> {
    let plural = if lines == 1 { " is" } else { "s are" };
    format!("[{lines} line{plural} missing here: nobody read them, or they could not be written]\n")
        .into_bytes()
}

fn write(target: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match target.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(FULL_PAUSE),
            Err(error) => return Err(error),
        }
    }
    loop {
        match target.flush() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(FULL_PAUSE),
            flushed => return flushed,
        }
    }
}

fn lines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Long enough on the busiest machine.
    const LONG: Duration = Duration::from_secs(60);

    /// Takes a piece only when it is let, and hands it over.
    struct Gate {
        lets: mpsc::Receiver<io::Result<()>>,
        taken: mpsc::Sender<String>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.lets.recv().unwrap_or(Ok(()))?;
            let text = String::from_utf8_lossy(bytes).into_owned();
            let _ = self.taken.send(text);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn gated() -> (Stream, mpsc::Sender<io::Result<()>>, mpsc::Receiver<String>) {
        let (lets, lets_here) = mpsc::channel();
        let (taken_there, taken) = mpsc::channel();
        let gate = Gate {
            lets: lets_here,
            taken: taken_there,
        };
        (Stream::over(gate), lets, taken)
    }

    #[test]
    fn whoever_writes_never_waits_and_what_is_missing_is_counted_where_it_is() {
        let (mut stream, lets, taken) = gated();
        let line = format!("{}\n", "x".repeat(1023));
        // The writer holds one piece, and takes no other in the midst of what follows.
        stream.write_all(b"the first\n").unwrap();
        while !stream.shared.lock().is_writing {
            std::thread::yield_now();
        }
        // Twice what may wait, while nobody reads.
        for _ in 0..2 * MAX_WAITING_BYTES / line.len() {
            stream.write_all(line.as_bytes()).unwrap();
        }
        assert!(!stream.finish(Duration::ZERO));
        drop(lets);
        assert!(stream.finish(LONG));
        stream.write_all(b"the last\n").unwrap();
        assert!(stream.finish(LONG));
        let got: Vec<String> = taken.try_iter().skip(1).collect();
        let whole = got.iter().filter(|text| **text == line).count();
        let missing = 2 * MAX_WAITING_BYTES / line.len() - whole;
        assert!(missing >= MAX_WAITING_BYTES / line.len() - 1, "{missing}");
        let told = format!("[{missing} lines are missing here");
        assert!(got[whole].starts_with(&told), "{}", got[whole]);
        assert_eq!(got[whole + 1..], ["the last\n"]);
    }

    #[test]
    fn a_full_disk_costs_lines_that_are_counted_once_there_is_room() {
        let (mut stream, lets, taken) = gated();
        for result in [
            Ok(()),
            Err(ErrorKind::StorageFull),
            Err(ErrorKind::StorageFull),
        ] {
            lets.send(result.map_err(io::Error::from)).unwrap();
        }
        drop(lets);
        for text in ["a\n", "b\n", "c\n", "d\n"] {
            stream.write_all(text.as_bytes()).unwrap();
            // A pause of the writer, so that each is a piece of its own.
            assert!(stream.finish(LONG));
        }
        let got: Vec<String> = taken.try_iter().collect();
        assert_eq!(got[0], "a\n");
        assert!(got[1].starts_with("[2 lines are missing here"), "{got:?}");
        assert_eq!(got[2..], ["d\n"]);
    }

    #[test]
    fn a_piece_larger_than_the_queue_is_not_lost_where_nothing_else_waits() {
        let (mut stream, lets, taken) = gated();
        let large = format!("{}\n", "x".repeat(2 * MAX_WAITING_BYTES));
        for text in [&large, "dropped\n"] {
            stream.write_all(text.as_bytes()).unwrap();
        }
        drop(lets);
        assert!(stream.finish(LONG));
        let got: Vec<String> = taken.try_iter().collect();
        assert!(got.first() == Some(&large), "the large one is missing");
    }

    #[test]
    fn a_text_that_cannot_be_printed_is_an_error_unless_its_reader_has_seen_enough() {
        struct Broken(ErrorKind);
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(self.0.into())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut sound = Vec::new();
        assert!(print_to(&mut sound, b"a page\n").unwrap());
        assert_eq!(sound, b"a page\n");
        assert!(!print_to(&mut Broken(ErrorKind::BrokenPipe), b"a page\n").unwrap());
        let error = print_to(&mut Broken(ErrorKind::StorageFull), b"a page\n").unwrap_err();
        let said = error.to_string();
        assert!(
            said.starts_with("standard output cannot be written: "),
            "{said}"
        );
    }

    #[test]
    fn pictures_give_way_to_lines() {
        let (mut stream, lets, taken) = gated();
        for _ in 0..100 {
            stream.draw(&[b'.'; 1 << 10]);
        }
        stream.write_all(b"a line\n").unwrap();
        drop(lets);
        assert!(stream.finish(LONG));
        let got: Vec<String> = taken.try_iter().collect();
        assert!(got.len() < 20, "{}", got.len());
        assert_eq!(
            got.last().unwrap(),
            "a line\n",
            "and nothing is said of pictures"
        );
    }

    #[test]
    fn the_thread_ends_with_the_last_stream() {
        let (stream, lets, taken) = gated();
        drop(lets);
        drop(stream.clone());
        let mut stream = stream;
        stream.write_all(b"the last words\n").unwrap();
        drop(stream);
        let got: Vec<String> = taken.iter().collect();
        assert_eq!(got, ["the last words\n"]);
    }
}
