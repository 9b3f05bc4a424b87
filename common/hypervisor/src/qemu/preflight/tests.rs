//! Each reason to refuse, and each difference, by itself.

use vmferry_proto::spec::{DeviceSpec, GuestSpec, RunState};

use super::super::describe;
use super::super::hmp::RamBlock;
use super::super::inventory::{BlockNode, Disk, Export, Layout, Machine, Obstacles};
use super::super::qmp::Version;
use super::{mismatches, source, too_large};
use crate::space::bytes_in_use;

fn machine() -> Machine {
    Machine {
        version: Version {
            major: 9,
            minor: 2,
            micro: 1,
        },
        uuid: Some([7; 16]),
        kind: "pc-q35-8.0".to_owned(),
        cpu_model: "qemu64-x86_64-cpu".to_owned(),
        vcpus: 2,
        vcpu_thread: None,
        cpu_features: vec![("1.EDX".to_owned(), "0x78bfbfd".to_owned())],
        objects: vec![("m0".to_owned(), "memory-backend-file".to_owned())],
        network: "net0: index=0,type=nic,model=virtio-net-pci\r\n \\ n0: index=0,type=tap\r\n"
            .to_owned(),
    }
}

fn disk(name: &str, read_only: bool) -> Disk {
    Disk {
        name: name.to_owned(),
        node: name.to_owned(),
        size: 1 << 30,
        read_only,
        active: true,
        image: "image".to_owned(),
        allocated: 4096,
        bitmaps: Vec::new(),
    }
}

fn layout() -> Layout {
    Layout {
        ram: vec![RamBlock {
            name: "pc.ram".to_owned(),
            used: 1 << 20,
            total: 1 << 20,
            host: 0x7f00_0000_0000,
            huge_pages: false,
        }],
        devices: vec![device("main-system-bus/net0", "virtio-net-pci")],
        disks: vec![disk("disk0", false), disk("cd0", true)],
        nodes: vec![node("disk0", "raw")],
    }
}

fn device(path: &str, kind: &str) -> DeviceSpec {
    DeviceSpec {
        path: path.to_owned(),
        kind: kind.to_owned(),
    }
}

fn node(name: &str, driver: &str) -> BlockNode {
    BlockNode {
        name: name.to_owned(),
        driver: driver.to_owned(),
        direct: false,
        bitmaps: Vec::new(),
    }
}

fn obstacles() -> Obstacles {
    Obstacles {
        status: "running".to_owned(),
        blocked: Vec::new(),
        migration: None,
        exports: Vec::new(),
        jobs: Vec::new(),
    }
}

fn spec() -> GuestSpec {
    let name = "web-1".parse().unwrap();
    describe::spec(&name, &machine(), &layout(), RunState::Running, Vec::new())
}

/// The one refusal that `change` brings about.
fn refusal(change: impl Fn(&mut Machine, &mut Layout, &mut Obstacles)) -> String {
    let (mut machine, mut layout, mut obstacles) = (machine(), layout(), obstacles());
    change(&mut machine, &mut layout, &mut obstacles);
    let refusals = source(&machine, &layout, &obstacles);
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    refusals[0].clone()
}

/// The one difference that `change` at the destination brings about.
fn difference(change: impl Fn(&mut Machine, &mut Layout)) -> String {
    let (mut machine, mut layout) = (machine(), layout());
    change(&mut machine, &mut layout);
    let differences = mismatches(&spec(), &machine, &layout, &[]);
    assert_eq!(differences.len(), 1, "{differences:?}");
    differences[0].clone()
}

#[test]
fn an_ordinary_guest_may_leave_and_its_like_fits() {
    assert!(source(&machine(), &layout(), &obstacles()).is_empty());
    assert!(mismatches(&spec(), &machine(), &layout(), &[]).is_empty());
    assert!(too_large(&spec()).is_empty());
}

#[test]
fn each_obstacle_is_named() {
    let said = |text: String, parts: &[&str]| {
        parts
            .iter()
            .for_each(|part| assert!(text.contains(part), "{part:?} is not in {text:?}"));
    };
    said(
        refusal(|machine, _, _| machine.version.major = 7),
        &["7.2.1", "8.0"],
    );
    for state in [
        "prelaunch",
        "shutdown",
        "suspended",
        "io-error",
        "inmigrate",
        "guest-panicked",
        "watchdog",
    ] {
        said(
            refusal(|_, _, obstacles| obstacles.status = state.to_owned()),
            &[state],
        );
    }
    said(
        refusal(|_, _, obstacles| {
            obstacles.blocked = vec!["device nvme is not migratable.".to_owned()];
        }),
        &["nvme"],
    );
    said(
        refusal(|_, _, obstacles| obstacles.migration = Some("active".to_owned())),
        &["migrate_cancel"],
    );
    for kind in [
        "vhost-user-fs-pci",
        "vhost-vdpa-device-pci",
        "vhost-scsi-pci",
        "vfio-pci",
        "ivshmem-plain",
    ] {
        said(
            refusal(|_, layout, _| layout.devices.push(device("bus/x1", kind))),
            &["bus/x1", kind],
        );
    }
    let crypto = ("c0".to_owned(), "cryptodev-vhost-user".to_owned());
    said(
        refusal(|machine, _, _| machine.objects.push(crypto.clone())),
        &["object c0"],
    );
    for kind in ["vhost-user", "vhost-vdpa"] {
        let line = format!(" \\ n7: index=0,type={kind},chardev\r\n");
        said(
            refusal(|machine, _, _| machine.network.push_str(&line)),
            &["back end n7", kind],
        );
    }
    for driver in super::DMA_DRIVERS {
        said(
            refusal(|_, layout, _| layout.nodes.push(node("n3", driver))),
            &["n3", driver],
        );
    }
    let backup = Export {
        id: "backup".to_owned(),
        kind: "nbd".to_owned(),
    };
    said(
        refusal(|_, _, obstacles| obstacles.exports.push(backup.clone())),
        &["backup"],
    );
    said(
        refusal(|_, _, obstacles| obstacles.jobs.push("mirror0".to_owned())),
        &["mirror0"],
    );
    said(
        refusal(|_, layout, _| layout.disks.push(disk("disk0", false))),
        &["same name disk0"],
    );
    said(refusal(|_, layout, _| layout.disks[0].size = 0), &["disk0"]);
}

#[test]
fn our_own_exports_are_no_obstacle() {
    let mut obstacles = obstacles();
    obstacles.exports.push(Export {
        id: "vmferry-disk0".to_owned(),
        kind: "nbd".to_owned(),
    });
    assert!(source(&machine(), &layout(), &obstacles).is_empty());
}

#[test]
fn each_difference_names_both_values_and_the_cure() {
    let said = |text: String, parts: &[&str]| {
        parts
            .iter()
            .for_each(|part| assert!(text.contains(part), "{part:?} is not in {text:?}"));
    };
    said(
        difference(|machine, _| machine.kind = "pc-q35-9.0".to_owned()),
        &["pc-q35-8.0", "pc-q35-9.0", "-machine"],
    );
    said(
        difference(|machine, _| machine.cpu_model = "max-x86_64-cpu".to_owned()),
        &["qemu64", "max", "-cpu"],
    );
    said(
        difference(|machine, _| machine.vcpus = 3),
        &["2 at", "3 here", "-smp"],
    );
    said(
        difference(|machine, _| machine.uuid = None),
        &["0707", "none", "-uuid"],
    );
    said(
        difference(|machine, _| machine.version.minor = 1),
        &["9.2.1", "9.1.1", "older"],
    );
    said(
        difference(|machine, _| machine.cpu_features[0].1 = "0x1".to_owned()),
        &["1.EDX", "0x78bfbfd", "0x1"],
    );
    said(
        difference(|_, layout| layout.ram[0].used = 4096),
        &["pc.ram", "1048576", "4096"],
    );
    said(
        difference(|_, layout| layout.ram.clear()),
        &["pc.ram", "missing"],
    );
    said(
        difference(|_, layout| layout.disks[0].size = 512),
        &["disk0", "1073741824", "512", "qemu-img"],
    );
    said(
        difference(|_, layout| layout.disks.push(disk("more", false))),
        &["more", "not at the source"],
    );
    said(
        difference(|_, layout| layout.disks.truncate(1)),
        &["disk/cd0", "read-only", "missing"],
    );
    said(
        difference(|_, layout| layout.devices[0].kind = "e1000".to_owned()),
        &["virtio-net-pci", "e1000"],
    );
}

#[test]
fn a_newer_qemu_and_another_use_of_space_fit() {
    let (mut machine, mut layout) = (machine(), layout());
    machine.version.major = 10;
    layout.disks[0].allocated = 1 << 20;
    assert!(mismatches(&spec(), &machine, &layout, &[]).is_empty());
    assert_eq!(bytes_in_use(&spec(), "disk0"), Some(4096));
    assert_eq!(bytes_in_use(&spec(), "cd0"), None);
}

#[test]
fn a_disk_that_is_shared_at_one_side_only_does_not_fit() {
    let shared = vec!["disk0".to_owned()];
    let differences = mismatches(&spec(), &machine(), &layout(), &shared);
    assert!(
        differences
            .iter()
            .any(|text| text.contains("disk disk0 of 1073741824 bytes is missing")),
        "{differences:?}"
    );
    assert!(
        differences
            .iter()
            .any(|text| text.contains("disk/disk0 (shared")),
        "{differences:?}"
    );
}

#[test]
fn a_guest_beyond_the_protocols_limits_is_refused_before_it_is_described() {
    let mut spec = spec();
    spec.devices.push(device(&"x".repeat(600), "y"));
    spec.regions[0].len.0 = u64::MAX;
    assert_eq!(too_large(&spec).len(), 2);
}
