//! Packs judge and modules into an initramfs: a cpio archive in the `newc` format.
//!
//! Owns the format and the file in the cache, which is named by its content, so that parallel tests share it and a
//! changed judge gets a new one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vmferry_judge::{MODULE_FOLDER, MODULE_ORDER};
use xxhash_rust::xxh3::xxh3_128;

use super::cache;
use super::kernel::Kernel;

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Builds the initramfs for `judge` and `kernel` and returns its path.
pub(crate) fn build(judge: &Path, kernel: &Kernel) -> Result<PathBuf> {
    let judge = fs::read(judge).with_context(|| judge.display().to_string())?;
    let mut archive = Archive::default();
    archive.entry("dev", FOLDER, (0, 0), b"")?;
    // The kernel opens the console for init, Rust's start-up wants the null device: both before devtmpfs is there.
    archive.entry("dev/console", CHARACTER_DEVICE, (5, 1), b"")?;
    archive.entry("dev/null", CHARACTER_DEVICE, (1, 3), b"")?;
    archive.entry("init", PROGRAM, (0, 0), &judge)?;
    let folder = MODULE_FOLDER.trim_start_matches('/');
    archive.entry(folder, FOLDER, (0, 0), b"")?;
    let mut order = String::new();
    for module in &kernel.modules {
        let name = module
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let name = name.split(".ko").next().unwrap_or_default();
        archive.entry(
            &format!("{folder}/{name}.ko"),
            FILE,
            (0, 0),
            &unpacked(module)?,
        )?;
        order += &format!("{name}.ko\n");
    }
    archive.entry(
        &format!("{folder}/{MODULE_ORDER}"),
        FILE,
        (0, 0),
        order.as_bytes(),
    )?;
    store(&archive.finish()?)
}

/// The plain module: distributions pack them in different ways.
fn unpacked(module: &Path) -> Result<Vec<u8>> {
    let program = match module.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        Some(_) | None => return fs::read(module).with_context(|| module.display().to_string()),
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(module)
        .output()
        .with_context(|| format!("{program}, to unpack {}", module.display()))?;
    ensure!(
        output.status.success(),
        "{program} -dc {}: {}",
        module.display(),
        output.status
    );
    Ok(output.stdout)
}

/// Writes the archive beside its final name and renames it: a reader sees all of it or nothing.
fn store(archive: &[u8]) -> Result<PathBuf> {
    let path = cache().join(format!("initramfs-{:032x}.cpio", xxh3_128(archive)));
    if !path.exists() {
        fs::create_dir_all(cache())?;
        let draft = tempfile::NamedTempFile::new_in(cache())?;
        fs::write(draft.path(), archive)?;
        draft.persist(&path)?;
    }
    Ok(path)
}

/// A growing archive.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(data.len()).context("a file of the initramfs is too large")?;
        let name_size = u32::try_from(name.len() + 1)?;
        // inode, mode, uid, gid, links, mtime, size, device of the file (2), device node (2), name size, check
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, (0, 0), b"")?;
        Ok(self.bytes)
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_layout_of_newc() {
        let mut archive = Archive::default();
        archive.entry("a/b", FILE, (0, 0), b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[14..22], b"000081a4");
        assert_eq!(&bytes[54..62], b"00000005", "size");
        assert_eq!(&bytes[110..114], b"a/b\0");
        // Header and name end on a multiple of four, data too.
        assert_eq!(&bytes[116..121], b"hello");
        assert_eq!(&bytes[124..130], b"070701");
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
    }
}
