//! A hash table of nodes by folder and name, which holds hashes in place of names.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;

use super::number;
use super::tree_nodes::{MergeNode, ROOT};

/// A keyed hash of a folder and a name. It has 128 bits, so that two names of a tree never collide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct NameHash([u64; 2]);

/// Nodes by the hash of their name.
#[derive(Debug, Default)]
pub(super) struct NameTable {
    keys: [RandomState; 2],
    /// Numbers of nodes, each at its hash or the next free slot after it. Their count is a power of
    /// two, or zero.
    slots: Vec<u32>,
}

/// An empty slot: the root, which has no name, is never in the table.
const FREE: u32 = ROOT;

impl NameTable {
    pub(super) fn hash(&self, folder: u32, name: &[u8]) -> NameHash {
        NameHash(self.keys.each_ref().map(|key| key.hash_one((folder, name))))
    }

    /// Returns the node with this name, removed or not.
    pub(super) fn find(&self, nodes: &[MergeNode], hash: NameHash) -> Option<u32> {
        if self.slots.is_empty() {
            return None;
        }
        self.places(hash)
            .map(|place| self.slots[place])
            .take_while(|&node| node != FREE)
            .find(|&node| nodes[node as usize].hash == hash)
    }

    /// Adds a node whose name is not in the table.
    pub(super) fn insert(&mut self, nodes: &[MergeNode], node: u32) {
        // At most two thirds of the slots are in use, so that probing is short.
        if nodes.len() * 3 > self.slots.len() * 2 {
            let larger = (nodes.len() * 2).next_power_of_two().max(64);
            self.slots = Vec::new();
            self.slots.resize(larger, FREE);
            (1..number(nodes.len())).for_each(|node| self.place(nodes, node));
        } else {
            self.place(nodes, node);
        }
    }

    fn place(&mut self, nodes: &[MergeNode], node: u32) {
        let mut places = self.places(nodes[node as usize].hash);
        if let Some(free) = places.find(|&place| self.slots[place] == FREE) {
            self.slots[free] = node;
        }
    }

    /// Returns all slots in probing order.
    fn places(&self, hash: NameHash) -> impl Iterator<Item = usize> + use<> {
        let mask = self.slots.len() - 1;
        #[expect(clippy::cast_possible_truncation, reason = "its lowest bits are wanted")]
        let start = hash.0[0] as usize;
        (0..=mask).map(move |step| start.wrapping_add(step) & mask)
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        (self.slots.len() * size_of::<u32>()) as u64
    }
}
