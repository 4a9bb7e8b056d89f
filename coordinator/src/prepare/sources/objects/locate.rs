//! What an address in an object store stands for: an object, the objects of a folder, or those that a pattern may match.
//!
//! A run that goes on takes what it began with from the cache and asks nobody, as long as all of it is there.

use std::collections::HashMap;

use common::hub::{Hub, WebFile};
use common::progress::Progress;

use super::super::access::Sources;
use super::super::list::List;
use super::address::Address;
use super::download;
use super::error::StoreError;
use super::store::{Object, Store};

/// What an address means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Object,
    Folder,
    Pattern,
}

/// The objects that an address stands for.
pub struct Located<'a> {
    hub: &'a Hub,
    progress: &'a Progress,
    /// The bucket; its key is the folder that names are relative to, with a slash at its end unless it is the whole bucket.
    base: Address,
    pub kind: Kind,
    /// Names of the objects, relative to the folder.
    pub names: Vec<String>,
    from: From,
}

/// Where the objects come from.
enum From {
    Cache(HashMap<String, WebFile>),
    Store(Box<Store>, HashMap<String, Object>),
}

/// Finds the objects. An error begins with the address that it is about, where that is not the one that was given.
pub fn locate<'a>(
    sources: &'a Sources<'_>,
    entry: (List, usize),
    address: &Address,
) -> Result<Located<'a>, String> {
    let (hub, progress) = (sources.hub()?, sources.progress);
    if let Some((kind, unread, files)) = pinned(sources, entry, hub, address) {
        let mut located = in_cache(hub, progress, address, kind, files);
        located.names.extend(unread);
        located.names.sort_unstable();
        return Ok(located);
    }
    let newest = || {
        let name = address.key.rsplit('/').next().unwrap_or_default();
        let newest = hub.versions(&address.to_string(), name).newest()?;
        let files = HashMap::from([(name.to_owned(), newest)]);
        Some(in_cache(hub, progress, address, Kind::Object, files))
    };
    if let Err(offline) = hub.check_online_for(&address.to_string()) {
        return newest().ok_or_else(|| offline.to_string());
    }
    let found = Store::open(hub, address, progress).and_then(|mut store| {
        let mut found = find(&store, address, progress);
        if let Err(StoreError::OtherRegion { region }) = &found {
            store = store.in_region(region, progress)?;
            found = find(&store, address, progress);
        }
        Ok((store, found?))
    });
    let (store, (kind, objects)) = match found {
        Err(error) if error.is_unreachable() => {
            return newest().ok_or_else(|| error.to_string());
        }
        found => found.map_err(|error| error.to_string())?,
    };
    let base = base_of(address, kind);
    let named = objects.into_iter().filter_map(|object| {
        let name = object.key.strip_prefix(&base.key)?.to_owned();
        Some((name, object))
    });
    let named: Vec<(String, Object)> = named.collect();
    Ok(Located {
        hub,
        progress,
        base,
        kind,
        names: named.iter().map(|(name, _)| name.clone()).collect(),
        from: From::Store(Box::new(store), named.into_iter().collect()),
    })
}

/// Asks the store what the address is.
fn find(
    store: &Store,
    address: &Address,
    progress: &Progress,
) -> Result<(Kind, Vec<Object>), StoreError> {
    let list = |kind| {
        let objects = store.list(address.folder(), progress)?;
        match objects.is_empty() {
            true => Err(StoreError::EmptyFolder),
            false => Ok((kind, objects)),
        }
    };
    if address.is_pattern() {
        return list(Kind::Pattern);
    }
    if address.key.is_empty() || address.key.ends_with('/') {
        return list(Kind::Folder);
    }
    match store.head(&address.key, progress) {
        Ok(object) => Ok((Kind::Object, vec![object])),
        Err(StoreError::NoObject) => match list(Kind::Folder) {
            Err(StoreError::EmptyFolder) => Err(StoreError::NoObject),
            other => other,
        },
        Err(error) => Err(error),
    }
}

/// What the run in the output folder began with, where the cache has all of it: what the address is, the names of files that were
/// there and not read, and those that were.
fn pinned(
    sources: &Sources<'_>,
    entry: (List, usize),
    hub: &Hub,
    address: &Address,
) -> Option<(Kind, Vec<String>, HashMap<String, WebFile>)> {
    let own = address.to_string();
    let start = match address.is_pattern() {
        true => base_of(address, Kind::Pattern).to_string(),
        false => own.trim_end_matches('/').to_owned(),
    };
    let known = sources.pinned_within(entry, &start);
    let kind = match known.iter().any(|(name, _)| *name == own) {
        _ if address.is_pattern() => Kind::Pattern,
        true => Kind::Object,
        false => Kind::Folder,
    };
    let base = base_of(address, kind).to_string();
    let within = known.iter().filter(|(name, _)| match kind {
        Kind::Object => *name == own,
        _ => name.starts_with(&base),
    });
    let (unread, read): (Vec<_>, Vec<_>) = within.partition(|(_, version)| version.is_empty());
    let files = read.into_iter().map(|(name, version)| {
        let last = name.rsplit('/').next().unwrap_or_default();
        let file = hub.versions(name, last).kept(version)?;
        Some((name.strip_prefix(&base)?.to_owned(), file))
    });
    let files: HashMap<String, WebFile> = files.collect::<Option<_>>()?;
    let unread = unread
        .into_iter()
        .filter_map(|(name, _)| Some(name.strip_prefix(&base)?.to_owned()));
    (!files.is_empty()).then(|| (kind, unread.collect(), files))
}

fn in_cache<'a>(
    hub: &'a Hub,
    progress: &'a Progress,
    address: &Address,
    kind: Kind,
    files: HashMap<String, WebFile>,
) -> Located<'a> {
    let mut names: Vec<String> = files.keys().cloned().collect();
    names.sort_unstable();
    Located {
        hub,
        progress,
        base: base_of(address, kind),
        kind,
        names,
        from: From::Cache(files),
    }
}

/// The folder that names are relative to.
fn base_of(address: &Address, kind: Kind) -> Address {
    let folder = match kind {
        Kind::Object => address
            .key
            .rsplit_once('/')
            .map_or("", |(folder, _)| folder),
        Kind::Folder | Kind::Pattern => address.folder(),
    };
    match folder {
        "" => address.with_key(""),
        folder => address.with_key(&format!("{folder}/")),
    }
}

impl Located<'_> {
    /// What of a pattern's address names are matched with.
    pub fn pattern<'b>(&self, address: &'b Address) -> &'b str {
        address
            .key
            .strip_prefix(&self.base.key)
            .unwrap_or(&address.key)
    }

    /// The address of one of the objects.
    pub fn address_of(&self, name: &str) -> String {
        format!("{}{name}", self.base)
    }

    /// Most bytes of one of the objects, as the store lists it.
    pub fn size(&self, name: &str) -> u64 {
        match &self.from {
            From::Cache(files) => {
                let metadata = files.get(name).and_then(|file| file.path.metadata().ok());
                metadata.map_or(0, |metadata| metadata.len())
            }
            From::Store(_, objects) => objects.get(name).map_or(0, |object| object.size),
        }
    }

    /// Brings objects to this disk, a few at a time.
    pub fn fetch(&self, names: &[String]) -> Result<Vec<WebFile>, String> {
        match &self.from {
            From::Cache(files) => {
                let file = |name: &String| {
                    let file = files.get(name).cloned();
                    file.ok_or_else(|| format!("{name} is not in the cache"))
                };
                names.iter().map(file).collect()
            }
            From::Store(store, objects) => {
                let wanted = names.iter().filter_map(|name| objects.get(name).cloned());
                let wanted: Vec<Object> = wanted.collect();
                let fetched = download::fetch(self.hub, store, &wanted, self.progress);
                fetched.map_err(|(key, error)| match (self.kind, &*error) {
                    // The address stands before it.
                    (Kind::Object, _) | (_, StoreError::Cancelled(_)) => error.to_string(),
                    _ => format!("{}: {error}", self.base.with_key(&key)),
                })
            }
        }
    }
}
