//! What QEMU tells only as text for people: RAM blocks with their addresses, and the tree of devices.
//!
//! Owns the parsing of `info ramblock` (QEMU >= 8.0, which shows host addresses) and `info qtree`. A text that is not
//! understood is an error that shows the line, never a shorter list.

use vmferry_proto::spec::DeviceSpec;

/// A block of the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RamBlock {
    /// Its name, the same for the same command line.
    pub(super) name: String,
    /// Bytes in use.
    pub(super) used: u64,
    /// Bytes it can grow to.
    pub(super) total: u64,
    /// Address of its first byte in QEMU.
    pub(super) host: u64,
    /// Whether its pages are larger than 4 KiB.
    pub(super) huge_pages: bool,
}

/// Parses `info ramblock`.
///
/// # Errors
/// The line that is not understood.
pub(super) fn ram_blocks(text: &str) -> Result<Vec<RamBlock>, String> {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    match lines.next() {
        Some(title) if title.contains("Block Name") && title.contains("HVA") => {}
        Some(title) => return Err(format!("no host addresses under {:?}", title.trim())),
        None => return Err("an empty answer".to_owned()),
    }
    lines
        .map(|line| ram_block(line).ok_or_else(|| format!("line {:?}", line.trim())))
        .collect()
}

/// `NAME  4 KiB  OFFSET USED TOTAL HVA  rw`, read from the right since a name may hold spaces.
fn ram_block(line: &str) -> Option<RamBlock> {
    let mut fields = line.split_ascii_whitespace().rev();
    let _access = fields.next()?;
    let host = hex(fields.next()?)?;
    let total = hex(fields.next()?)?;
    let used = hex(fields.next()?)?;
    let _offset = hex(fields.next()?)?;
    let page = (fields.next()?, fields.next()?);
    let mut name: Vec<&str> = fields.collect();
    name.reverse();
    let block = RamBlock {
        name: name.join(" "),
        used,
        total,
        host,
        huge_pages: page != ("KiB", "4"),
    };
    let sound = !block.name.is_empty() && used <= total && used > 0 && host != 0;
    sound.then_some(block)
}

fn hex(field: &str) -> Option<u64> {
    u64::from_str_radix(field.strip_prefix("0x")?, 16).ok()
}

/// A device or bus whose children are being read.
#[derive(Debug)]
struct Open {
    indent: usize,
    path: String,
    /// Index in the list, for a device.
    device: Option<usize>,
}

/// Parses `info qtree`: every device by bus, and id, address or kind and number on that bus.
///
/// # Errors
/// The line that is not understood.
pub(super) fn device_tree(text: &str) -> Result<Vec<DeviceSpec>, String> {
    let mut devices: Vec<DeviceSpec> = Vec::new();
    let mut open: Vec<Open> = Vec::new();
    for line in text.lines() {
        let content = line.trim_start();
        let indent = line.len() - content.len();
        let content = content.trim_end();
        if let Some(bus) = content.strip_prefix("bus: ") {
            open.retain(|outer| outer.indent < indent);
            let path = join(open.last(), bus);
            open.push(Open {
                indent,
                path,
                device: None,
            });
        } else if let Some(device) = content.strip_prefix("dev: ") {
            open.retain(|outer| outer.indent < indent);
            let (kind, id) = device
                .split_once(", id \"")
                .and_then(|(kind, id)| Some((kind, id.strip_suffix('"')?)))
                .ok_or_else(|| format!("line {content:?}"))?;
            let path = join(open.last(), id);
            let path = if id.is_empty() {
                numbered(&devices, &format!("{path}{kind}"))
            } else {
                path
            };
            open.push(Open {
                indent,
                path: path.clone(),
                device: Some(devices.len()),
            });
            let kind = kind.to_owned();
            devices.push(DeviceSpec { path, kind });
        } else if let Some(address) = content.strip_prefix("addr = ") {
            name_by_address(&mut open, &mut devices, indent, address);
        }
    }
    if devices.is_empty() {
        return Err("no device in it".to_owned());
    }
    Ok(devices)
}

fn join(outer: Option<&Open>, name: &str) -> String {
    outer.map_or_else(|| name.to_owned(), |outer| format!("{}/{name}", outer.path))
}

/// `stem[N]` with the first N that is free.
fn numbered(devices: &[DeviceSpec], stem: &str) -> String {
    let taken = |path: &String| devices.iter().any(|device| device.path == *path);
    let mut number = 0usize;
    loop {
        let path = format!("{stem}[{number}]");
        if !taken(&path) {
            return path;
        }
        number += 1;
    }
}

/// A device without an id is better known by its place on the bus than by its number.
fn name_by_address(open: &mut [Open], devices: &mut [DeviceSpec], indent: usize, address: &str) {
    let Some(Open {
        indent: outer,
        path,
        device: Some(index),
    }) = open.last_mut()
    else {
        return;
    };
    let Some(device) = devices.get_mut(*index) else {
        return;
    };
    if *outer < indent && path.ends_with(']') {
        let bus = path.rsplit_once('/').map_or("", |(bus, _)| bus);
        *path = format!("{bus}/{address}");
        device.path.clone_from(path);
    }
}

#[cfg(test)]
mod tests {
    use super::{device_tree, ram_blocks};

    const RAM: &str = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n\
                    pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f8e93e00000  rw\r\n\
    /rom@etc/acpi/tables    4 KiB  0x0000000005100000 0x0000000000020000 0x0000000000200000 0x00007f8ee0c00000  ro\r\n\
             a name of three    2 MiB  0x0000000004000000 0x0000000000040000 0x0000000000040000 0x00007f8ee8200000  ro\r\n\r\n";

    #[test]
    fn ram_blocks_are_read_with_used_size_and_address() {
        let blocks = ram_blocks(RAM).unwrap();
        assert_eq!(blocks.len(), 3);
        assert_eq!(
            (blocks[0].name.as_str(), blocks[0].host),
            ("pc.ram", 0x7f8e_93e0_0000)
        );
        assert_eq!((blocks[1].used, blocks[1].total), (0x2_0000, 0x20_0000));
        assert_eq!(blocks[2].name, "a name of three");
        assert_eq!(
            blocks
                .iter()
                .map(|block| block.huge_pages)
                .collect::<Vec<_>>(),
            [false, false, true]
        );
    }

    #[test]
    fn a_listing_without_addresses_or_with_a_broken_line_is_an_error() {
        let old = "              Block Name    PSize              Offset               Used              Total\r\n";
        assert!(ram_blocks(old).unwrap_err().contains("host addresses"));
        let broken = RAM.replace("0x00007f8ee0c00000", "0x0000000000000000");
        assert!(ram_blocks(&broken).unwrap_err().contains("acpi"));
        assert!(ram_blocks("").is_err());
    }

    const TREE: &str = "bus: main-system-bus\r
  type System\r
  dev: hpet, id \"\"\r
    timers = 3 (0x3)\r
  dev: q35-pcihost, id \"\"\r
    addr-like = 1\r
    bus: pcie.0\r
      type PCIE\r
      dev: virtio-blk-pci, id \"\"\r
        addr = 05.0\r
        bus: virtio-bus\r
          type virtio-pci-bus\r
          dev: virtio-blk-device, id \"\"\r
            drive = \"old1\"\r
      dev: virtio-net-pci, id \"net0\"\r
        addr = 03.0\r
      dev: ICH9-LPC, id \"\"\r
        addr = 1f.0\r
        bus: isa.0\r
          type ISA\r
          dev: isa-i8259, id \"\"\r
          dev: isa-i8259, id \"\"\r
  dev: fw_cfg_io, id \"\"\r
";

    #[test]
    fn devices_are_named_by_id_or_place() {
        let devices = device_tree(TREE).unwrap();
        let found: Vec<(&str, &str)> = devices
            .iter()
            .map(|device| (device.path.as_str(), device.kind.as_str()))
            .collect();
        let pci = "main-system-bus/q35-pcihost[0]/pcie.0";
        let wanted = [
            ("main-system-bus/hpet[0]".to_owned(), "hpet"),
            ("main-system-bus/q35-pcihost[0]".to_owned(), "q35-pcihost"),
            (format!("{pci}/05.0"), "virtio-blk-pci"),
            (
                format!("{pci}/05.0/virtio-bus/virtio-blk-device[0]"),
                "virtio-blk-device",
            ),
            (format!("{pci}/net0"), "virtio-net-pci"),
            (format!("{pci}/1f.0"), "ICH9-LPC"),
            (format!("{pci}/1f.0/isa.0/isa-i8259[0]"), "isa-i8259"),
            (format!("{pci}/1f.0/isa.0/isa-i8259[1]"), "isa-i8259"),
            ("main-system-bus/fw_cfg_io[0]".to_owned(), "fw_cfg_io"),
        ];
        let wanted: Vec<(&str, &str)> = wanted
            .iter()
            .map(|(path, kind)| (path.as_str(), *kind))
            .collect();
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_tree_that_is_not_understood_is_an_error() {
        assert!(device_tree("").is_err());
        assert!(device_tree("bus: b\n  dev: strange\n").is_err());
    }
}
