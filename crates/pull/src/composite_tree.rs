//! Several artifacts in one tree, each below its own folder.
//!
//! Each artifact is acquired as a volume of its own would be, by the same steps. The composite is then planned from
//! the trees, and links their files.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::artifact_request::Want;
use super::artifact_tree::LARGE_PLAN;
use super::compute_budget::Computations;
use super::content_repair::{ComparisonError, ContentReader, PartSource, is_shortage};
use super::error::PullError;
use super::pull_progress::Progress;
use super::pull_tenant::Caller;
use super::single_flight::{Flights, Outcome};
use super::{Memory, ProgressView, Puller, blocking};
use store::space_reservations::Claim;
use store::trees::TreePart;
use store::{Store, StoreError, Tree, TreeKey, give_memory_back};
use unpack::{Limits, RelativePath};

/// The most artifacts of one volume that are resolved or acquired at once.
const ARTIFACTS_AT_ONCE: usize = 4;

/// One of the artifacts of a volume.
#[derive(Clone, Debug)]
pub struct PlacedWant {
    /// The folder of the artifact's root; the root of the volume merges it with others.
    pub path: RelativePath,
    /// The request for the artifact itself.
    pub want: Want,
}

/// The failure of one of several artifacts, or of the tree of all of them.
#[derive(Clone, Debug)]
pub struct CompositeError {
    /// The number of the artifact in the list, from 0.
    pub artifact: Option<usize>,
    /// The failure, which other callers may share.
    pub source: Arc<PullError>,
}

impl From<Arc<PullError>> for CompositeError {
    fn from(source: Arc<PullError>) -> Self {
        Self { artifact: None, source }
    }
}

/// A tree of a composite.
#[derive(Clone, Debug)]
pub(super) struct PlacedTree {
    pub(super) path: RelativePath,
    pub(super) tree: Tree,
}

/// Makes composites of trees.
pub(super) struct Composer {
    pub(super) store: Store,
    pub(super) reader: Arc<ContentReader>,
    pub(super) computations: Computations,
    pub(super) limits: Limits,
    pub(super) flights: Flights<TreeKey, Tree>,
}

impl Puller {
    /// As [`Puller::cached`], of several artifacts. Blocking.
    pub fn cached_composite(&self, placed: &[PlacedWant]) -> Option<Tree> {
        let keys = placed
            .iter()
            .map(|PlacedWant { path, want }| Some((path_text(path), self.cached_key(want)?)));
        let key = TreeKey::of_parts(&keys.collect::<Option<Vec<_>>>()?);
        let tree = self.0.composer.store.trees().get(key).ok()??;
        let mut parts = placed.iter().zip(&tree.record.parts);
        let fits = parts.all(|(placed, part)| placed.want.check_bytes(part.bytes).is_ok());
        fits.then_some(tree)
    }

    /// As [`Puller::acquire`], of several artifacts. All are resolved and checked before the first one is
    /// downloaded.
    ///
    /// # Errors
    ///
    /// The failure of one artifact, or of the tree of all of them.
    pub async fn acquire_composite(
        &self,
        placed: &[PlacedWant],
        view: &ProgressView,
    ) -> Result<Tree, CompositeError> {
        let Some(PlacedWant { want, .. }) = placed.first() else {
            return Err(Arc::new(PullError::Crashed).into());
        };
        let resolved = each(placed, |number| async move {
            let want = &placed[number].want;
            let resolved = self.0.resolver.resolve(want).await?;
            self.check(want, &resolved).await?;
            Ok(resolved)
        });
        let resolved = &resolved.await?;
        let trees = each(placed, |number| async move {
            let PlacedWant { path, want } = &placed[number];
            let tree = self.sound_tree(want, &resolved[number], &view.part()).await?;
            Ok(PlacedTree { path: path.clone(), tree })
        });
        let composed = self.0.composer.compose(trees.await?, want.caller()).await;
        composed.map_err(CompositeError::from)
    }
}

/// Does something for each artifact, for a few at once. Returns the results in the order of the artifacts.
async fn each<T, F: Future<Output = Outcome<T>>>(
    placed: &[PlacedWant],
    work: impl Fn(usize) -> F,
) -> Result<Vec<T>, CompositeError> {
    let numbered = (0..placed.len()).map(|number| {
        let work = work(number);
        async move {
            let failed = |source| CompositeError { artifact: Some(number), source };
            Ok::<_, CompositeError>((number, work.await.map_err(failed)?))
        }
    });
    let done = stream::iter(numbered).buffer_unordered(ARTIFACTS_AT_ONCE);
    let mut done: Vec<(usize, T)> = done.try_collect().await?;
    done.sort_by_key(|(number, _)| *number);
    Ok(done.into_iter().map(|(_, done)| done).collect())
}

impl Composer {
    /// Returns the composite of some trees, from the store or made of them.
    pub(super) async fn compose(
        self: &Arc<Self>,
        trees: Vec<PlacedTree>,
        caller: Caller,
    ) -> Outcome<Tree> {
        let parts = trees.iter().map(|part| (path_text(&part.path), part.tree.key));
        let key = TreeKey::of_parts(&parts.collect::<Vec<_>>());
        let make = |progress| Arc::clone(self).make(key, Arc::new(trees), progress);
        self.flights.join(key, caller, make).outcome().await
    }

    async fn make(
        self: Arc<Self>,
        key: TreeKey,
        trees: Arc<Vec<PlacedTree>>,
        progress: Arc<Progress>,
    ) -> Result<Tree, PullError> {
        progress.name(format!("{} artifacts", trees.len()));
        let (composer, of) = (Arc::clone(&self), Arc::clone(&trees));
        let memory = move || {
            if let Some(tree) = composer.store.trees().get(key)? {
                return Ok(Err(tree));
            }
            let each = of.iter().map(|part| composer.reader.memory_of_tree(&part.tree));
            let each = each.collect::<Result<Vec<_>, _>>()?;
            let all = each.iter().copied().fold(0, u64::saturating_add);
            let all = with_largest_part(all, each.into_iter().max().unwrap_or_default());
            Ok(Ok(all.min(composer.computations.budget.most())))
        };
        let mut bytes = match blocking(memory).await? {
            Ok(bytes) => bytes,
            Err(tree) => return Ok(tree),
        };
        loop {
            let memory = self.computations.memory(bytes, &progress).await?;
            let permit = self.computations.permit(&progress).await;
            let (composer, trees) = (Arc::clone(&self), Arc::clone(&trees));
            let build = move || {
                let _permit = permit;
                composer.build_within(key, &trees, memory)
            };
            match blocking(build).await {
                Err(error) if is_shortage(&error) => {
                    bytes = self.computations.budget.bytes_of_next_try(bytes, 0);
                }
                done => return done,
            }
        }
    }

    /// Builds a composite within the memory that is reserved for its plan. Blocking.
    fn build_within(
        &self,
        key: TreeKey,
        trees: &[PlacedTree],
        mut memory: Memory,
    ) -> Result<Tree, PullError> {
        let parts: Vec<_> = trees
            .iter()
            .map(|PlacedTree { path, tree }| TreePart {
                path: path_text(path),
                manifest: tree.record.manifest,
                bytes: tree.record.bytes,
                view: tree.record.view.clone(),
            })
            .collect();
        let sources = trees.iter().zip(&parts);
        let sources = sources.map(|(PlacedTree { tree, .. }, part)| PartSource { tree, part });
        let planned = self.reader.compose(sources, &self.limits, memory.bytes());
        let planned = planned.map_err(|error| match error {
            ComparisonError::Node(error) | ComparisonError::Parts(error) => error,
            ComparisonError::Tree(what) => {
                StoreError::Damaged { path: format!("trees/{key}").into(), what }.into()
            }
        })?;
        let takes = planned.plan.memory_bytes();
        memory.shrink(takes);
        let claim = Claim::of_tree(key, &planned.plan);
        let _room = self.store.space().reserve_after(&[claim], &HashSet::new())?;
        let built = self.store.trees().build(&planned.plan, &planned.objects)?;
        drop(planned.plan);
        if takes >= LARGE_PLAN {
            give_memory_back();
        }
        let mut links = BTreeSet::new();
        for PlacedTree { tree, .. } in trees {
            links.extend(self.store.trees().links(tree)?);
        }
        Ok(self.store.trees().commit_linking(key, planned.record, built, links)?)
    }
}

/// Returns the memory to plan a composite, of which the largest part is planned beside it. A plan takes about half of
/// what merging takes.
pub(super) fn with_largest_part(all: u64, largest: u64) -> u64 {
    all.saturating_add(largest / 2)
}

/// Returns a path as it is recorded; empty for the root.
fn path_text(path: &RelativePath) -> String {
    String::from_utf8_lossy(path.as_bytes()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{MANIFEST, TestNode, TestRegistry, file_layer, image, is_root};
    use super::*;
    use oci::registry::RegistryError;
    use unpack::UnpackError;

    /// Adds an artifact of these files, each with its own name as content.
    fn push(registry: &TestRegistry, repository: &str, names: &[&str]) {
        let layer = |name: &&str| {
            registry.blob(repository, name.as_bytes());
            file_layer(name, name.as_bytes())
        };
        let layers: Vec<_> = names.iter().map(layer).collect();
        registry.manifest(repository, "latest", MANIFEST, &image(&layers));
    }

    fn placed(registry: &TestRegistry, parts: &[(&str, &str)]) -> Vec<PlacedWant> {
        let part = |&(repository, path): &(&str, &str)| {
            let path = RelativePath::parse(path.as_bytes(), &Limits::default()).expect("a path");
            PlacedWant { path, want: registry.want(repository) }
        };
        parts.iter().map(part).collect()
    }

    async fn pull(node: &TestNode, placed: &[PlacedWant]) -> Result<Tree, CompositeError> {
        node.puller.acquire_composite(placed, &ProgressView::default()).await
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_is_fetched_of_a_list_that_fails() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        push(&registry, "a", &["one"]);
        let wants = placed(&registry, &[("a", "a"), ("missing", "b"), ("a", "c")]);
        let CompositeError { artifact, source } =
            pull(&node, &wants).await.expect_err("one is missing");
        assert_eq!(artifact, Some(1));
        let is_missing =
            matches!(source.root(), PullError::Registry(RegistryError::NotFound { .. }));
        assert!(is_missing, "{source}");
        assert_eq!(registry.seen("blobs/").len(), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_composite_is_made_once_and_found_again() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        push(&registry, "a", &["one", "two"]);
        push(&registry, "b", &["two", "three"]);
        let wants = placed(&registry, &[("a", "."), ("b", "b")]);
        assert!(node.puller.cached_composite(&wants).is_none());
        if !is_root() {
            return;
        }
        let (one, two) = tokio::join!(pull(&node, &wants), pull(&node, &wants));
        let (one, two) = (one.expect("a tree"), two.expect("a tree"));
        assert_eq!((one.key, one.generation), (two.key, two.generation));
        // The root and a folder; the content that both have is one inode.
        assert_eq!((one.record.bytes, one.record.inodes), (3 + 3 + 5, 2 + 3));
        assert_eq!(one.record.parts.len(), 2);
        assert_eq!(one.record.manifest, TreePart::digest_of(&one.record.parts));
        let cached = node.puller.cached_composite(&wants).expect("a cached tree");
        assert_eq!(cached.key, one.key);
        let other = placed(&registry, &[("b", "b"), ("a", ".")]);
        assert!(node.puller.cached_composite(&other).is_none(), "the order counts");
        let requests = registry.seen("").len();
        let tree = pull(&node, &other).await.expect("another tree of the same");
        assert_ne!(tree.key, one.key);
        assert_eq!(registry.seen("").len(), requests);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn artifacts_that_collide_are_named_by_number() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        push(&registry, "a", &["one"]);
        push(&registry, "b", &["two", "one"]);
        if !is_root() {
            return;
        }
        let wants = placed(&registry, &[("a", "x"), ("a", "."), ("b", ".")]);
        let CompositeError { artifact, source } = pull(&node, &wants).await.expect_err("both");
        let collision = matches!(
            source.root(),
            PullError::Unpack(UnpackError::PartsCollide { one: 1, two: 2, .. })
        );
        assert!(collision && artifact.is_none(), "{source}");
    }
}
