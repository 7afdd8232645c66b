//! `crds`: the definitions of the kinds that the controller and the nodes work with.

use super::{Failure, print_text};
use preload::api::definitions;

/// Prints both.
pub(super) fn run() -> Result<(), Failure> {
    print_text(definitions::yaml()?.trim_end());
    Ok(())
}
