//! Formats the references of the configuration's list, for `status` and `inspect`.

use super::text_table;
use crate::proto::admin::WarmReference;
use crate::proto::admin::warm_reference::State;
use text::human_units::Bytes;

/// Returns a summary such as `3 of 5 references present, 1 failed`.
pub(super) fn summary(all: &[WarmReference]) -> String {
    let count = |state| all.iter().filter(|warm| warm.state() == state).count();
    let mut text = format!("{} of {} references present", count(State::Present), all.len());
    for state in [State::Pulling, State::Waiting, State::Failed] {
        match count(state) {
            0 => {}
            number => text = format!("{text}, {number} {}", state.name()),
        }
    }
    text
}

/// Returns a line for each reference that needs one: those that are present without more to say have none.
pub(super) fn lines(all: &[WarmReference]) -> impl Iterator<Item = String> {
    all.iter()
        .filter_map(|warm| Some(format!("            {}: {}", warm.reference, describe(warm)?)))
}

/// Describes the state of a reference, or returns `None` if it is present without more to say.
pub(super) fn describe(warm: &WarmReference) -> Option<String> {
    let next = warm.next_seconds.map_or(" now".to_owned(), |seconds| format!(" in {seconds}s"));
    match (warm.state(), warm.reason.as_str(), warm.newer_digest.as_str()) {
        (State::Present, "", "") | (State::Unspecified, ..) => None,
        (State::Present, "", newer) => Some(format!(
            "its tag means {} by now, which is here too; pods with IfNotPresent get {}",
            text_table::short(newer),
            text_table::short(&warm.digest)
        )),
        (State::Present, reason, _) => Some(format!("present; again{next}, as {reason}")),
        (State::Pulling, ..) => {
            let (done, total) = (Bytes(warm.done_bytes), Bytes(warm.total_bytes));
            Some(format!("pulling, {done} of {total}"))
        }
        (State::Waiting, ..) => Some(format!("waiting, begins{next}")),
        (State::Failed, reason, _) => Some(format!("failed; again{next}: {reason}")),
    }
}
