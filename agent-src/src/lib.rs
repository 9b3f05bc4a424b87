//! The source agent: drives a migration of a running guest to another host.

pub mod cli;
pub mod explain;
pub mod policy;
pub mod progress;
pub mod report;

pub mod command;
mod desk;
pub mod durable;
pub mod error;
pub mod lanes;
pub mod local;
pub mod migrate;
mod outcome;
pub mod run;
pub mod saved;
pub mod session;
pub mod settings;
pub mod words;
