//! Plants faults in a guest's memory from outside, so that a test can show that they are found.
//!
//! Owns looking into and writing to another process through `/proc/PID/mem`. What is written there the guest sees at
//! once: it is its RAM.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use vmferry_judge::content::{MARK, UNIT};

const CHUNK: usize = 256 * UNIT;

/// Finds a page of the judge with page number `index` in the RAM of QEMU `pid`, and returns its address there.
///
/// `ram` is the size of the guest's RAM in bytes: the mapping of that size is searched.
pub fn find_judged_page(pid: u32, ram: u64, index: u64) -> Result<u64> {
    let memory = open(pid, false)?;
    let mut chunk = vec![0; CHUNK];
    for (start, end) in mappings(pid)? {
        if end - start != ram {
            continue;
        }
        for at in (start..end).step_by(CHUNK) {
            memory.read_exact_at(&mut chunk, at)?;
            let found = chunk.chunks_exact(UNIT).position(|page| {
                page.starts_with(&MARK.to_le_bytes()) && page[8..16] == index.to_le_bytes()
            });
            if let Some(page) = found {
                return Ok(at + (page * UNIT) as u64);
            }
        }
    }
    anyhow::bail!("page {index} of the judge is not in the memory of QEMU {pid}")
}

/// Reads `length` bytes of the memory of process `pid`.
pub fn read_memory(pid: u32, address: u64, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    open(pid, false)?.read_exact_at(&mut bytes, address)?;
    Ok(bytes)
}

/// Writes into the memory of process `pid`.
pub fn write_memory(pid: u32, address: u64, bytes: &[u8]) -> Result<()> {
    Ok(open(pid, true)?.write_all_at(bytes, address)?)
}

fn open(pid: u32, write: bool) -> Result<File> {
    let path = format!("/proc/{pid}/mem");
    OpenOptions::new()
        .read(true)
        .write(write)
        .open(&path)
        .context(path)
}

/// Start and end of each mapping; those of one size that touch are what the kernel says, not merged.
fn mappings(pid: u32) -> Result<Vec<(u64, u64)>> {
    let path = format!("/proc/{pid}/maps");
    let text = fs::read_to_string(&path).context(path)?;
    let range = |line: &str| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        Some((hex(start)?, hex(end)?))
    };
    Ok(text.lines().filter_map(range).collect())
}
