//! Addresses in object stores: `s3://bucket/key`, `gs://bucket/key`, `az://container/key` and their kin.
//!
//! In: what a user wrote. Out: the store, the bucket and the key, as they are written: nothing in them is decoded, and a `?` or
//! `#` is a character of the key.

/// A kind of object stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// S3, and what speaks its protocol.
    Amazon,
    Google,
    Azure,
}

impl Service {
    /// The store that a scheme means.
    pub fn of_scheme(scheme: &str) -> Option<Self> {
        match scheme {
            "s3" | "s3a" => Some(Self::Amazon),
            "gs" | "gcs" => Some(Self::Google),
            "az" | "azure" | "abfs" | "abfss" | "adl" => Some(Self::Azure),
            _ => None,
        }
    }

    /// The command that copies from it to this machine.
    #[cfg(any(test, not(feature = "object-store")))]
    pub fn copy_command(self) -> &'static str {
        match self {
            Self::Amazon => "aws s3 cp --recursive",
            Self::Google => "gcloud storage cp --recursive",
            Self::Azure => "azcopy copy --recursive",
        }
    }
}

/// The store that an address names, if it names one.
pub fn service_of(text: &str) -> Option<Service> {
    let (scheme, _) = text.split_once("://")?;
    Service::of_scheme(&scheme.to_ascii_lowercase())
}

/// An object, a folder of objects or a pattern of them.
#[cfg(feature = "object-store")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub service: Service,
    /// Scheme and bucket, as in `s3://bucket`.
    pub bucket: String,
    /// What follows, without the slash between; empty for the whole bucket.
    pub key: String,
}

#[cfg(feature = "object-store")]
impl Address {
    /// Reads an address, of which [`service_of`] knows the store.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
        let scheme = scheme.to_ascii_lowercase();
        let service = Service::of_scheme(&scheme)
            .ok_or_else(|| format!("{scheme}:// is no address in an object store"))?;
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        let (container, host) = match bucket.split_once('@') {
            Some((container, host)) if service == Service::Azure => (container, Some(host)),
            _ => (bucket, None),
        };
        let is_name = |name: &str| {
            let fits = |c: char| c.is_ascii_alphanumeric() || "._-$".contains(c);
            !name.is_empty() && name.chars().all(fits)
        };
        if !is_name(container) || !host.is_none_or(is_name) {
            return Err(match bucket.contains(['@', ':']) {
                // Keys may be in it, so it is not repeated.
                true => "the address has more than a bucket before its first slash: keys belong into the environment",
                false => "the address names no bucket: write it as in s3://bucket/folder/rows.jsonl",
            }
            .to_owned());
        }
        Ok(Self {
            service,
            bucket: format!("{scheme}://{bucket}"),
            key: key.to_owned(),
        })
    }

    /// Another key of the same bucket.
    pub fn with_key(&self, key: &str) -> Self {
        Self {
            key: key.to_owned(),
            ..self.clone()
        }
    }

    /// The bucket's own name, with the account's host where the address has that.
    pub fn bucket_name(&self) -> &str {
        let name = self.bucket.split_once("://").map(|(_, name)| name);
        name.unwrap_or(&self.bucket)
    }

    /// Whether the key is a pattern of keys.
    pub fn is_pattern(&self) -> bool {
        self.key.contains(['*', '?', '['])
    }

    /// The folder in which everything is that the key means: itself, or for a pattern the folders before the first sign of one.
    pub fn folder(&self) -> &str {
        let plain = match self.key.find(['*', '?', '[']) {
            Some(at) => {
                let before = &self.key[..at];
                before.rsplit_once('/').map_or("", |(folder, _)| folder)
            }
            None => &self.key,
        };
        plain.trim_end_matches('/')
    }
}

#[cfg(feature = "object-store")]
impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.bucket, self.key)
    }
}

#[cfg(all(test, feature = "object-store"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_store_a_bucket_and_a_key_as_it_is_written() {
        for (text, service, name, key) in [
            ("s3://b/a/c.jsonl", Service::Amazon, "b", "a/c.jsonl"),
            (
                "S3A://my.b-1/a b#?.gz",
                Service::Amazon,
                "my.b-1",
                "a b#?.gz",
            ),
            ("s3://b", Service::Amazon, "b", ""),
            ("gs://b_1/p/", Service::Google, "b_1", "p/"),
            ("gcs://b/%20", Service::Google, "b", "%20"),
            ("az://box/x", Service::Azure, "box", "x"),
            ("abfs://$web/x", Service::Azure, "$web", "x"),
            (
                "abfss://box@account.dfs.core.windows.net/x",
                Service::Azure,
                "box@account.dfs.core.windows.net",
                "x",
            ),
        ] {
            let address = Address::parse(text).unwrap();
            assert_eq!(service_of(text), Some(service), "{text}");
            assert_eq!(address.service, service, "{text}");
            assert_eq!((address.bucket_name(), address.key.as_str()), (name, key));
        }
        assert_eq!(service_of("https://host/a"), None);
        assert_eq!(service_of("s3/bucket"), None);
    }

    #[test]
    fn what_is_no_bucket_is_refused_and_keys_in_it_are_not_repeated() {
        for text in ["s3://", "s3:///a", "gs://a b/c", "az://@host/x"] {
            assert!(Address::parse(text).is_err(), "{text}");
        }
        let error = Address::parse("s3://AKIA:SECRET@b/x").unwrap_err();
        assert!(
            error.contains("keys belong into the environment"),
            "{error}"
        );
        assert!(
            !error.contains("SECRET") && !error.contains("AKIA"),
            "{error}"
        );
    }

    #[test]
    fn a_pattern_lies_in_the_folders_before_it() {
        for (key, folder) in [
            ("a/b/*.jsonl", "a/b"),
            ("a/b?/c.jsonl", "a"),
            ("*.jsonl", ""),
            ("a/b/", "a/b"),
        ] {
            let address = Address::parse(&format!("s3://b/{key}")).unwrap();
            assert_eq!(address.folder(), folder, "{key}");
        }
    }
}
