//! Bytes to a manifest, its layers' rules, and an index's choice.

use oci::Platform;
use oci::manifest::Manifest;
use unpack::Limits;
use unpack::layer_rule::{LayerRule, UnpackMode, classify};

/// Runs one input.
pub(super) fn run(bytes: &[u8]) {
    let limits = Limits { layers: 100, ..Limits::default() };
    match Manifest::parse(bytes, None, limits.manifest()) {
        Ok(Manifest::Image(manifest)) => match classify(&manifest, UnpackMode::Auto, &limits) {
            Ok(rules) => {
                assert_eq!(rules.len(), manifest.layers.len());
                for rule in rules {
                    if let LayerRule::File(rule) = rule {
                        assert!(!rule.path.is_root());
                        assert!(rule.path.components().all(|name| name != b".."));
                    }
                }
            }
            Err(error) => assert!(error.to_string().len() < 1024),
        },
        Ok(Manifest::Index(index)) => {
            let _ = index.choose(&Platform::of_this_node());
        }
        Err(error) => drop(error.to_string()),
    }
}
