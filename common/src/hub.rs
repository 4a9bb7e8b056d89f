//! Ids on the Hugging Face hub where a folder is asked for: nothing is fetched, but it is said how to.

use std::path::Path;

/// Why there is no folder here, and what to do where the path may be an id.
pub fn no_such_folder(path: &Path) -> String {
    let Some(id) = hub_id(path) else {
        return "there is no such folder".to_owned();
    };
    let name = id.rsplit('/').next().unwrap_or(&id);
    format!(
        "there is no such folder; if it is an id on the Hugging Face hub, those are not read yet: download it with `hf download {id} --local-dir models/{name}` and name that folder"
    )
}

/// `owner/name`, also at the end of a web address.
fn hub_id(path: &Path) -> Option<String> {
    let text = path.to_str()?;
    let (text, is_address) = match text.split_once("://").or(text.split_once(":/")) {
        // Of hf://owner/name all is the id; else the host comes first.
        Some(("hf", rest)) => (rest, true),
        Some((_, rest)) => (rest.split_once('/')?.1, true),
        None => (text, false),
    };
    let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty()).collect();
    let is_word = |part: &&str| {
        !part.starts_with(['.', '~', '-'])
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    let [owner, name, ..] = parts[..] else {
        return None;
    };
    let is_id =
        is_address || (parts.len() == 2 && !text.starts_with('/') && !Path::new(owner).is_dir());
    (is_id && [owner, name].iter().all(is_word)).then(|| format!("{owner}/{name}"))
}
