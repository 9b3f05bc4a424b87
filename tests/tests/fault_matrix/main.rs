//! Every fault at every phase: what is killed or cut, when, and where the guest must be afterwards.
//!
//! The tables are the point of this program; the rest brings a migration to the phase, strikes, lets everybody do what an administrator
//! would (start the dead agent again, run `recover`), and then asks: does the guest run on exactly one side, whole; is nothing left on the other;
//! do the journals name one owner; does it move once more. `sim` goes through all of it with the embedded guest. `qemu` does so
//! with a real one, of which each case takes some ten seconds: a fixed half of them, in which every phase and every victim is struck, is run
//! always, and all of them by `cargo test -p vmferry-tests --test fault_matrix -- --ignored`. `owned` is the moment that no victim's row has: between
//! OWNED and the start. Clocks that jump are no row: no decision reads the wall clock (`owner` only shows it), which `clock` shows.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod clock;
mod disk;
mod fault;
mod owned;
mod qemu;
mod sim;

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
