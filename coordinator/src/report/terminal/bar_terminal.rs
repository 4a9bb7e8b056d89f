//! The terminal as a progress bar needs it: moves of the cursor and text, collected into one picture.
//!
//! A picture is handed over whole, to whoever writes it later or leaves it out. Nothing here waits for the terminal.

use std::fmt::{self, Write as _};
use std::io;
use std::sync::{Mutex, PoisonError};

use common::streams::Stream;
use indicatif::TermLike;

/// A terminal that understands ECMA-48 (`ESC [ ...`), as all do that are in use.
pub struct BarTerminal {
    stream: Stream,
    picture: Mutex<String>,
}

impl BarTerminal {
    pub fn new(stream: Stream) -> Self {
        Self {
            stream,
            picture: Mutex::default(),
        }
    }

    fn add(&self, part: fmt::Arguments<'_>) -> io::Result<()> {
        let mut picture = self.picture.lock().unwrap_or_else(PoisonError::into_inner);
        picture.write_fmt(part).map_err(io::Error::other)
    }

    fn move_cursor(&self, by: usize, direction: char) -> io::Result<()> {
        match by {
            0 => Ok(()),
            by => self.add(format_args!("\x1b[{by}{direction}")),
        }
    }
}

impl fmt::Debug for BarTerminal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BarTerminal")
    }
}

impl TermLike for BarTerminal {
    /// A terminal writes `^C` behind the bar: what is as wide as the line would wrap then, and not be cleared as a whole.
    fn width(&self) -> u16 {
        console::Term::stdout().size().1.saturating_sub(3)
    }

    fn height(&self) -> u16 {
        console::Term::stdout().size().0
    }

    fn move_cursor_up(&self, lines: usize) -> io::Result<()> {
        self.move_cursor(lines, 'A')
    }

    fn move_cursor_down(&self, lines: usize) -> io::Result<()> {
        self.move_cursor(lines, 'B')
    }

    fn move_cursor_right(&self, columns: usize) -> io::Result<()> {
        self.move_cursor(columns, 'C')
    }

    fn move_cursor_left(&self, columns: usize) -> io::Result<()> {
        self.move_cursor(columns, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.add(format_args!("{text}\n"))
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.add(format_args!("{text}"))
    }

    fn clear_line(&self) -> io::Result<()> {
        self.add(format_args!("\r\x1b[2K"))
    }

    fn flush(&self) -> io::Result<()> {
        let mut picture = self.picture.lock().unwrap_or_else(PoisonError::into_inner);
        self.stream.draw(std::mem::take(&mut *picture).as_bytes());
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    struct Pieces(mpsc::Sender<String>);

    impl Write for Pieces {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let piece = String::from_utf8_lossy(bytes).into_owned();
            let _ = self.0.send(piece);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_picture_is_written_in_one_piece() {
        let (pieces, written) = mpsc::channel();
        let stream = Stream::over(Pieces(pieces));
        let terminal = BarTerminal::new(stream.clone());
        terminal.clear_line().unwrap();
        terminal.move_cursor_up(0).unwrap();
        terminal.move_cursor_up(2).unwrap();
        terminal.write_str("3/10").unwrap();
        terminal.flush().unwrap();
        assert!(stream.finish(Duration::from_secs(60)));
        let written: Vec<String> = written.try_iter().collect();
        assert_eq!(written, ["\r\x1b[2K\x1b[2A3/10"]);
    }
}
