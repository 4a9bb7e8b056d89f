//! How a store is reached and by whom, from the environment: the variables that the stores' own programs read.
//!
//! In: the variables of this process, and an address. Out: a client of the library `object_store` that has asked nobody yet.

use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{ClientConfigKey, ObjectStore, RetryConfig};

use super::address::{Address, Service};
use super::connection::Connector;
use super::error::{StoreError, innermost};
use super::profile::{self, Profile, is_printable};

/// Variables whose text goes into headers.
const SENT_AS_IT_IS: [&str; 5] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AZURE_STORAGE_TOKEN",
];

/// The variables, and what was found out beside them.
#[derive(Clone)]
pub struct Settings {
    variables: Vec<(String, String)>,
    /// Where the bucket has turned out to be.
    pub region: Option<String>,
    /// Whether requests are sent without a signature, as the variables say or because there are no credentials.
    pub is_anonymous: bool,
}

/// A client, and what gives its credentials.
pub struct Built {
    pub store: Arc<dyn ObjectStore>,
    pub credentials: Credentials,
    /// The region that its requests name.
    pub region: Option<String>,
}

/// What gives the credentials of a client.
pub enum Credentials {
    Amazon(object_store::aws::AwsCredentialProvider),
    Google(object_store::gcp::GcpCredentialProvider),
    Azure(object_store::azure::AzureCredentialProvider),
}

impl Settings {
    /// Reads the variables of this process.
    pub fn of_process(address: &Address) -> Result<Self, StoreError> {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self::of(address.service, std::env::vars_os().filter_map(text))
    }

    /// Keeps those of the variables that are the store's; one that is empty counts as unset.
    fn of(
        service: Service,
        variables: impl Iterator<Item = (String, String)>,
    ) -> Result<Self, StoreError> {
        let is_its = |name: &str| match service {
            Service::Amazon => name.starts_with("AWS_") || name == "HOME",
            Service::Google => name.starts_with("GOOGLE_") || name == "SERVICE_ACCOUNT",
            Service::Azure => name.starts_with("AZURE_"),
        };
        let variables = variables.filter(|(name, value)| is_its(name) && !value.trim().is_empty());
        let variables: Vec<(String, String)> = variables.collect();
        for (name, value) in &variables {
            // They are sent in headers and addresses.
            if value.contains(|c: char| c.is_control()) && !name.ends_with("_KEY") {
                return Err(unusable(
                    name,
                    "it has a line break or another control character",
                ));
            }
            if SENT_AS_IT_IS.contains(&name.as_str()) && !is_printable(value) {
                return Err(unusable(
                    name,
                    "it has characters that are not printable ASCII",
                ));
            }
            let is_address = name.contains("ENDPOINT") || name.ends_with("_BASE_URL");
            if is_address && !is_web_address(value) {
                return Err(unusable(
                    name,
                    "it is not the http:// or https:// address of a host",
                ));
            }
        }
        let skips = |(name, value): &(String, String)| {
            name.ends_with("_SKIP_SIGNATURE") && value.eq_ignore_ascii_case("true")
        };
        Ok(Self {
            is_anonymous: variables.iter().any(skips),
            variables,
            region: None,
        })
    }

    fn get(&self, name: &str) -> Option<&str> {
        let found = self.variables.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }

    /// Makes a client of the address's bucket.
    pub fn build(&self, address: &Address, connector: Connector) -> Result<Built, StoreError> {
        match address.service {
            Service::Amazon => self.amazon(address, connector),
            Service::Google => self.google(address, connector),
            Service::Azure => self.azure(address, connector),
        }
    }

    fn amazon(&self, address: &Address, connector: Connector) -> Result<Built, StoreError> {
        let mut builder = AmazonS3Builder::new();
        for (name, value) in &self.variables {
            match name.to_ascii_lowercase().parse() {
                Ok(AmazonS3ConfigKey::Client(key)) if !is_followed(key) => {}
                Ok(key) => builder = builder.with_config(key, value),
                Err(_) => {}
            }
        }
        let profile = match self.is_anonymous {
            true => Profile::default(),
            false => self.profile()?,
        };
        for (key, value) in [
            (AmazonS3ConfigKey::AccessKeyId, profile.access_key_id),
            (
                AmazonS3ConfigKey::SecretAccessKey,
                profile.secret_access_key,
            ),
            (AmazonS3ConfigKey::Token, profile.session_token),
            (AmazonS3ConfigKey::DefaultRegion, profile.region),
            (AmazonS3ConfigKey::Region, self.region.clone()),
        ] {
            if let Some(value) = value {
                builder = builder.with_config(key, value);
            }
        }
        let region = builder.get_config_value(&AmazonS3ConfigKey::Region);
        let store = builder
            .with_bucket_name(address.bucket_name())
            .with_skip_signature(self.is_anonymous)
            .with_retry(no_retries())
            .with_http_connector(connector)
            .build()
            .map_err(unbuilt)?;
        Ok(Built {
            credentials: Credentials::Amazon(store.credentials().clone()),
            store: Arc::new(store),
            region,
        })
    }

    /// The credentials of a profile, where the environment has none of its own.
    fn profile(&self) -> Result<Profile, StoreError> {
        let own = [
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
        ];
        match own.iter().any(|name| self.get(name).is_some()) {
            true => Ok(Profile::default()),
            false => profile::read(&|name| self.get(name).map(str::to_owned)),
        }
    }

    fn google(&self, address: &Address, connector: Connector) -> Result<Built, StoreError> {
        let mut builder = GoogleCloudStorageBuilder::new();
        for (name, value) in &self.variables {
            match name.to_ascii_lowercase().parse() {
                Ok(GoogleConfigKey::Client(key)) if !is_followed(key) => {}
                Ok(key) => builder = builder.with_config(key, value),
                Err(_) => {}
            }
        }
        let store = builder
            .with_bucket_name(address.bucket_name())
            .with_skip_signature(self.is_anonymous)
            .with_retry(no_retries())
            .with_http_connector(connector)
            .build()
            .map_err(unbuilt)?;
        Ok(Built {
            credentials: Credentials::Google(store.credentials().clone()),
            store: Arc::new(store),
            region: None,
        })
    }

    fn azure(&self, address: &Address, connector: Connector) -> Result<Built, StoreError> {
        let mut builder = MicrosoftAzureBuilder::new();
        for (name, value) in &self.variables {
            match name.to_ascii_lowercase().parse() {
                Ok(AzureConfigKey::Client(key)) if !is_followed(key) => {}
                Ok(key) => builder = builder.with_config(key, value),
                Err(_) => {}
            }
        }
        let has_account = address.bucket_name().contains('@');
        let is_emulator = builder.get_config_value(&AzureConfigKey::UseEmulator);
        let account = builder.get_config_value(&AzureConfigKey::AccountName);
        if !has_account && account.is_none() && is_emulator.as_deref() != Some("true") {
            return Err(StoreError::Settings(
                "the address names a container, but nothing names its account: set AZURE_STORAGE_ACCOUNT_NAME, or write abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/..."
                    .to_owned(),
            ));
        }
        let store = builder
            .with_url(&address.bucket)
            .with_skip_signature(self.is_anonymous)
            .with_retry(no_retries())
            .with_http_connector(connector)
            .build()
            .map_err(unbuilt)?;
        Ok(Built {
            credentials: Credentials::Azure(store.credentials().clone()),
            store: Arc::new(store),
            region: None,
        })
    }
}

/// Whether our connections do what a setting of the library's own HTTP client says; the others are the hub's.
fn is_followed(key: ClientConfigKey) -> bool {
    key == ClientConfigKey::AllowHttp
}

/// The library tries nothing again: that is done where the user is told of it, and can end it.
fn no_retries() -> RetryConfig {
    RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    }
}

fn unusable(variable: &str, reason: &str) -> StoreError {
    StoreError::Settings(format!("environment variable {variable}: {reason}"))
}

/// What the library says of variables that do not go together.
fn unbuilt(error: object_store::Error) -> StoreError {
    StoreError::Settings(format!(
        "the environment does not say how to reach it: {}",
        innermost(&error)
    ))
}

fn is_web_address(text: &str) -> bool {
    let host = ["https://", "http://"]
        .iter()
        .find_map(|scheme| text.strip_prefix(scheme));
    let is_fine = |c: char| c.is_ascii_graphic() && !"\"<>\\^`{|}@".contains(c);
    host.is_some_and(|host| {
        host.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[')
            && host.chars().all(is_fine)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn settings(service: Service, pairs: &[(&str, &str)]) -> Result<Settings, String> {
        let pairs = pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Settings::of(service, pairs).map_err(|error| error.to_string())
    }

    #[test]
    fn a_variable_that_cannot_be_sent_is_named_and_its_value_is_not() {
        for (name, value) in [
            ("AWS_ENDPOINT_URL", "localhost:9000/SECRET"),
            ("AWS_ENDPOINT_URL_S3", "https://me:SECRET@host"),
            ("AWS_SESSION_TOKEN", "SECRET\nx"),
            ("AWS_SESSION_TOKEN", "SECRETü"),
            ("AWS_REGION", "üSECRET"),
        ] {
            let error = settings(Service::Amazon, &[(name, value)]).err().unwrap();
            assert!(error.contains(name) && !error.contains("SECRET"), "{error}");
        }
    }

    #[test]
    fn only_the_store_s_own_variables_count_and_empty_ones_do_not() {
        let found = settings(
            Service::Google,
            &[
                ("AWS_SKIP_SIGNATURE", "true"),
                ("GOOGLE_BASE_URL", " "),
                ("GOOGLE_BUCKET", "b"),
            ],
        );
        let found = found.unwrap();
        assert_eq!(
            found.variables,
            [("GOOGLE_BUCKET".to_owned(), "b".to_owned())]
        );
        assert!(!found.is_anonymous);
        let skipped = settings(Service::Amazon, &[("AWS_SKIP_SIGNATURE", "TRUE")]);
        assert!(skipped.unwrap().is_anonymous);
    }

    /// The client of an address as the library describes it.
    fn built(text: &str, pairs: &[(&str, &str)]) -> Result<String, String> {
        let address = Address::parse(text)?;
        let home = |name: &str| (name == "HOME").then(|| "/nowhere".to_owned());
        let environment = common::hub::Environment::read(&home).unwrap();
        let connector = Connector {
            hub: common::hub::Hub::new(environment).unwrap(),
            asked_metadata: Arc::default(),
        };
        let settings = settings(address.service, pairs)?;
        let built = settings.build(&address, connector);
        let built = built.map_err(|error| error.to_string())?;
        Ok(built.store.to_string())
    }

    #[test]
    fn addresses_and_variables_make_a_client_of_each_kind_of_store() {
        let account = ("AZURE_STORAGE_ACCOUNT_NAME", "account");
        let key = ("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0");
        for (text, pairs, words) in [
            (
                "s3://b/x",
                vec![("AWS_ENDPOINT_URL", "https://host")],
                ["S3", "b"],
            ),
            ("gcs://b/x", vec![], ["GoogleCloudStorage", "b"]),
            ("az://box/x", vec![account, key], ["account", "box"]),
            ("abfs://box/x", vec![account], ["account", "box"]),
            (
                "abfss://box@other.dfs.core.windows.net/x",
                vec![("AZURE_STORAGE_SAS_TOKEN", "sv=1&sig=2")],
                ["other", "box"],
            ),
        ] {
            let told = built(text, &pairs).unwrap();
            for words in words {
                assert!(told.contains(words), "{text}: {told}");
            }
        }
        let error = built("az://box/x", &[]).unwrap_err();
        assert!(error.contains("AZURE_STORAGE_ACCOUNT_NAME"), "{error}");
        let wrong = ("AWS_SKIP_SIGNATURE", "maybe");
        assert!(built("s3://b/x", &[wrong, ("AWS_ACCESS_KEY_ID", "a")]).is_err());
    }
}
