//! The handover: never two running guests, and nothing lost.

mod permit;

pub use permit::RunPermit;
