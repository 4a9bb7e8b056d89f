//! Credentials of Amazon's own programs: a profile of `~/.aws/credentials` and `~/.aws/config`.
//!
//! In: the variables, and the two files. Out: the keys and the region of the profile, as far as it has them; or what to do where
//! a program or a login gives its keys. Nothing here asks anyone.

use std::io::{ErrorKind, Read};
use std::path::PathBuf;

use super::error::StoreError;

const MAX_FILE_BYTES: u64 = 1 << 20;
const DEFAULT: &str = "default";

/// Ways by which a profile has keys that are not in it.
const ELSEWHERE: [&str; 6] = [
    "sso_session",
    "sso_start_url",
    "role_arn",
    "credential_process",
    "login_session",
    "web_identity_token_file",
];

/// Keys of a profile that lead elsewhere than to Amazon.
const NOT_FOLLOWED: [&str; 2] = ["endpoint_url", "services"];
/// Keys whose text goes into headers.
const SENT_AS_IT_IS: [&str; 3] = ["aws_access_key_id", "aws_session_token", "region"];

/// What a profile says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Profile {
    pub access_key_id: Option<String>,
    pub secret_access_key: Option<String>,
    pub session_token: Option<String>,
    pub region: Option<String>,
}

/// Reads the profile that AWS_PROFILE names, or the default one. Only one that is named has to be there.
pub fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Profile, StoreError> {
    let named = get("AWS_PROFILE");
    let name = named.as_deref().unwrap_or(DEFAULT);
    let mut found: Option<Vec<(String, String)>> = None;
    for (variable, usual) in [
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials"),
        ("AWS_CONFIG_FILE", "config"),
    ] {
        let home = || Some(PathBuf::from(get("HOME")?).join(".aws").join(usual));
        let Some(path) = get(variable).map(PathBuf::from).or_else(home) else {
            continue;
        };
        let mut text = String::new();
        let read = std::fs::File::open(&path)
            .and_then(|file| file.take(MAX_FILE_BYTES).read_to_string(&mut text));
        match read {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => {
                let told = format!("cannot read {}: {error}", path.display());
                return Err(StoreError::Settings(told));
            }
            Ok(_) => {}
        }
        if let Some(pairs) = section(&text, name) {
            found.get_or_insert_default().extend(pairs);
        }
    }
    let Some(pairs) = found else {
        return match named {
            None => Ok(Profile::default()),
            Some(named) => Err(StoreError::Settings(format!(
                "AWS_PROFILE={named}: neither ~/.aws/credentials nor ~/.aws/config has this profile"
            ))),
        };
    };
    profile(&pairs, name, named.is_some())
}

fn profile(pairs: &[(String, String)], name: &str, is_named: bool) -> Result<Profile, StoreError> {
    // The file of credentials comes first, and counts.
    let value = |key: &str| {
        let found = pairs.iter().find(|(known, _)| known == key);
        found.map(|(_, value)| value.clone())
    };
    let profile = Profile {
        access_key_id: value("aws_access_key_id"),
        secret_access_key: value("aws_secret_access_key"),
        session_token: value("aws_session_token"),
        region: value("region"),
    };
    for (key, value) in pairs {
        if SENT_AS_IT_IS.contains(&key.as_str()) && !is_printable(value) {
            return Err(StoreError::Settings(format!(
                "the profile {name}: its {key} has characters that are not printable ASCII"
            )));
        }
    }
    if let Some(key) = NOT_FOLLOWED.iter().find(|key| value(key).is_some()) {
        return Err(StoreError::Settings(format!(
            "the profile {name} has {key}, which is not followed here: set AWS_ENDPOINT_URL, and the profile's keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )));
    }
    let elsewhere = ELSEWHERE.iter().find(|key| value(key).is_some());
    match elsewhere {
        Some(key) if profile.access_key_id.is_none() => Err(StoreError::Settings(format!(
            "the profile {name} has its keys by {key}, which is not followed here: run `eval \"$(aws configure export-credentials --profile {name} --format env)\"` first"
        ))),
        None if profile.access_key_id.is_none() && is_named => Err(StoreError::Settings(format!(
            "the profile {name} has no aws_access_key_id: run `aws configure --profile {name}`, or unset AWS_PROFILE"
        ))),
        _ => Ok(profile),
    }
}

/// Whether a text can be sent in a header.
pub fn is_printable(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_graphic() || c == ' ')
}

/// The lines of a profile: `[name]`, or in the file of settings `[profile name]`.
fn section(text: &str, name: &str) -> Option<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    let (mut is_inside, mut is_found) = (false, false);
    for line in text.lines() {
        // Indented lines belong to the key above them, which is none of ours.
        if line.starts_with([' ', '\t', '#', ';']) {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            let header = header.split(']').next().unwrap_or_default().trim();
            let header = header.strip_prefix("profile ").unwrap_or(header).trim();
            is_inside = header == name;
            is_found |= is_inside;
        } else if let (true, Some((key, value))) = (is_inside, line.split_once('=')) {
            pairs.push((key.trim().to_lowercase(), value.trim().to_owned()));
        }
    }
    is_found.then_some(pairs)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn check(credentials: &str, config: &str, named: Option<&str>) -> Result<Profile, String> {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join(".aws");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("credentials"), credentials).unwrap();
        std::fs::write(folder.join("config"), config).unwrap();
        let get = |name: &str| match name {
            "HOME" => home.path().to_str().map(str::to_owned),
            "AWS_PROFILE" => named.map(str::to_owned),
            _ => None,
        };
        read(&get).map_err(|error| error.to_string())
    }

    const KEYS: &str = "# ours\n[default]\naws_access_key_id = AKIA\naws_secret_access_key=s=1\n[work]\naws_access_key_id = OTHER\naws_secret_access_key = x\n";

    #[test]
    fn a_profile_is_read_from_both_files() {
        let config = "[default]\nregion = eu-west-1\ns3 =\n  region = nowhere\n[profile work]\nregion=us-west-2\n";
        let found = check(KEYS, config, None).unwrap();
        assert_eq!(found.access_key_id.as_deref(), Some("AKIA"));
        assert_eq!(found.secret_access_key.as_deref(), Some("s=1"));
        assert_eq!(found.region.as_deref(), Some("eu-west-1"));
        let work = check(KEYS, config, Some("work")).unwrap();
        assert_eq!(work.access_key_id.as_deref(), Some("OTHER"));
        assert_eq!(work.region.as_deref(), Some("us-west-2"));
    }

    #[test]
    fn without_a_profile_there_are_no_credentials_and_a_named_one_must_be_there() {
        assert_eq!(check("", "", None).unwrap(), Profile::default());
        let error = check(KEYS, "", Some("home")).unwrap_err();
        assert!(error.contains("AWS_PROFILE=home"), "{error}");
        let error = check("", "[profile bare]\nregion=x\n", Some("bare")).unwrap_err();
        assert!(error.contains("aws configure --profile bare"), "{error}");
    }

    #[test]
    fn a_profile_whose_keys_are_elsewhere_says_how_to_get_them() {
        let config = "[profile login]\nsso_session = corp\nregion = x\n";
        let error = check(KEYS, config, Some("login")).unwrap_err();
        assert!(
            error.contains("sso_session") && error.contains("export-credentials --profile login"),
            "{error}"
        );
    }
}
