//! What both agents need and neither owns.

pub mod process;
