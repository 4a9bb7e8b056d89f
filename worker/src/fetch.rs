//! Model and state files: found on this machine or fetched, always verified.
