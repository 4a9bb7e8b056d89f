//! What an object is once it is here.

use std::path::PathBuf;

/// An object, on this disk now.
pub struct Fetched {
    pub path: PathBuf,
    /// Its address.
    pub name: String,
    pub version: String,
    /// What the user should know of it.
    pub notice: Option<String>,
}
