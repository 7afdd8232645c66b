//! Dynamic provisioning: makes a `PersistentVolume` for each claim of a class of the driver.
//!
//! ```text
//! template            ${pvc.name} and the like -> text of one claim
//! class_parameters    parameters of a StorageClass -> templates, secret and allowed repositories
//! plan                facts in, decisions out: lookups, volumes, and refusals with their reason
//! controller          watches objects, asks registries, writes what the plan decides
//! ```
//!
//! A volume has no storage behind it: it names an artifact, which nodes pull when a pod is
//! published. So there is no state besides the objects, and a restarted process continues where the
//! last one ended.

pub mod class_parameters;
pub mod controller;
pub mod plan;
pub mod template;
