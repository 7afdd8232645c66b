//! Estimates the disk space of an artifact, and claims it before its first byte.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::blob_objects::{FileWant, key_of};
use super::blob_origins::{BlobOrigin, BlobOrigins, content_source};
use super::blocking;
use super::credential_offers::{Source, Sponsors};
use super::error::PullError;
use super::tree_shape::{Part, PartRule};
use oci::{Digest, Repository};
use store::gc::Want;
use store::layers::Layer;
use store::single_files::StoredFile;
use store::space_reservations::{Claim, Reservation};
use store::{FileKey, LayerKey, SpaceAmount, Store, StoreError};
use unpack::PermissionsRule;
use unpack::layer_rule::ArchiveRule;

/// The expansion of compressed archives, as far as it can be known before: binaries about this much, models less. Too
/// low a value is detected while unpacking; too high a value would refuse content that fits.
const UNPACKED_PER_COMPRESSED: u64 = 2;
/// The bytes of an archive for each of its files, as far as they can be known before.
const ARCHIVE_BYTES_PER_INODE: u64 = 16 << 10;
/// The most blobs that a registry is asked for at once, before space is claimed for them.
const PROBES_AT_ONCE: usize = 4;
/// The least space that is freed when the disk turns out full: many small writes have to fit.
const LEAST_ROOM: u64 = 64 << 20;

/// Room for what is not in the store yet, and a hold on what is: it does not go to make that room.
pub(super) struct Reserved {
    reservation: Reservation,
    _here: Vec<Here>,
}

/// The space that an artifact's parts need.
struct Needed {
    claims: Vec<Claim>,
    here: Vec<Here>,
    /// Blobs that the repository has not been proven to hold.
    unproven: Vec<Digest>,
}

/// Something that is in the store, held there.
enum Here {
    File { _file: StoredFile },
    Layer { _layer: Layer },
}

impl Reserved {
    /// A blob's content has its name.
    pub(super) fn done(&self, blob: Digest) {
        self.reservation.done(blob);
    }
}

/// Reserves disk space for artifacts. Cheap to clone.
#[derive(Clone)]
pub(super) struct SpaceReserver {
    pub(super) origins: BlobOrigins,
}

impl SpaceReserver {
    /// Claims room for all parts that are not in the store yet.
    pub(super) async fn reserve(
        &self,
        parts: &[Part],
        permissions: PermissionsRule,
        sponsors: &Arc<Sponsors>,
    ) -> Result<Reserved, PullError> {
        let repository = &sponsors.repository;
        let claim_all = || {
            let (space, parts, of) = (self.clone(), parts.to_vec(), repository.clone());
            blocking(move || space.claims(&parts, permissions, &of))
        };
        let mut needed = claim_all().await?;
        if !needed.unproven.is_empty() {
            let (store, claims) = (self.origins.store.clone(), needed.claims.clone());
            let sizes: HashMap<_, _> =
                parts.iter().map(|part| (part.descriptor.digest, part.descriptor.size)).collect();
            let bytes = sizes.into_values().fold(0, u64::saturating_add);
            // What is larger than all that the node can hold is not here either.
            let is_in_doubt = move || {
                Ok(!store.space().has_room_for(&claims)? && bytes <= store.space().capacity()?)
            };
            if blocking(is_in_doubt).await? {
                // Nothing goes for what the registry may not give, and what it gives and is here
                // needs no room.
                self.probe_all(&needed.unproven, sponsors).await?;
                needed = claim_all().await?;
            }
        }
        let (store, Needed { claims, here, .. }) = (self.origins.store.clone(), needed);
        let reserve =
            move || Ok(Reserved { reservation: store.space().reserve(&claims)?, _here: here });
        blocking(reserve).await
    }

    /// Returns the space that the parts of a repository's artifact need. A part that the repository has not been proven
    /// to have counts as if it were not in the store. Blocking.
    fn claims(
        &self,
        parts: &[Part],
        permissions: PermissionsRule,
        repository: &Repository,
    ) -> Result<Needed, PullError> {
        let sources = self.origins.sources(repository);
        let mut needed = Needed { claims: Vec::new(), here: Vec::new(), unproven: Vec::new() };
        for part in parts {
            let (found, is_all) = find(&self.origins.store, part, permissions)?;
            needed.here.extend(found);
            let descriptor = &part.descriptor;
            let is_proven = descriptor.data.is_some()
                || self.origins.of(&sources, descriptor.digest) == BlobOrigin::Repository;
            if !is_proven {
                needed.unproven.push(descriptor.digest);
            }
            if !is_all || !is_proven {
                needed.claims.push(claim(part));
            }
        }
        Ok(needed)
    }

    /// Asks the registry for blobs before room is made for them, and remembers those that are known
    /// to be its host's.
    async fn probe_all(&self, blobs: &[Digest], sponsors: &Arc<Sponsors>) -> Result<(), PullError> {
        let probe = |&blob| self.clone().probe(blob, Arc::clone(sponsors));
        let probes: Vec<_> = blobs.iter().map(probe).collect();
        stream::iter(probes).buffered(PROBES_AT_ONCE).try_collect().await
    }

    async fn probe(self, blob: Digest, sponsors: Arc<Sponsors>) -> Result<(), PullError> {
        let origins = self.origins;
        let mut last = PullError::Unwanted;
        let answered_by = loop {
            let Some((number, Source { repository, credential })) = sponsors.current() else {
                return Err(last);
            };
            match origins.registry.at(&repository, &credential).probe_blob(blob).await {
                Ok(answered_by) => break answered_by,
                Err(error) => last = sponsors.refused(number, error.into()),
            }
        };
        let repository = sponsors.repository.clone();
        blocking(move || {
            if origins.of(&origins.sources(&repository), blob) == BlobOrigin::Host {
                let by = content_source(&answered_by);
                origins.store.origins().put_blob(&repository, blob, &by)?;
            }
            Ok(())
        })
        .await
    }

    /// After a write that found the disk full: whether there is more room now. What is here of
    /// the downloads `own` stays: the room is for them.
    pub(super) async fn make_room(
        &self,
        error: &PullError,
        own: HashSet<Digest>,
    ) -> Result<bool, PullError> {
        // What was refused with numbers has been tried already.
        if matches!(error.root(), PullError::Store(StoreError::NoRoom(_))) {
            return Ok(false);
        }
        let store = self.origins.store.clone();
        let make = move || {
            let room = store.space().disk()?;
            let floor = room.floor(store.space().options());
            let least = SpaceAmount { bytes: LEAST_ROOM, inodes: 0 };
            let goal = room.missing_until(floor.plus(least)).max(least);
            let freed = store.collector().collect_for(&Want::Room(goal), &own)?;
            Ok(!freed.is_nothing())
        };
        blocking(make).await
    }
}

/// Returns what the store has of a part, and whether that is all: the same content with another mode is copied, which
/// takes as much space as fetching it.
fn find(
    store: &Store,
    part: &Part,
    permissions: PermissionsRule,
) -> Result<(Option<Here>, bool), PullError> {
    let digest = part.descriptor.digest;
    Ok(match &part.rule {
        &PartRule::File(_, permissions) => {
            let (file, is_all) = find_file(store, FileWant { digest, permissions })?;
            (file.map(|file| Here::File { _file: file }), is_all)
        }
        PartRule::Archive(rule) => {
            let layer = store.layers().get(layer_key(digest, rule, permissions))?;
            let is_all = layer.is_some();
            (layer.map(|layer| Here::Layer { _layer: layer }), is_all)
        }
    })
}

fn find_file(store: &Store, want: FileWant) -> Result<(Option<StoredFile>, bool), PullError> {
    if let Some(permissions) = want.permissions
        && let Some(file) = store.files().get(FileKey { digest: want.digest, permissions })?
    {
        return Ok((Some(file), true));
    }
    let Some(source) = store.files().any_of(want.digest)? else { return Ok((None, false)) };
    let key = key_of(want, &source)?;
    match store.files().get(key)? {
        Some(file) => Ok((Some(file), true)),
        None => Ok((Some(source), false)),
    }
}

fn claim(part: &Part) -> Claim {
    let (blob, size) = (part.descriptor.digest, part.descriptor.size);
    match &part.rule {
        PartRule::File(..) => Claim::of_file(blob, size),
        PartRule::Archive(_) => {
            // Only a guess: what an archive really is, its first bytes say.
            let plain = part.descriptor.media_type.ends_with("tar");
            let factor = if plain { 1 } else { UNPACKED_PER_COMPRESSED };
            let unpacked = size.saturating_mul(factor);
            Claim {
                blob,
                bytes: size.saturating_add(unpacked),
                inodes: unpacked.div_ceil(ARCHIVE_BYTES_PER_INODE).saturating_add(2),
            }
        }
    }
}

/// The name of an archive's unpacked layer.
pub(super) fn layer_key(
    blob: Digest,
    rule: &ArchiveRule,
    permissions: PermissionsRule,
) -> LayerKey {
    // A digest that the archive must unpack to is checked while unpacking, so it is part of the name.
    let tar = rule.tar_digest.map(|digest| digest.hex()).unwrap_or_default();
    LayerKey::new(blob, &format!("{} {tar}", rule.decoder()), permissions.name())
}
