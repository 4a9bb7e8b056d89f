//! Which proxy stands between this machine and a host.
//!
//! In: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, also in lower case. Out: the proxy of an address, or none. A proxy
//! is never named in a message: its address may hold a password.

use ureq::Proxy;
use ureq::http::Uri;

use super::HubError;

/// The proxies of this machine.
#[derive(Clone, Default)]
pub(super) struct Proxies {
    https: Option<Proxy>,
    http: Option<Proxy>,
    /// Hosts that are reached without a proxy.
    exempt: Vec<String>,
}

impl Proxies {
    pub(super) fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let value = |name: &str| {
            let found = get(&name.to_ascii_lowercase()).or_else(|| get(name));
            found.filter(|value| !value.trim().is_empty())
        };
        let proxy = |name: &'static str| -> Result<Option<Proxy>, HubError> {
            let found = [name, "ALL_PROXY"]
                .iter()
                .find_map(|name| Some((*name, value(name)?)));
            let Some((variable, address)) = found else {
                return Ok(None);
            };
            match Proxy::new(address.trim()) {
                Ok(proxy) if is_supported(&proxy) => Ok(Some(proxy)),
                _ => Err(HubError::InvalidVariable {
                    variable: if variable == name { name } else { "ALL_PROXY" },
                    reason: "it is not the http:// or https:// address of a proxy".to_owned(),
                }),
            }
        };
        let exempt = value("NO_PROXY").unwrap_or_default();
        let exempt = exempt.split([',', ' ']).map(str::trim);
        Ok(Self {
            https: proxy("HTTPS_PROXY")?,
            http: proxy("HTTP_PROXY")?,
            exempt: exempt
                .filter(|entry| !entry.is_empty())
                .map(str::to_ascii_lowercase)
                .collect(),
        })
    }

    /// The proxy by which the address is reached. This machine itself is reached without one.
    pub(super) fn of(&self, uri: &Uri) -> Option<Proxy> {
        let host = uri.host()?.to_ascii_lowercase();
        let is_own = host == "localhost" || host.starts_with("127.") || host == "[::1]";
        let port = uri.port_u16();
        if is_own
            || self
                .exempt
                .iter()
                .any(|entry| is_exempt(entry, &host, port))
        {
            return None;
        }
        match uri.scheme_str() {
            Some("https") => self.https.clone(),
            _ => self.http.clone(),
        }
    }
}

impl std::fmt::Debug for Proxies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxies")
            .field("https", &self.https.is_some())
            .field("http", &self.http.is_some())
            .field("exempt", &self.exempt)
            .finish()
    }
}

fn is_supported(proxy: &Proxy) -> bool {
    matches!(
        proxy.protocol(),
        ureq::ProxyProtocol::Http | ureq::ProxyProtocol::Https
    )
}

/// Whether an entry of NO_PROXY names the host, or a domain that it is in.
fn is_exempt(entry: &str, host: &str, port: Option<u16>) -> bool {
    if entry == "*" {
        return true;
    }
    let (entry, entry_port) = match entry.rsplit_once(':') {
        Some((name, digits)) if !name.contains(':') => match digits.parse::<u16>() {
            Ok(number) => (name, Some(number)),
            Err(_) => (entry, None),
        },
        _ => (entry, None),
    };
    if entry_port.is_some() && entry_port != port {
        return false;
    }
    let domain = entry.trim_start_matches("*.").trim_start_matches('.');
    host == domain
        || host
            .strip_suffix(domain)
            .is_some_and(|rest| rest.ends_with('.'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn proxies(pairs: &[(&str, &str)]) -> Proxies {
        Proxies::read(&|name| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
        .unwrap()
    }

    fn of(proxies: &Proxies, address: &str) -> Option<String> {
        let proxy = proxies.of(&address.parse().unwrap());
        proxy.map(|proxy| proxy.host().to_owned())
    }

    #[test]
    fn the_proxy_is_that_of_the_scheme() {
        let both = proxies(&[("HTTPS_PROXY", "http://a:1"), ("http_proxy", "b:2")]);
        assert_eq!(of(&both, "https://huggingface.co").as_deref(), Some("a"));
        assert_eq!(of(&both, "http://huggingface.co").as_deref(), Some("b"));
        let all = proxies(&[("ALL_PROXY", "http://c:3")]);
        assert_eq!(of(&all, "https://huggingface.co").as_deref(), Some("c"));
        assert_eq!(of(&all, "http://127.0.0.1:80"), None);
    }

    #[test]
    fn hosts_in_no_proxy_are_reached_directly() {
        for (entry, is_direct) in [
            ("huggingface.co", true),
            (".huggingface.co", true),
            ("*.example.org, huggingface.co", true),
            ("*", true),
            ("huggingface.co:443", false),
            ("face.co", false),
            ("example.org", false),
        ] {
            let some = proxies(&[("HTTPS_PROXY", "http://a:1"), ("NO_PROXY", entry)]);
            let found = of(&some, "https://cdn.huggingface.co/x");
            assert_eq!(found.is_none(), is_direct, "{entry}");
        }
    }

    #[test]
    fn a_password_of_a_proxy_is_never_printed() {
        let some = proxies(&[("HTTPS_PROXY", "http://user:secret@a:1")]);
        assert!(!format!("{some:?}").contains("secret"));
        let error = Proxies::read(&|name| {
            (name == "HTTPS_PROXY").then(|| "socks5://user:secret@a:1".to_owned())
        })
        .unwrap_err();
        assert!(!format!("{error} {error:?}").contains("secret"));
    }
}
