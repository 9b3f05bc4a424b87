//! What the tests that need both agents share.
//!
//! Owns harnesses only: nothing here is part of the product. Each module says what it plays.

pub mod bench;
pub mod demo;
pub mod harness;
pub mod lab;
pub mod link;
pub mod model;
pub mod simulation;
pub mod skip;
