//! What the user sees on the terminal.
