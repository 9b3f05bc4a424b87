//! What a QEMU is made of, asked over QMP in one go.
//!
//! Owns the questions and the typed answers, alike for source and destination; it judges nothing (see `preflight`).
//! The questions are sent together, so that a whole inventory costs little more than one round trip: it
//! is taken again while the guest is paused.

use serde_json::{Value, json};
use vmferry_proto::spec::DeviceSpec;

use super::hmp::{self, RamBlock};
use super::qmp::{Qmp, QmpError, Version};
use crate::error::GuestError;

/// A disk with a medium.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    /// Name that is alike at both sides: the node's own, or that of its drive or device where QEMU made the node's up.
    pub(super) name: String,
    /// Name of the block node.
    pub(super) node: String,
    /// Bytes that the guest sees.
    pub(super) size: u64,
    /// Whether the guest cannot write it.
    pub(super) read_only: bool,
    /// Whether the node holds its image's locks and may be written (false after a migration that was not continued).
    pub(super) active: bool,
    /// Bytes that the image may still grow by, and the image's path, where it is a file.
    pub(super) image: String,
    /// Bytes that the image holds now.
    pub(super) allocated: u64,
    /// Its dirty bitmaps: name and count of dirty bytes.
    pub(super) bitmaps: Vec<(String, u64)>,
}

/// A block node, from the guest's disks down to the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockNode {
    pub(super) name: String,
    pub(super) driver: String,
    /// Whether it bypasses the page cache.
    pub(super) direct: bool,
    /// Its dirty bitmaps: name and count of dirty bytes.
    pub(super) bitmaps: Vec<(String, u64)>,
}

/// A block export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Export {
    pub(super) id: String,
    pub(super) kind: String,
}

/// What stays the same while a guest lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Machine {
    pub(super) version: Version,
    pub(super) uuid: Option<[u8; 16]>,
    /// Versioned machine type.
    pub(super) kind: String,
    pub(super) cpu_model: String,
    pub(super) vcpus: u32,
    /// A thread of a virtual CPU: proves which process is QEMU.
    pub(super) vcpu_thread: Option<u32>,
    /// Each word of CPU features that is not zero, with its place in CPUID.
    pub(super) cpu_features: Vec<(String, String)>,
    /// Back ends (`-object`): id and type.
    pub(super) objects: Vec<(String, String)>,
    /// `info network`.
    pub(super) network: String,
}

/// What may change while a guest runs, and must not while it is paused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) ram: Vec<RamBlock>,
    pub(super) devices: Vec<DeviceSpec>,
    pub(super) disks: Vec<Disk>,
    pub(super) nodes: Vec<BlockNode>,
}

/// The part of a layout that can change while a guest runs, cheap enough to be asked while it is paused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Changing {
    pub(super) ram: Vec<RamBlock>,
    /// Devices that were or can be plugged: id or number, and type.
    pub(super) plugged: Vec<(String, String)>,
    pub(super) disks: Vec<Disk>,
}

/// What stands in the way of a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Obstacles {
    /// `query-status`.
    pub(super) status: String,
    /// `blocked-reasons` of `query-migrate`.
    pub(super) blocked: Vec<String>,
    /// Status of a migration of QEMU's own.
    pub(super) migration: Option<String>,
    pub(super) exports: Vec<Export>,
    /// Running block jobs, by id.
    pub(super) jobs: Vec<String>,
}

async fn ask(qmp: &Qmp, command: &str) -> Result<Value, QmpError> {
    qmp.execute(command, json!({})).await
}

/// The run state, as `query-status` names it.
pub(super) async fn status(qmp: &Qmp) -> Result<String, QmpError> {
    let answer = ask(qmp, "query-status").await?;
    text(&answer, "status", "query-status")
}

fn text(answer: &Value, key: &str, command: &str) -> Result<String, QmpError> {
    answer[key]
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| QmpError::unexpected(command, answer))
}

fn list<'a>(answer: &'a Value, command: &str) -> Result<&'a Vec<Value>, QmpError> {
    answer
        .as_array()
        .ok_or_else(|| QmpError::unexpected(command, answer))
}

impl Machine {
    pub(super) async fn of(qmp: &Qmp) -> Result<Self, QmpError> {
        let (uuid, kind, cpus, objects, network) = tokio::try_join!(
            ask(qmp, "query-uuid"),
            qmp.execute("qom-get", json!({ "path": "/machine", "property": "type" })),
            ask(qmp, "query-cpus-fast"),
            qmp.execute("qom-list", json!({ "path": "/objects" })),
            qmp.human("info network"),
        )?;
        let cpus = list(&cpus, "query-cpus-fast")?;
        let first = cpus
            .first()
            .ok_or_else(|| QmpError::unexpected("query-cpus-fast", &"no CPU"))?;
        let path = text(first, "qom-path", "query-cpus-fast")?;
        let (cpu_model, features) = tokio::try_join!(
            qmp.execute("qom-get", json!({ "path": path, "property": "type" })),
            qmp.execute(
                "qom-get",
                json!({ "path": path, "property": "feature-words" })
            ),
        )?;
        let kind = kind.as_str().unwrap_or_default();
        Ok(Self {
            version: qmp.version().clone(),
            uuid: parse_uuid(uuid["UUID"].as_str().unwrap_or_default()),
            kind: kind.strip_suffix("-machine").unwrap_or(kind).to_owned(),
            cpu_model: cpu_model.as_str().unwrap_or_default().to_owned(),
            vcpus: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
            vcpu_thread: first["thread-id"]
                .as_u64()
                .and_then(|id| u32::try_from(id).ok()),
            cpu_features: cpu_features(&features),
            objects: children(&objects),
            network,
        })
    }
}

/// `child<TYPE>` entries of a `qom-list`.
fn children(answer: &Value) -> Vec<(String, String)> {
    let entries = answer.as_array().into_iter().flatten();
    entries
        .filter_map(|entry| {
            let kind = entry["type"]
                .as_str()?
                .strip_prefix("child<")?
                .strip_suffix('>')?;
            Some((entry["name"].as_str()?.to_owned(), kind.to_owned()))
        })
        .collect()
}

fn cpu_features(answer: &Value) -> Vec<(String, String)> {
    let words = answer.as_array().into_iter().flatten();
    let mut features: Vec<(String, String)> = words
        .filter_map(|word| {
            let value = word["features"].as_u64().filter(|value| *value != 0)?;
            let leaf = word["cpuid-input-eax"].as_u64()?;
            let sub = word["cpuid-input-ecx"].as_u64();
            let sub = sub.map_or(String::new(), |sub| format!(".{sub}"));
            let register = word["cpuid-register"].as_str()?;
            Some((format!("{leaf:x}{sub}.{register}"), format!("{value:#x}")))
        })
        .collect();
    features.sort();
    features
}

/// The sixteen bytes of a UUID; `None` for the one of zeroes that stands for "none".
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
    let mut out = [0; 16];
    if digits.len() != 32 {
        return None;
    }
    for (slot, pair) in out.iter_mut().zip(digits.chunks(2)) {
        *slot = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    (out != [0; 16]).then_some(out)
}

impl Layout {
    pub(super) async fn of(qmp: &Qmp) -> Result<Self, GuestError> {
        let (ram, tree, block, nodes) = tokio::try_join!(
            qmp.human("info ramblock"),
            qmp.human("info qtree"),
            ask(qmp, "query-block"),
            qmp.execute("query-named-block-nodes", json!({ "flat": true })),
        )?;
        let unclear = |command: &str, why: &String| QmpError::unexpected(command, why);
        let mut devices = hmp::device_tree(&tree).map_err(|why| unclear("info qtree", &why))?;
        devices.sort();
        Ok(Self {
            ram: hmp::ram_blocks(&ram).map_err(|why| unclear("info ramblock", &why))?,
            devices,
            disks: disks(&block)?,
            nodes: block_nodes(&nodes)?,
        })
    }

    /// Whether any node bypasses the page cache.
    pub(super) fn has_direct_io(&self) -> bool {
        self.nodes.iter().any(|node| node.direct)
    }
}

pub(super) fn disks(answer: &Value) -> Result<Vec<Disk>, QmpError> {
    let mut disks: Vec<Disk> = Vec::new();
    for device in list(answer, "query-block")? {
        let inserted = &device["inserted"];
        if inserted.is_null() {
            continue;
        }
        let disk =
            disk(device, inserted).ok_or_else(|| QmpError::unexpected("query-block", device))?;
        if !disks.iter().any(|known| known.node == disk.node) {
            disks.push(disk);
        }
    }
    disks.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(disks)
}

fn disk(device: &Value, inserted: &Value) -> Option<Disk> {
    let node = inserted["node-name"].as_str()?;
    let of_device = |key: &str| device[key].as_str().filter(|name| !name.is_empty());
    let name = if node.starts_with('#') {
        of_device("device").or_else(|| of_device("qdev"))?
    } else {
        node
    };
    let image = &inserted["image"];
    Some(Disk {
        name: name.to_owned(),
        node: node.to_owned(),
        size: image["virtual-size"].as_u64()?,
        read_only: inserted["ro"].as_bool()?,
        active: inserted["active"].as_bool().unwrap_or(true),
        image: image["filename"].as_str().unwrap_or_default().to_owned(),
        allocated: image["actual-size"].as_u64().unwrap_or(0),
        bitmaps: bitmaps(inserted),
    })
}

pub(super) fn block_nodes(answer: &Value) -> Result<Vec<BlockNode>, QmpError> {
    list(answer, "query-named-block-nodes")?
        .iter()
        .map(|node| {
            Ok(BlockNode {
                name: text(node, "node-name", "query-named-block-nodes")?,
                driver: text(node, "drv", "query-named-block-nodes")?,
                direct: node["cache"]["direct"].as_bool().unwrap_or(false),
                bitmaps: bitmaps(node),
            })
        })
        .collect()
}

fn bitmaps(node: &Value) -> Vec<(String, u64)> {
    let bitmaps = node["dirty-bitmaps"].as_array().into_iter().flatten();
    bitmaps
        .filter_map(|bitmap| {
            let name = bitmap["name"].as_str()?;
            Some((name.to_owned(), bitmap["count"].as_u64()?))
        })
        .collect()
}

impl Changing {
    /// Every device that is plugged into a running machine is in one of two containers, with or without an id of its own.
    pub(super) async fn of(qmp: &Qmp) -> Result<Self, GuestError> {
        let container = |path| qmp.execute("qom-list", json!({ "path": path }));
        let (ram, named, unnamed, block) = tokio::try_join!(
            qmp.human("info ramblock"),
            container("/machine/peripheral"),
            container("/machine/peripheral-anon"),
            ask(qmp, "query-block"),
        )?;
        let mut plugged = children(&named);
        plugged.extend(children(&unnamed));
        plugged.sort();
        Ok(Self {
            ram: hmp::ram_blocks(&ram)
                .map_err(|why| QmpError::unexpected("info ramblock", &why))?,
            plugged,
            disks: disks(&block)?,
        })
    }
}

impl Obstacles {
    pub(super) async fn of(qmp: &Qmp) -> Result<Self, QmpError> {
        let (status, migrate, exports, jobs) = tokio::try_join!(
            status(qmp),
            ask(qmp, "query-migrate"),
            exports(qmp),
            ask(qmp, "query-block-jobs"),
        )?;
        let jobs = list(&jobs, "query-block-jobs")?.iter();
        Ok(Self {
            status,
            blocked: blocked_reasons(&migrate),
            migration: migrate["status"].as_str().map(str::to_owned),
            exports,
            jobs: jobs
                .map(|job| job["device"].as_str().unwrap_or("?").to_owned())
                .collect(),
        })
    }
}

/// Why QEMU would refuse a migration of its own, from the answer to `query-migrate`.
pub(super) fn blocked_reasons(migrate: &Value) -> Vec<String> {
    let reasons = migrate["blocked-reasons"].as_array().into_iter().flatten();
    reasons
        .map(|reason| reason.as_str().unwrap_or("?").to_owned())
        .collect()
}

/// All block exports.
pub(super) async fn exports(qmp: &Qmp) -> Result<Vec<Export>, QmpError> {
    let answer = ask(qmp, "query-block-exports").await?;
    list(&answer, "query-block-exports")?
        .iter()
        .map(|export| {
            Ok(Export {
                id: text(export, "id", "query-block-exports")?,
                kind: text(export, "type", "query-block-exports")?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{block_nodes, children, cpu_features, disks, parse_uuid};

    #[test]
    fn a_disk_is_named_by_its_node_or_drive_or_device() {
        let medium = |node: &str, ro: bool| json!({"node-name": node, "ro": ro, "image": {"virtual-size": 512, "filename": "i"}});
        let answer = json!([
            {"device": "", "qdev": "/machine/peripheral-anon/device[0]/virtio-backend", "inserted": medium("root", false)},
            {"device": "old1", "qdev": "/q", "inserted": medium("#block111", false)},
            {"device": "", "qdev": "/machine/x", "inserted": medium("#block222", true)},
            {"device": "ide2-cd0", "removable": true},
            {"device": "twice", "inserted": medium("root", false)},
        ]);
        let found = disks(&answer).unwrap();
        let names: Vec<(&str, &str, bool)> = found
            .iter()
            .map(|disk| (disk.name.as_str(), disk.node.as_str(), disk.read_only))
            .collect();
        assert_eq!(
            names,
            [
                ("/machine/x", "#block222", true),
                ("old1", "#block111", false),
                ("root", "root", false)
            ]
        );
        assert!(disks(&json!([{"inserted": {"node-name": "x"}}])).is_err());
    }

    #[test]
    fn direct_nodes_and_bitmaps_are_seen() {
        let answer = json!([{"node-name": "f", "drv": "file", "cache": {"direct": true},
            "dirty-bitmaps": [{"name": "vmferry-0-1", "count": 65536, "busy": false}]}]);
        let nodes = block_nodes(&answer).unwrap();
        assert!(nodes[0].direct);
        assert_eq!(nodes[0].bitmaps, [("vmferry-0-1".to_owned(), 65536)]);
    }

    #[test]
    fn a_uuid_of_zeroes_is_none() {
        assert_eq!(parse_uuid("00000000-0000-0000-0000-000000000000"), None);
        assert_eq!(
            parse_uuid("12345678-1234-1234-1234-123456789abc").unwrap()[..2],
            [0x12, 0x34]
        );
        assert_eq!(parse_uuid("é2345678-1234-1234-1234-123456789ab"), None);
    }

    #[test]
    fn feature_words_are_named_by_their_place_in_cpuid() {
        let answer = json!([
            {"cpuid-register": "EDX", "cpuid-input-eax": 1, "features": 126_614_525},
            {"cpuid-register": "EBX", "cpuid-input-ecx": 0, "cpuid-input-eax": 7, "features": 0},
            {"cpuid-register": "EDX", "cpuid-input-ecx": 2, "cpuid-input-eax": 7, "features": 3},
        ]);
        let wanted =
            [("1.EDX", "0x78bfbfd"), ("7.2.EDX", "0x3")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(cpu_features(&answer), wanted);
        let objects = json!([{"name": "type", "type": "string"}, {"name": "m0", "type": "child<memory-backend-file>"}]);
        assert_eq!(
            children(&objects),
            [("m0".to_owned(), "memory-backend-file".to_owned())]
        );
    }
}
