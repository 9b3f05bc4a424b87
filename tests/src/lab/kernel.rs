//! Finds a kernel and the virtio modules that go with it.
//!
//! Owns where they are looked for: `VMFERRY_LAB_KERNEL`, then `vmferry-lab/kernel` in the target folder (a kernel
//! package unpacked with `dpkg -x`), then this machine's own `/boot`. Nothing is downloaded here.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::cache;

/// Modules of the guest in the order in which they can be loaded.
const MODULES: [&str; 10] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "failover",
    "net_failover",
    "virtio_net",
];

/// A kernel with its modules.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Compressed image, as QEMU's `-kernel` takes it.
    pub(crate) image: PathBuf,
    /// Files of the modules that are not built in, in the order of loading.
    pub(crate) modules: Vec<PathBuf>,
}

/// Finds a kernel, or says where it was looked for and how to get one.
pub(crate) fn find() -> Result<Kernel> {
    let mut tried = Vec::new();
    for root in roots() {
        match find_in(&root) {
            Ok(kernel) => return Ok(kernel),
            Err(error) => tried.push(format!("{}: {error}", root.display())),
        }
    }
    let folder = cache().join("kernel");
    bail!(
        "no kernel for the test guest ({}); get one without installing it:\n  \
         package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \\(linux-image-[0-9].*\\)/\\1/p')\n  \
         cd /tmp && apt-get download \"$package\" && dpkg -x \"$package\"_*.deb {}",
        tried.join("; "),
        folder.display()
    )
}

fn roots() -> Vec<PathBuf> {
    std::env::var_os("VMFERRY_LAB_KERNEL").map_or_else(
        || vec![cache().join("kernel"), PathBuf::from("/")],
        |root| vec![root.into()],
    )
}

fn find_in(root: &Path) -> Result<Kernel> {
    let mut images: Vec<_> = fs::read_dir(root.join("boot"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| file_name(path).starts_with("vmlinuz-"))
        .collect();
    // Cloud kernels first: they boot fastest. Then the newest name.
    images.sort_by_key(|path| (file_name(path).contains("cloud"), path.clone()));
    let mut reason = String::from("no boot/vmlinuz-*");
    for image in images.into_iter().rev() {
        match modules_for(root, &image) {
            Ok(modules) => return Ok(Kernel { image, modules }),
            Err(error) => reason = format!("{}: {error}", image.display()),
        }
    }
    bail!(reason)
}

fn modules_for(root: &Path, image: &Path) -> Result<Vec<PathBuf>> {
    let name = file_name(image);
    let version = name.trim_start_matches("vmlinuz-");
    let Some(folder) = ["lib/modules", "usr/lib/modules"]
        .map(|folder| root.join(folder).join(version))
        .into_iter()
        .find(|folder| folder.is_dir())
    else {
        bail!("no lib/modules/{version}");
    };
    let built_in = fs::read_to_string(folder.join("modules.builtin"))?;
    let mut files = Vec::new();
    for part in ["drivers", "net/core"] {
        walk(&folder.join("kernel").join(part), &mut files);
    }
    let mut modules = Vec::new();
    for module in MODULES {
        let plain = format!("{module}.ko");
        let found = files.iter().find(|file| {
            file_name(file)
                .strip_prefix(&plain)
                .is_some_and(|rest| ["", ".xz", ".zst", ".gz"].contains(&rest))
        });
        match found {
            Some(file) => modules.push(file.clone()),
            None if built_in.contains(&format!("/{plain}\n")) => {}
            None => bail!("no module {module}"),
        }
    }
    Ok(modules)
}

/// Collects the files below `folder`; what cannot be read is not there.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, files);
        } else {
            files.push(path);
        }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
