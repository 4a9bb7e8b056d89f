//! A bucket: what is in it, and the bytes of its objects.
//!
//! In: an address. Out: objects with their sizes and versions, and readers of them, or one [`StoreError`]. What may pass is tried
//! again a bounded number of times, and the user is told. Every call blocks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use common::hub::{Hub, Retries, version_digest};
use common::progress::Progress;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{Extensions, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt};
use tokio::runtime::{Builder, Runtime};

use super::address::{Address, Service};
use super::connection::{AnswerIsObject, Connector};
use super::error::{CallError, StoreError, credential_variables};
use super::settings::{Built, Credentials, Settings};

/// Most objects of a folder.
const MAX_OBJECTS: usize = 1 << 17;

/// A bucket that can be asked.
pub struct Store {
    hub: Hub,
    address: Address,
    settings: Settings,
    inner: Arc<dyn ObjectStore>,
    region: Option<String>,
}

/// An object, as the store lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub key: String,
    pub size: u64,
    /// What the store calls this version of it by.
    pub tag: Option<String>,
    /// Digest of all that tells this version from others.
    pub version: String,
}

/// The bytes of an object, as they come.
pub struct Reading {
    runtime: Runtime,
    stream: BoxStream<'static, object_store::Result<Bytes>>,
}

impl Store {
    /// Finds out who asks. Without credentials, objects are asked for as anybody may who has none.
    pub fn open(hub: &Hub, address: &Address, progress: &Progress) -> Result<Self, StoreError> {
        let settings = Settings::of_process(address)?;
        Self::with(hub, address, settings, progress)
    }

    fn with(
        hub: &Hub,
        address: &Address,
        mut settings: Settings,
        progress: &Progress,
    ) -> Result<Self, StoreError> {
        let asked_metadata = Arc::new(AtomicBool::new(false));
        let connector = Connector {
            hub: hub.clone(),
            asked_metadata: asked_metadata.clone(),
        };
        let mut built = settings.build(address, connector.clone())?;
        if !settings.is_anonymous {
            let asked = retried(hub, address, false, progress, || {
                credentials(&built.credentials)
            });
            match asked {
                Ok(()) => {}
                Err(StoreError::Cancelled(cancelled)) => return Err(cancelled.into()),
                // This machine is none of the cloud's, or has no role there.
                Err(_) if asked_metadata.load(Ordering::Relaxed) => {
                    settings.is_anonymous = true;
                    built = settings.build(address, connector)?;
                }
                Err(error) => {
                    return Err(StoreError::Credentials {
                        reason: error.to_string(),
                        variables: credential_variables(address.service),
                    });
                }
            }
        }
        let Built { store, region, .. } = built;
        Ok(Self {
            hub: hub.clone(),
            address: address.clone(),
            settings,
            inner: store,
            region,
        })
    }

    /// The same bucket, asked in the region where it is.
    pub fn in_region(&self, region: &str, progress: &Progress) -> Result<Self, StoreError> {
        let mut settings = self.settings.clone();
        settings.region = Some(region.to_owned());
        Self::with(&self.hub, &self.address, settings, progress)
    }

    /// What the store says of an object.
    pub fn head(&self, key: &str, progress: &Progress) -> Result<Object, StoreError> {
        let path = path(key)?;
        let meta = self.call(progress, || block_on(self.inner.head(&path)))?;
        Ok(Object::of(meta))
    }

    /// All objects in a folder and those in it, by their keys.
    pub fn list(&self, folder: &str, progress: &Progress) -> Result<Vec<Object>, StoreError> {
        let prefix = path(folder)?;
        let prefix = (!prefix.as_ref().is_empty()).then_some(&prefix);
        let listed = self.call(progress, || {
            let list = async {
                let mut objects = Vec::new();
                let mut stream = self.inner.list(prefix);
                while let Some(meta) = stream.next().await {
                    objects.push(Object::of(meta?));
                    if objects.len() > MAX_OBJECTS || progress.is_cancelled() {
                        break;
                    }
                }
                Ok(objects)
            };
            block_on(list)
        });
        progress.check()?;
        let mut objects = listed?;
        if objects.len() > MAX_OBJECTS {
            return Err(StoreError::TooMany { most: MAX_OBJECTS });
        }
        // The mark by which consoles keep an empty folder has the folder's name.
        objects.retain(|object| object.key != folder.trim_matches('/'));
        objects.sort_by(|one, other| one.key.cmp(&other.key));
        Ok(objects)
    }

    /// Begins to read an object of this version behind so many bytes. Tried once.
    pub fn read(&self, object: &Object, offset: u64) -> Result<Reading, object_store::Error> {
        let mut extensions = Extensions::new();
        extensions.insert(AnswerIsObject);
        let options = GetOptions {
            if_match: object.tag.as_ref().map(|tag| format!("\"{tag}\"")),
            range: (offset > 0).then_some(GetRange::Offset(offset)),
            extensions,
            ..GetOptions::default()
        };
        let path = Path::parse(&object.key)?;
        let runtime = runtime()?;
        let result = runtime.block_on(self.inner.get_opts(&path, options))?;
        let is_same = Object::of(result.meta.clone()).version == object.version;
        if !is_same {
            return Err(object_store::Error::Precondition {
                path: object.key.clone(),
                source: Box::new(CallError::changed()),
            });
        }
        let stream = result.into_stream();
        Ok(Reading { runtime, stream })
    }

    /// What an error of the library means to the user.
    pub fn error(&self, error: &object_store::Error) -> StoreError {
        StoreError::of(error, self.address.service, self.settings.is_anonymous)
    }

    /// The address of one of its objects.
    pub fn address_of(&self, object: &Object) -> Address {
        self.address.with_key(&object.key)
    }

    fn call<T>(
        &self,
        progress: &Progress,
        mut attempt: impl FnMut() -> object_store::Result<T>,
    ) -> Result<T, StoreError> {
        let anonymous = self.settings.is_anonymous;
        let mut region = None;
        let result = retried(&self.hub, &self.address, anonymous, progress, || {
            let result = attempt();
            if let Err(error) = &result
                && let Some(CallError::Refused { region: told, .. }) = CallError::of(error)
            {
                region.clone_from(told);
            }
            result
        });
        let usual = self.address.service == Service::Amazon;
        match region.filter(|region| usual && Some(region) != self.used_region().as_ref()) {
            Some(region) if result.is_err() => Err(StoreError::OtherRegion { region }),
            _ => result,
        }
    }

    /// The region that requests name; the library has one of its own where nothing says it.
    fn used_region(&self) -> Option<String> {
        Some(
            self.region
                .clone()
                .unwrap_or_else(|| "us-east-1".to_owned()),
        )
    }
}

impl Object {
    fn of(meta: ObjectMeta) -> Self {
        // Lists and answers quote it differently.
        let plain = |tag: String| tag.trim_start_matches("W/").trim_matches('"').to_owned();
        let tag = meta.e_tag.map(plain);
        let known = match &tag {
            Some(tag) => format!("{tag} {}", meta.size),
            None => format!("{} {}", meta.last_modified.to_rfc3339(), meta.size),
        };
        Self {
            key: meta.location.to_string(),
            size: meta.size,
            version: version_digest(&known),
            tag,
        }
    }
}

impl Reading {
    /// The next piece; None at the end.
    pub fn next(&mut self) -> Option<object_store::Result<Bytes>> {
        self.runtime.block_on(self.stream.next())
    }
}

/// Repeats an attempt while its failures are of the kind that passes.
fn retried<T>(
    hub: &Hub,
    address: &Address,
    is_anonymous: bool,
    progress: &Progress,
    mut attempt: impl FnMut() -> object_store::Result<T>,
) -> Result<T, StoreError> {
    let mut retries = Retries::default();
    loop {
        progress.check()?;
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) => {
                let told = StoreError::of(&error, address.service, is_anonymous);
                wait(hub, &mut retries, address, &error, told, progress)?;
            }
        }
    }
}

/// Waits before the next try, or gives back what the user is told where there is none.
pub fn wait(
    hub: &Hub,
    retries: &mut Retries,
    address: &Address,
    error: &object_store::Error,
    told: StoreError,
    progress: &Progress,
) -> Result<(), StoreError> {
    let passing = CallError::of(error).and_then(CallError::passes_after);
    let Some(time) = passing.and_then(|after| retries.failed(after)) else {
        return Err(told);
    };
    let seconds = time.as_secs_f64();
    tracing::warn!("{address}: {told}; trying again in {seconds:.1} s");
    Ok(hub.pause(time, progress)?)
}

fn credentials(credentials: &Credentials) -> object_store::Result<()> {
    block_on(async {
        match credentials {
            Credentials::Amazon(provider) => provider.get_credential().await.map(drop),
            Credentials::Google(provider) => provider.get_credential().await.map(drop),
            Credentials::Azure(provider) => provider.get_credential().await.map(drop),
        }
    })
}

fn path(key: &str) -> Result<Path, StoreError> {
    Path::parse(key).map_err(|_| {
        StoreError::Settings(
            "a key with empty parts (`//`), `.`, `..` or control characters is not read: copy the object to another name"
                .to_owned(),
        )
    })
}

fn runtime() -> object_store::Result<Runtime> {
    let built = Builder::new_current_thread().enable_time().build();
    built.map_err(|error| object_store::Error::Generic {
        store: "runtime",
        source: Box::new(error),
    })
}

fn block_on<T>(work: impl Future<Output = object_store::Result<T>>) -> object_store::Result<T> {
    runtime()?.block_on(work)
}
