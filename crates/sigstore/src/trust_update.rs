//! Updates of a trust root by [TUF], The Update Framework.
//!
//! ```text
//! root.json       whose keys sign the rest; known at the start, each next version is signed by the previous one
//!   timestamp     expires after days, names the newest snapshot
//!     snapshot    names the newest targets
//!       targets   names trusted_root.json with its length and hashes
//! ```
//!
//! [`SeenMetadata`] holds what earlier updates have seen. Older versions of it are refused, also if its signatures do not
//! verify any more: only a newer root may start the versions of the other files anew.
//!
//! [TUF]: https://theupdateframework.github.io/specification/latest/

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt::Write as _;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sigstore_tuf::transport::FetchFuture;
use sigstore_tuf::{Error, MetadataStore, Repository, Updater, UpdaterConfig};
use text::printable::shorten;

use super::ring_provider;
use super::trust_root::{MAXIMUM_TRUST_ROOT_BYTES, TransparencyLog, TrustRoot, TrustRootError};

/// The name of the trust root in a repository.
const TARGET: &str = "trusted_root.json";
/// The name of the newest root in [`SeenMetadata`].
const ROOT: &str = "root.json";
/// The maximum size of a metadata file in bytes. Those of the public instances have less than 8 KiB.
pub const MAXIMUM_METADATA_BYTES: u64 = 128 << 10;
/// The maximum size of `timestamp.json` in bytes, which has one entry.
const MAXIMUM_TIMESTAMP_BYTES: u64 = 16 << 10;
/// The maximum number of new roots in one update.
const MAXIMUM_NEW_ROOTS: u32 = 64;
/// The maximum number of delegated roles that are read in search of the trust root. It is none of them in any instance.
const MAXIMUM_DELEGATIONS: u32 = 8;
/// The maximum size of [`SeenMetadata`] in bytes: that of a `ConfigMap`.
pub const MAXIMUM_SEEN_BYTES: u64 = 1 << 20;
/// The maximum length of a reason in a message in bytes.
const SHOWN_BYTES: usize = 300;

/// A Sigstore instance whose repository is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SigstoreInstance {
    /// Sigstore's public instance.
    Public,
    /// GitHub's own, for attestations of private repositories.
    GitHub,
}

impl SigstoreInstance {
    /// Returns the URL of the repository.
    pub fn url(self) -> &'static str {
        match self {
            Self::Public => "https://tuf-repo-cdn.sigstore.dev/",
            Self::GitHub => "https://tuf-repo.github.com/",
        }
    }

    /// Returns a `root.json` of the repository. Newer ones are fetched and verified from it on, so it need not be the
    /// newest, and it may be expired.
    pub fn root(self) -> &'static [u8] {
        match self {
            Self::Public => include_bytes!("../roots/public.json"),
            Self::GitHub => include_bytes!("../roots/github.json"),
        }
    }
}

/// A file of a repository, or `None` if there is none.
pub type RepositoryFile<'a> =
    Pin<Box<dyn Future<Output = Result<Option<Vec<u8>>, String>> + Send + 'a>>;

/// The files of a repository.
pub trait RepositoryFiles: Send + Sync {
    /// Fetches a file of at most `limit` bytes by its path.
    fn fetch<'a>(&'a self, path: &'a str, limit: u64) -> RepositoryFile<'a>;
}

/// Verified metadata of earlier updates. It is verified anew from the first root on, so a changed one grants nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenMetadata {
    /// The URL of the repository.
    repository: String,
    /// The files by their names in the library's store. There are none before the first update.
    files: BTreeMap<String, String>,
}

/// The part that all metadata files have.
#[derive(Deserialize)]
struct SignedFile {
    signed: Versioned,
}

#[derive(Deserialize)]
struct Versioned {
    version: u64,
}

/// The versions of the metadata that a trust root comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MetadataVersions {
    /// The version of `root.json`.
    pub root: u64,
    /// The version of `timestamp.json`.
    pub timestamp: u64,
    /// The version of `snapshot.json`.
    pub snapshot: u64,
    /// The version of `targets.json`.
    pub targets: u64,
}

/// The result of an update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustUpdate {
    /// A `trusted_root.json` that the driver can use.
    pub trust_root: Vec<u8>,
    /// The metadata for the next update.
    pub seen: SeenMetadata,
    /// The versions of that metadata.
    pub versions: MetadataVersions,
}

/// The reason that an update is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustUpdateError {
    /// The first `root.json` is unusable.
    #[error("the root.json to start from cannot be used: {0}")]
    FirstRoot(String),
    /// The metadata of earlier updates is unusable.
    #[error(
        "the metadata of earlier updates cannot be read: {0}. Remove it only if you know that it is damaged: \
         without it, an older trust root is not recognised"
    )]
    Seen(String),
    /// The metadata of earlier updates is of another repository.
    #[error(
        "the metadata of earlier updates is of {0}: use another output, or remove it if the repository has moved"
    )]
    OtherRepository(String),
    /// A file cannot be fetched.
    #[error("{0}")]
    Fetch(String),
    /// The repository is older than before, expired, or not signed as it must be.
    #[error("what the TUF repository serves is refused: {0}")]
    Refused(String),
    /// The repository's trust root is unusable.
    #[error("the {TARGET} of the TUF repository cannot be used: {0}")]
    TrustRoot(TrustRootError),
}

/// Updates a trust root from the files of a repository.
///
/// `first_root` is a `root.json` that the caller trusts, `now` is the time at which metadata must not be expired.
pub async fn update_trust_root(
    files: impl RepositoryFiles + 'static,
    first_root: &[u8],
    seen: SeenMetadata,
    now: Timestamp,
) -> Result<TrustUpdate, TrustUpdateError> {
    ring_provider::install();
    let mut bounds = UpdaterConfig::default();
    bounds.root_max_length = MAXIMUM_METADATA_BYTES;
    bounds.timestamp_max_length = MAXIMUM_TIMESTAMP_BYTES;
    bounds.snapshot_max_length = MAXIMUM_METADATA_BYTES;
    bounds.targets_max_length = MAXIMUM_METADATA_BYTES;
    bounds.target_max_length = MAXIMUM_TRUST_ROOT_BYTES;
    bounds.max_root_rotations = MAXIMUM_NEW_ROOTS;
    bounds.max_delegations = MAXIMUM_DELEGATIONS;
    let updater = Updater::new(BoundedFiles(files), first_root);
    let updater = updater.map_err(|error| TrustUpdateError::FirstRoot(reason(&error)))?;
    let first_version = updater.trusted().root().version;
    let before = (!seen.files.is_empty()).then(|| seen.versions()).transpose()?;
    let store = Arc::new(SeenStore(Mutex::new(seen)));
    let mut updater = updater.with_config(bounds).with_store(Arc::clone(&store));
    updater.refresh(now).await.map_err(refused)?;
    let trusted = updater.trusted();
    let incomplete = || TrustUpdateError::Refused("metadata is missing".to_owned());
    let versions = MetadataVersions {
        root: trusted.root().version,
        timestamp: trusted.timestamp().ok_or_else(incomplete)?.version,
        snapshot: trusted.snapshot().ok_or_else(incomplete)?.version,
        targets: trusted.targets_role("targets").ok_or_else(incomplete)?.version,
    };
    if let Some(before) = before {
        versions.check_not_older(&before)?;
    }
    let trust_root = updater.get_target(TARGET, now).await.map_err(refused)?;
    TrustRoot::parse(&trust_root, TransparencyLog::Required)
        .or_else(|error| match error {
            TrustRootError::Missing(_) => TrustRoot::parse(&trust_root, TransparencyLog::None),
            error => Err(error),
        })
        .map_err(TrustUpdateError::TrustRoot)?;
    let seen = store.seen().kept(first_version, versions.root);
    Ok(TrustUpdate { trust_root, seen, versions })
}

impl MetadataVersions {
    /// Refuses versions older than those of the update before. A newer root may start the others anew.
    fn check_not_older(&self, before: &Self) -> Result<(), TrustUpdateError> {
        let others = [
            ("timestamp.json", self.timestamp, before.timestamp),
            ("snapshot.json", self.snapshot, before.snapshot),
            ("targets.json", self.targets, before.targets),
        ];
        let others = others.into_iter().filter(|_| self.root == before.root);
        let mut all = std::iter::once((ROOT, self.root, before.root)).chain(others);
        all.find(|(_, served, seen)| served < seen).map_or(Ok(()), |(name, served, seen)| {
            let reason = format!("{name} has version {served}, but version {seen} was seen before");
            Err(TrustUpdateError::Refused(reason))
        })
    }
}

impl SeenMetadata {
    /// Starts without metadata.
    pub fn new(repository: &str) -> Self {
        Self { repository: repository.to_owned(), files: BTreeMap::new() }
    }

    /// Parses what [`to_json`](Self::to_json) wrote for this repository.
    pub fn parse(json: &[u8], repository: &str) -> Result<Self, TrustUpdateError> {
        if json.len() as u64 > MAXIMUM_SEEN_BYTES {
            let reason = format!("it has more than {MAXIMUM_SEEN_BYTES} bytes");
            return Err(TrustUpdateError::Seen(reason));
        }
        let malformed = |error: serde_json::Error| TrustUpdateError::Seen(error.to_string());
        let seen: Self = serde_json::from_slice(json).map_err(malformed)?;
        if seen.repository != repository {
            return Err(TrustUpdateError::OtherRepository(shorten(&seen.repository, SHOWN_BYTES)));
        }
        seen.versions()?;
        Ok(seen)
    }

    /// Returns the versions of the files, whether or not their signatures verify.
    fn versions(&self) -> Result<MetadataVersions, TrustUpdateError> {
        let version = |name: &str| {
            let unreadable = |reason| TrustUpdateError::Seen(format!("{name}: {reason}"));
            let file =
                self.files.get(name).ok_or_else(|| unreadable("it is missing".to_owned()))?;
            let file = serde_json::from_str::<SignedFile>(file);
            file.map(|file| file.signed.version).map_err(|error| unreadable(error.to_string()))
        };
        Ok(MetadataVersions {
            root: version(ROOT)?,
            timestamp: version("timestamp.json")?,
            snapshot: version("snapshot.json")?,
            targets: version("targets.json")?,
        })
    }

    /// Returns the metadata as a JSON object.
    pub fn to_json(&self) -> String {
        // The derived serialisation of texts by name does not fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Returns what the next update needs: the roots after the first one, and the newest metadata.
    fn kept(mut self, first: u64, newest: u64) -> Self {
        let roots: Vec<_> = (first + 1..=newest).map(root_name).collect();
        let newest = [ROOT, "timestamp.json", "snapshot.json", "targets.json"];
        self.files.retain(|name, _| roots.contains(name) || newest.contains(&name.as_str()));
        self
    }
}

/// Returns the name of a version of the root in the library's store.
fn root_name(version: u64) -> String {
    format!("root_history/{version}.root.json")
}

/// The store of verified metadata, in memory: nothing of a refused update is kept.
struct SeenStore(Mutex<SeenMetadata>);

impl SeenStore {
    fn seen(&self) -> SeenMetadata {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl MetadataStore for SeenStore {
    fn load(&self, name: &str) -> sigstore_tuf::Result<Option<Vec<u8>>> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(seen.files.get(name).map(|text| text.clone().into_bytes()))
    }

    fn store(&self, name: &str, bytes: &[u8]) -> sigstore_tuf::Result<()> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.files.insert(name.to_owned(), String::from_utf8_lossy(bytes).into_owned());
        Ok(())
    }
}

/// The files of a repository, for the library.
struct BoundedFiles<F>(F);

impl<F: RepositoryFiles> BoundedFiles<F> {
    async fn fetch(&self, path: &str, limit: u64) -> sigstore_tuf::Result<Option<Vec<u8>>> {
        let file = self.0.fetch(path, limit).await.map_err(Error::transport)?;
        match file {
            Some(bytes) if bytes.len() as u64 > limit => {
                Err(Error::transport(format!("{path} has more than {limit} bytes")))
            }
            file => Ok(file),
        }
    }
}

impl<F: RepositoryFiles> Repository for BoundedFiles<F> {
    fn fetch_metadata<'a>(&'a self, name: &'a str, limit: u64) -> FetchFuture<'a> {
        Box::pin(self.fetch(name, limit))
    }

    fn fetch_target<'a>(&'a self, path: &'a str, limit: u64) -> FetchFuture<'a> {
        Box::pin(async move { self.fetch(&format!("targets/{path}"), limit).await })
    }
}

fn refused(error: Error) -> TrustUpdateError {
    match error {
        Error::Transport { message, .. } => TrustUpdateError::Fetch(shorten(&message, SHOWN_BYTES)),
        error => TrustUpdateError::Refused(reason(&error)),
    }
}

/// Returns the text of an error with its causes.
fn reason(error: &Error) -> String {
    let (mut text, mut cause) = (error.to_string(), error.source());
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    shorten(&text, SHOWN_BYTES)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    /// A repository without new roots, whose other files have so many bytes.
    struct Files(usize);

    impl RepositoryFiles for Files {
        fn fetch<'a>(&'a self, path: &'a str, _limit: u64) -> RepositoryFile<'a> {
            let file = (!path.ends_with("root.json")).then(|| vec![b' '; self.0]);
            Box::pin(std::future::ready(Ok(file)))
        }
    }

    fn refusal(first_root: &[u8], now: &str, bytes: usize) -> String {
        let now = now.parse().expect("a time");
        let update = update_trust_root(Files(bytes), first_root, SeenMetadata::new(""), now);
        update.now_or_never().expect("no waiting").expect_err("a refusal").to_string()
    }

    #[test]
    fn the_first_roots_of_known_instances_are_signed_and_expire_as_later_ones() {
        for instance in [SigstoreInstance::Public, SigstoreInstance::GitHub] {
            let root = instance.root();
            assert!(instance.url().starts_with("https://") && instance.url().ends_with('/'));
            let valid = refusal(root, "2026-11-30T00:00:00Z", 2);
            assert!(valid.contains("failed to parse JSON"), "{valid}");
            let expired = refusal(root, "2028-01-01T00:00:00Z", 2);
            assert!(expired.contains("root metadata expired"), "{expired}");
            let changed = String::from_utf8_lossy(root).replacen("2027", "2028", 1);
            let changed = refusal(changed.as_bytes(), "2026-11-30T00:00:00Z", 2);
            assert!(changed.contains("signature threshold not met for role root"), "{changed}");
        }
    }

    #[test]
    fn a_file_is_bounded_whatever_its_source_returns() {
        let root = SigstoreInstance::Public.root();
        let large = refusal(root, "2026-11-30T00:00:00Z", 16_385);
        assert_eq!(large, "timestamp.json has more than 16384 bytes");
    }

    /// Returns metadata in which each of the newest files has this version.
    fn seen(version: u64) -> SeenMetadata {
        let file = format!("{{\"signed\":{{\"version\":{version}}},\"signatures\":[]}}");
        let names = [ROOT, "timestamp.json", "snapshot.json", "targets.json"];
        let files = names.map(|name| (name.to_owned(), file.clone())).into();
        SeenMetadata { files, ..SeenMetadata::new("https://one.example/") }
    }

    #[test]
    fn seen_metadata_is_bounded_and_read_as_it_was_written() {
        let (good, repository) = (seen(7), "https://one.example/");
        let json = good.to_json();
        assert_eq!(SeenMetadata::parse(json.as_bytes(), repository), Ok(good.clone()));
        assert_eq!(
            SeenMetadata::parse(json.as_bytes(), "https://two.example/"),
            Err(TrustUpdateError::OtherRepository(repository.to_owned()))
        );
        let large = usize::try_from(MAXIMUM_SEEN_BYTES).expect("small") + 1;
        let is_unreadable = |json: &[u8]| {
            let parsed = SeenMetadata::parse(json, repository);
            assert!(matches!(parsed, Err(TrustUpdateError::Seen(_))), "{parsed:?}");
        };
        for wrong in [&b"{"[..], b"[]", b"{\"a\":1}", b"{}", b"\xff", &vec![b' '; large]] {
            is_unreadable(wrong);
        }
        for name in good.files.keys() {
            let mut without = good.clone();
            without.files.remove(name);
            is_unreadable(without.to_json().as_bytes());
            for damaged in ["", "{\"signed\":{", "{\"signed\":{\"version\":-1}}"] {
                let mut wrong = good.clone();
                wrong.files.insert(name.clone(), damaged.to_owned());
                is_unreadable(wrong.to_json().as_bytes());
            }
        }
    }

    #[test]
    fn no_version_goes_back_but_after_a_newer_root() {
        let before = seen(7).versions().expect("versions");
        let MetadataVersions { root, timestamp, snapshot, targets } = before;
        for older in [
            MetadataVersions { root: root - 1, timestamp: 9, snapshot: 9, targets: 9 },
            MetadataVersions { timestamp: timestamp - 1, ..before },
            MetadataVersions { snapshot: snapshot - 1, ..before },
            MetadataVersions { targets: targets - 1, ..before },
        ] {
            let error = older.check_not_older(&before).expect_err("a refusal").to_string();
            assert!(
                error.contains(".json has version 6, but version 7 was seen before"),
                "{error}"
            );
        }
        let newer_root = MetadataVersions { root: 8, timestamp: 1, snapshot: 1, targets: 1 };
        for good in [before, newer_root] {
            assert_eq!(good.check_not_older(&before), Ok(()));
        }
    }

    #[test]
    fn only_what_the_next_update_needs_is_kept() {
        let names = ["5.snapshot.json", "npm.json", "targets/trusted_root.json"];
        let kept =
            [ROOT, "root_history/4.root.json", "snapshot.json", "targets.json", "timestamp.json"];
        let roots = ["root_history/3.root.json", "root_history/5.root.json"];
        let all =
            names.iter().chain(&kept).chain(&roots).map(|name| ((*name).to_owned(), String::new()));
        let left = SeenMetadata { files: all.collect(), ..SeenMetadata::new("") }.kept(3, 4);
        assert_eq!(left.files.keys().collect::<Vec<_>>(), kept);
    }
}
