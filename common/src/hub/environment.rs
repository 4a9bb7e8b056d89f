//! What the environment says about the hub, read once: where it is, where its files are kept, who asks.
//!
//! In: a function that gives the value of a variable. Out: checked settings, or the variable that cannot be used. The
//! token can be sent, but neither printed nor logged.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::HubError;
use super::proxy::Proxies;
use super::token::Token;
use super::variables::Variables;
use crate::files::FileError;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Settings of the hub.
#[derive(Clone, Debug)]
pub struct Environment {
    pub(super) endpoint: String,
    pub(super) cache: PathBuf,
    pub(super) token: Option<Token>,
    /// A token was there, but HF_HUB_DISABLE_IMPLICIT_TOKEN forbids to use it unasked.
    pub(super) is_token_withheld: bool,
    /// The variable that forbids the network.
    pub(super) offline: Option<&'static str>,
    /// Most time between two pieces of a file.
    pub(super) download_timeout: Duration,
    /// Most time until an answer begins.
    pub(super) answer_timeout: Duration,
    pub(super) proxies: Proxies,
    /// File of the certificates to trust in place of the built-in ones.
    pub(super) certificates: Option<PathBuf>,
}

impl Environment {
    /// Reads the variables of this process.
    pub fn of_process() -> Result<Self, HubError> {
        Self::read(&|name| std::env::var(name).ok())
    }

    /// Reads the variables that `get` gives; an empty one counts as unset.
    pub fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let variables = Variables(get);
        let home = home(&variables)?;
        let hub_cache = variables
            .first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
            .map(|(name, value)| variables.path(name, &value))
            .transpose()?;
        let cache = match (hub_cache, &home) {
            (Some(cache), _) => cache,
            (None, Some(home)) => home.join("hub"),
            (None, None) => {
                return Err(HubError::InvalidVariable {
                    variable: "HF_HOME",
                    reason: "it is not set, and neither is HOME: set it to the folder for the hub's files".to_owned(),
                });
            }
        };
        let token = read_token(&variables, home.as_deref())?;
        let is_withheld = variables.is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN")? == Some(true);
        Ok(Self {
            endpoint: endpoint(&variables)?,
            cache,
            is_token_withheld: is_withheld && token.is_some(),
            token: token.filter(|_| !is_withheld),
            offline: offline(&variables)?,
            download_timeout: variables.seconds("HF_HUB_DOWNLOAD_TIMEOUT")?,
            answer_timeout: variables.seconds("HF_HUB_ETAG_TIMEOUT")?,
            proxies: Proxies::read(get)?,
            certificates: variables
                .first(&["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
                .map(|(name, value)| variables.path(name, &value))
                .transpose()?,
        })
    }

    /// Uses this token, for example `hub_token` of a job, whatever the environment says.
    pub fn with_token(mut self, secret: &str, origin: &str) -> Result<Self, HubError> {
        if let Some(token) = Token::new(secret, "HF_TOKEN", origin.to_owned())? {
            self.token = Some(token);
            self.is_token_withheld = false;
        }
        Ok(self)
    }

    /// Folder of the hub's files.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// The variable that forbids the network, if one does.
    pub fn offline(&self) -> Option<&'static str> {
        self.offline
    }
}

fn home(variables: &Variables) -> Result<Option<PathBuf>, HubError> {
    if let Some(home) = variables.get("HF_HOME") {
        return variables.path("HF_HOME", &home).map(Some);
    }
    if let Some(cache) = variables.get("XDG_CACHE_HOME") {
        let cache = variables.path("XDG_CACHE_HOME", &cache)?;
        return Ok(Some(cache.join("huggingface")));
    }
    let home = variables
        .get("HOME")
        .or_else(|| variables.get("USERPROFILE"));
    Ok(home.map(|home| Path::new(&home).join(".cache/huggingface")))
}

fn endpoint(variables: &Variables) -> Result<String, HubError> {
    let Some(value) = variables.get("HF_ENDPOINT") else {
        return Ok(DEFAULT_ENDPOINT.to_owned());
    };
    let value = value.trim().trim_end_matches('/');
    let invalid = |reason: &str| HubError::InvalidVariable {
        variable: "HF_ENDPOINT",
        reason: reason.to_owned(),
    };
    let host = value
        .strip_prefix("https://")
        .or_else(|| value.strip_prefix("http://"))
        .ok_or_else(|| invalid("it does not begin with https:// or http://"))?;
    if host.contains('@') {
        return Err(invalid("it may not hold a user or a password"));
    }
    match value.parse::<ureq::http::Uri>() {
        Ok(uri) if uri.host().is_some_and(|host| !host.is_empty()) && uri.query().is_none() => {
            Ok(value.to_owned())
        }
        _ => Err(invalid("it is no web address")),
    }
}

/// The first of the switches that is set decides, as in Python.
fn offline(variables: &Variables) -> Result<Option<&'static str>, HubError> {
    for name in [
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_DATASETS_OFFLINE",
    ] {
        if let Some(is_on) = variables.is_on(name)? {
            return Ok(is_on.then_some(name));
        }
    }
    Ok(None)
}

fn read_token(variables: &Variables, home: Option<&Path>) -> Result<Option<Token>, HubError> {
    if let Some((name, value)) = variables.first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]) {
        return Token::new(&value, name, name.to_owned());
    }
    let named = variables.get("HF_TOKEN_PATH");
    let path = match named {
        Some(path) => Some(variables.path("HF_TOKEN_PATH", &path)?),
        None => home.map(|home| home.join("token")),
    };
    let Some(path) = path else {
        return Ok(None);
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => Token::new(&text, "HF_TOKEN_PATH", path.display().to_string()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FileError::io("read", &path)(error).into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Environment, HubError> {
        Environment::read(&|name| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        for (pairs, cache) in [
            (vec![("HOME", "/h")], "/h/.cache/huggingface/hub"),
            (
                vec![("HOME", "/h"), ("XDG_CACHE_HOME", "/x")],
                "/x/huggingface/hub",
            ),
            (vec![("HOME", "/h"), ("HF_HOME", "~/hf")], "/h/hf/hub"),
            (vec![("HF_HOME", "${DISK}/hf"), ("DISK", "/d")], "/d/hf/hub"),
            (
                vec![("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")],
                "/old",
            ),
            (
                vec![("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")],
                "/new",
            ),
            (
                vec![("HOME", "/h"), ("HF_HUB_CACHE", "")],
                "/h/.cache/huggingface/hub",
            ),
        ] {
            assert_eq!(read(&pairs).unwrap().cache(), Path::new(cache), "{pairs:?}");
        }
        let message = read(&[]).unwrap_err().to_string();
        assert!(message.contains("HF_HOME"), "{message}");
    }

    #[test]
    fn the_token_is_taken_in_pythons_order_and_trimmed() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), " hf_home\n").unwrap();
        let other = home.path().join("other");
        std::fs::write(&other, "hf_other\n").unwrap();
        let home = home.path().to_str().unwrap();
        let base = ("HF_HOME", home);
        let other = ("HF_TOKEN_PATH", other.to_str().unwrap());
        for (pairs, secret) in [
            (vec![base], "hf_home"),
            (vec![base, other], "hf_other"),
            (
                vec![base, other, ("HUGGING_FACE_HUB_TOKEN", "hf_old")],
                "hf_old",
            ),
            (
                vec![
                    base,
                    ("HUGGING_FACE_HUB_TOKEN", "hf_old"),
                    ("HF_TOKEN", "hf_new "),
                ],
                "hf_new",
            ),
        ] {
            let token = read(&pairs).unwrap().token.unwrap();
            assert_eq!(token.header(), format!("Bearer {secret}"));
        }
        let withheld = read(&[base, ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).unwrap();
        assert!(withheld.token.is_none() && withheld.is_token_withheld);
        let explicit = withheld.with_token("hf_job", "hub_token").unwrap();
        assert_eq!(explicit.token.unwrap().header(), "Bearer hf_job");
    }

    #[test]
    fn the_token_is_never_printed() {
        let environment = read(&[("HOME", "/h"), ("HF_TOKEN", "hf_secret")]).unwrap();
        let printed = format!("{environment:?}");
        assert!(printed.contains("from HF_TOKEN"), "{printed}");
        assert!(!printed.contains("hf_secret"), "{printed}");
        let error = read(&[("HOME", "/h"), ("HF_TOKEN", "hf_secret\r\nX: y")]).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hf_secret"));
    }

    #[test]
    fn switches_are_read_as_python_reads_them_and_others_are_refused() {
        for (pairs, offline) in [
            (vec![("HF_HUB_OFFLINE", "yes")], Some("HF_HUB_OFFLINE")),
            (
                vec![("TRANSFORMERS_OFFLINE", "True")],
                Some("TRANSFORMERS_OFFLINE"),
            ),
            (
                vec![("HF_DATASETS_OFFLINE", "1")],
                Some("HF_DATASETS_OFFLINE"),
            ),
            (
                vec![("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")],
                None,
            ),
            (vec![], None),
        ] {
            let pairs = [pairs, vec![("HOME", "/h")]].concat();
            assert_eq!(read(&pairs).unwrap().offline(), offline, "{pairs:?}");
        }
        for pair in [
            ("HF_HUB_OFFLINE", "maybe"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "0"),
            ("HF_HUB_ETAG_TIMEOUT", "soon"),
            ("HF_ENDPOINT", "huggingface.co"),
            ("HF_ENDPOINT", "https://user:pass@mirror"),
            ("HF_ENDPOINT", "http://"),
            ("HTTPS_PROXY", "not a proxy"),
        ] {
            let message = read(&[("HOME", "/h"), pair]).unwrap_err().to_string();
            assert!(message.contains(pair.0), "{message}");
            assert!(!message.contains("pass@"), "{message}");
        }
    }

    #[test]
    fn an_endpoint_may_have_a_path_and_a_slash_at_its_end() {
        let pairs = [
            ("HOME", "/h"),
            ("HF_ENDPOINT", "http://127.0.0.1:8080/hub/"),
        ];
        assert_eq!(read(&pairs).unwrap().endpoint, "http://127.0.0.1:8080/hub");
    }
}
