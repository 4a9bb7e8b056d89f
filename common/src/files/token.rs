//! The token that workers show the coordinator, as both read it from a file.

use std::io;
use std::path::Path;

/// The token in a file, without the white space around it. None where the file is empty.
pub fn read_token(path: &Path) -> io::Result<Option<String>> {
    let text = std::fs::read_to_string(path)?;
    let token = text.trim();
    Ok((!token.is_empty()).then(|| token.to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_what_stands_between_white_space() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        assert!(read_token(&path).is_err());
        std::fs::write(&path, " secret\n").unwrap();
        assert_eq!(read_token(&path).unwrap().as_deref(), Some("secret"));
        std::fs::write(&path, " \n").unwrap();
        assert_eq!(read_token(&path).unwrap(), None);
    }
}
