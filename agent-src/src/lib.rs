//! The source agent: drives a migration of a running guest to another host.

pub mod cli;
pub mod explain;
pub mod policy;
pub mod progress;
pub mod report;
