//! Two hosts on one machine: folders, identities and agents as real processes.
//!
//! Owns what every test with both agents, the benchmarks and the demo need: a certificate authority, a folder per host, the
//! destination agent, runs of the source agent. Processes are ended when their guard is dropped, by pid, and only those
//! that were started here. Agents are the very command lines of the binaries: one executable plays all of them, see [`role`].

pub mod doubt;
pub mod hosts;
pub mod leftovers;
pub mod process;
pub mod proxy;
pub mod qemu;
pub mod role;
pub mod scripts;
pub mod sim;
pub mod small_disk;
pub mod stage;

pub use hosts::{Host, Hosts};
pub use process::{Finished, Running};
pub use proxy::Proxy;
pub use sim::{SimGuest, SimSpec};
pub use small_disk::SmallDisk;
pub use stage::Stage;
