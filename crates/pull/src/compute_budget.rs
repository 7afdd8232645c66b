//! Memory and permits of computations: manifests that are parsed, trees that are planned and compared.

use std::sync::Arc;

use super::Memory;
use super::connection_slots::{Ask, Slot, Slots};
use super::error::PullError;
use super::memory::MemoryBudget;
use super::pull_progress::Progress;
use super::pull_tenant::Tenant;
use sys::background::Background;

/// The memory of all computations of a node, and the right to compute with it. Cheap to clone.
#[derive(Clone)]
pub(super) struct Computations {
    /// The memory of all pulls.
    pub(super) budget: MemoryBudget<Tenant>,
    permits: Slots,
    background: Background,
}

impl Computations {
    /// As many computations run at once as layers are unpacked.
    pub(super) fn new(
        budget: MemoryBudget<Tenant>,
        at_once: usize,
        background: Background,
    ) -> Self {
        let permits = Slots::without_reserve(at_once, background.clone());
        Self { budget, permits, background }
    }

    /// Waits for the memory of a computation of a flight.
    pub(super) async fn memory(&self, bytes: u64, flight: &Progress) -> Result<Memory, PullError> {
        let waits = |wait| flight.waits_for_memory(wait);
        let memory = self.budget.compute(flight.tenant(), bytes, waits);
        // Warming may hold the memory while it stands back.
        Ok(self.background.boost_while(memory).await?)
    }

    /// Waits for the memory of a computation that belongs to no flight.
    pub(super) async fn memory_of(&self, tenant: &Tenant, bytes: u64) -> Result<Memory, PullError> {
        let memory = self.budget.compute(tenant.clone(), bytes, |_| ());
        Ok(self.background.boost_while(memory).await?)
    }

    /// Waits for memory that is kept, outside of a flight, while a registry is asked.
    pub(super) async fn keep_of(&self, tenant: &Tenant, bytes: u64) -> Result<Memory, PullError> {
        let memory = self.budget.keep(tenant.clone(), bytes, |_| ());
        Ok(self.background.boost_while(memory).await?)
    }

    /// Waits for memory that a flight keeps while it waits for a registry.
    pub(super) async fn keep(&self, bytes: u64, flight: &Progress) -> Result<Memory, PullError> {
        let waits = |wait| flight.waits_for_memory(wait);
        let memory = self.budget.keep(flight.tenant(), bytes, waits);
        Ok(self.background.boost_while(memory).await?)
    }

    /// Waits for the right to compute with reserved memory.
    pub(super) async fn permit(&self, flight: &Arc<Progress>) -> Slot {
        self.permits.acquire(Ask::without_host(flight)).await
    }
}
