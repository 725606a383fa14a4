//! The journal: round trips, damage at every byte, killed processes, full disks, locks.

mod children;
mod damage;
mod entry;
mod events;
mod keeping;
mod round_trip;
mod support;
