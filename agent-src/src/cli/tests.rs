//! What can be typed, what comes of it, and what is refused with which exit code.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{CommandFactory, Parser};
use vmferry_common::congestion::Congestion;
use vmferry_common::units::Rate;
use vmferry_hypervisor::config::{DiskMode, DriverKind};

use super::options::{guest_file, load};
use super::{
    Cli, Command, CompressMode, HostPort, MigrateArgs, MigrateOptions, UsageError, Verify,
};
use crate::policy::{Cutover, OnStall};

const BY_SOCKET: &str = "migrate --qmp /run/q.sock --name web-1 --to beta:7447";

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("vmferry-src").chain(line.split_whitespace()))
}

fn migrate(line: &str) -> MigrateArgs {
    match parse(line).unwrap().command {
        Command::Migrate(args) => *args,
        other => panic!("{other:?} is no migrate"),
    }
}

fn options(more: &str) -> Result<MigrateOptions, UsageError> {
    migrate(&format!("{BY_SOCKET} {more}")).into_options()
}

#[test]
fn the_command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn defaults_are_those_of_the_manual() {
    let options = options("").unwrap();
    assert_eq!(options.guest.name.as_str(), "web-1");
    assert_eq!(options.guest.driver, DriverKind::Qemu);
    assert_eq!(options.guest.qmp.as_deref(), Some(Path::new("/run/q.sock")));
    assert_eq!(options.identity, PathBuf::from("/etc/vmferry/identity"));
    assert_eq!(options.state, PathBuf::from("/var/lib/vmferry"));
    assert_eq!(options.hooks, PathBuf::from("/etc/vmferry/hooks"));
    assert_eq!(options.limits.max_downtime, Duration::from_millis(300));
    assert_eq!(options.limits.pause_timeout, None);
    assert_eq!(options.limits.timeout, Duration::from_secs(3600));
    assert_eq!(options.limits.on_stall, OnStall::Abort);
    assert_eq!(options.limits.cutover, Cutover::Auto);
    assert_eq!((options.lanes, options.connections), (16, 1));
    assert_eq!(options.compress, CompressMode::Auto);
    assert_eq!(options.verify, Verify::Off);
    assert_eq!(options.max_bandwidth, None);
    assert_eq!(options.congestion, Congestion::Model);
    assert!(!options.json);
}

#[test]
fn every_option_reaches_the_engine() {
    let options = options(
        "--cutover manual --max-downtime 1s --pause-timeout 2s --max-bandwidth 1Gbit --timeout 2h --on-stall force \
         --lanes 32 --connections 4 --congestion cubic --compress 3 --verify full --hooks /h --identity /i --state /s --json",
    )
    .unwrap();
    assert_eq!(options.limits.cutover, Cutover::Manual);
    assert_eq!(options.limits.max_downtime, Duration::from_secs(1));
    assert_eq!(options.limits.pause_timeout, Some(Duration::from_secs(2)));
    assert_eq!(options.limits.timeout, Duration::from_secs(7200));
    assert_eq!(options.limits.on_stall, OnStall::Force);
    assert_eq!(options.max_bandwidth, Some(Rate(125_000_000)));
    assert_eq!((options.lanes, options.connections), (32, 4));
    assert_eq!(options.congestion, Congestion::Cubic);
    assert_eq!(options.compress, CompressMode::Level(3));
    assert_eq!(options.verify, Verify::Full);
    assert_eq!(options.hooks, PathBuf::from("/h"));
    assert_eq!(options.identity, PathBuf::from("/i"));
    assert_eq!(options.state, PathBuf::from("/s"));
    assert!(options.json);
}

#[test]
fn wrong_usage_is_refused_with_exit_code_2() {
    for line in [
        "",
        "migrate",
        "migrate web-1",
        "migrate --to beta:7447",
        "migrate --qmp /q --to beta:7447",
        "migrate --name web-1 --to beta:7447",
        "migrate web-1 --name web-1 --to beta:7447",
        "migrate web-1 --qmp /q --name web-1 --to beta:7447",
        "migrate --qmp /q --name ../x --to beta:7447",
        "migrate web-1 --to beta",
        "migrate web-1 --to beta:7447 --max-downtime 300",
        "migrate web-1 --to beta:7447 --max-bandwidth 1000",
        "migrate web-1 --to beta:7447 --cutover never",
        "migrate web-1 --to beta:7447 --on-stall throttle",
        "migrate web-1 --to beta:7447 --lanes 0",
        "migrate web-1 --to beta:7447 --lanes 65",
        "migrate web-1 --to beta:7447 --connections 0",
        "migrate web-1 --to beta:7447 --connections 17",
        "migrate web-1 --to beta:7447 --congestion bbr",
        "migrate web-1 --to beta:7447 --compress 0",
        "migrate web-1 --to beta:7447 --compress 20",
        "migrate web-1 --to beta:7447 --compress best",
        "migrate web-1 --to beta:7447 -v -q",
        "status",
        "status a/b",
        "cutover web-1 web-2",
        "set web-1",
        "set web-1 max-bandwidth",
        "set web-1 max-bandwidth=5",
        "set web-1 timeout=1h",
        "resolve web-1",
        "explain a b",
        "unknown",
    ] {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}: {error}");
    }
}

#[test]
fn combinations_that_make_no_sense_are_refused_with_both_values() {
    for (more, expected) in [
        (
            "--max-downtime 0s",
            "--max-downtime 0 ms is out of range: use more than 0 and at most 1 h 00 min",
        ),
        (
            "--max-downtime 2h",
            "--max-downtime 2 h 00 min is out of range: use more than 0 and at most 1 h 00 min",
        ),
        (
            "--timeout 0ms",
            "--timeout 0 ms is out of range: use more than 0 and at most 8784 h 00 min",
        ),
        (
            "--timeout 99years",
            "--timeout 867834 h 00 min is out of range: use more than 0 and at most 8784 h 00 min",
        ),
        (
            "--max-downtime 1s --pause-timeout 500ms",
            "--pause-timeout 500 ms is shorter than --max-downtime 1 s: every longer cutover that is allowed would be \
             rolled back",
        ),
        (
            "--lanes 2 --connections 3",
            "--connections 3 needs at least as many --lanes, and those are 2",
        ),
    ] {
        assert_eq!(options(more).unwrap_err().to_string(), expected, "{more}");
    }
}

#[test]
fn compress_takes_words_and_levels() {
    for (text, expected) in [
        ("auto", CompressMode::Auto),
        ("off", CompressMode::Off),
        ("1", CompressMode::Level(1)),
        ("19", CompressMode::Level(19)),
        ("-7", CompressMode::Level(-7)),
    ] {
        assert_eq!(
            options(&format!("--compress {text}")).unwrap().compress,
            expected
        );
        assert_eq!(expected.to_string(), text);
    }
}

#[test]
fn destinations_are_names_or_addresses_with_a_port() {
    for (text, host, port) in [
        ("beta:7447", "beta", 7447),
        ("beta.example.org:1", "beta.example.org", 1),
        ("192.0.2.7:65535", "192.0.2.7", 65535),
        ("[2001:db8::7]:7447", "2001:db8::7", 7447),
        ("[2001:0DB8:0::7]:7447", "2001:db8::7", 7447),
    ] {
        let parsed: HostPort = text.parse().unwrap();
        assert_eq!((parsed.host.as_str(), parsed.port), (host, port));
        assert_eq!(parsed.to_string().parse(), Ok(parsed));
    }
    for bad in [
        "",
        "beta",
        "beta:",
        ":7447",
        "beta:0",
        "beta:65536",
        "beta:+1",
        "beta:7447x",
        "2001:db8::7:7447",
        "[::1]",
        "[beta]:7447",
        "a b:1",
        "a/b:1",
        "-a:1",
        "a..b:1",
        "ä:1",
        "user@beta:1",
    ] {
        let error = bad.parse::<HostPort>().expect_err(bad).to_string();
        assert!(error.contains("is not HOST:PORT"), "{error}");
    }
}

#[test]
fn a_bare_name_is_looked_up_and_a_path_is_taken_as_it_is() {
    let file = |argument| guest_file(argument, Path::new("/g")).unwrap();
    assert_eq!(file("web-1"), PathBuf::from("/g/web-1.toml"));
    assert_eq!(file("web.1"), PathBuf::from("/g/web.1.toml"));
    assert_eq!(file("./web-1"), PathBuf::from("./web-1"));
    assert_eq!(file("web-1.toml"), PathBuf::from("web-1.toml"));
    for bad in ["..", "web 1", ""] {
        let error = guest_file(bad, Path::new("/g")).unwrap_err();
        assert!(
            matches!(error, UsageError::GuestArgument(_)),
            "{bad}: {error}"
        );
    }
}

#[test]
fn guest_files_are_read_and_their_faults_named() {
    let folder = tempfile::tempdir().unwrap();
    let write = |text: &str| {
        let path = folder.path().join("guest.toml");
        std::fs::write(&path, text).unwrap();
        path
    };
    let config = load(&write(
        "name = \"web-1\"\ndriver = \"qemu\"\nqmp = \"/q\"\n[[disk]]\nnode = \"d0\"\nmode = \"shared\"\n",
    ))
    .unwrap();
    assert_eq!(config.name.as_str(), "web-1");
    assert_eq!(config.disks[0].mode, DiskMode::Shared);

    for (text, expected) in [
        (
            "name = \"web-1\"\ndriver = \"qemu\"\n",
            "has driver = \"qemu\" but no qmp: add qmp = \"PATH\"",
        ),
        (
            "name = \"web-1\"\ndriver = \"sim\"\nqmp = \"/q\"\n",
            "has driver = \"sim\" but no socket: add socket = \"PATH\"",
        ),
        ("name = \"web-1\"\n", "is not understood"),
        (
            "name = \"../x\"\ndriver = \"sim\"\nsocket = \"/q\"\n",
            "is not understood",
        ),
        (
            "name = \"w\"\ndriver = \"sim\"\nsocket = \"/q\"\nsokcet = 1\n",
            "is not understood",
        ),
        ("name = ", "is not understood"),
    ] {
        let error = load(&write(text)).unwrap_err().to_string();
        assert!(error.contains(expected), "{text:?}: {error}");
    }

    let absent = load(&folder.path().join("none.toml"))
        .unwrap_err()
        .to_string();
    assert!(
        absent.contains("there is none; create it, or use --qmp"),
        "{absent}"
    );
    let long = write(&"#".repeat(2 << 20));
    assert!(matches!(load(&long), Err(UsageError::TooLong { .. })));
}

#[test]
fn a_guest_file_is_used_for_migrate() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("g.toml");
    std::fs::write(
        &path,
        "name = \"sim-1\"\ndriver = \"sim\"\nsocket = \"/s\"\n",
    )
    .unwrap();
    let args = migrate(&format!("migrate {} --to beta:7447", path.display()));
    assert_eq!(args.into_options().unwrap().guest.driver, DriverKind::Sim);
}

#[test]
fn guest_commands_take_a_name_a_state_folder_and_json() {
    for command in ["status", "cutover", "cancel", "owner"] {
        let parsed = parse(&format!("{command} web-1 --state /s --json -q")).unwrap();
        assert_eq!(parsed.log.quiet, 1);
        let (Command::Status(args)
        | Command::Cutover(args)
        | Command::Cancel(args)
        | Command::Owner(args)) = parsed.command
        else {
            panic!("{command} is something else");
        };
        assert_eq!(args.name.as_str(), "web-1");
        assert_eq!(args.state, PathBuf::from("/s"));
        assert!(args.json);
    }
    let Command::Recover(args) = parse("recover web-1 --identity /i").unwrap().command else {
        panic!("no recover");
    };
    assert_eq!(args.identity, Some(PathBuf::from("/i")));
    assert_eq!(args.guest.state, PathBuf::from("/var/lib/vmferry"));
    let Command::Resolve(args) = parse("resolve web-1 --destination-is-fenced")
        .unwrap()
        .command
    else {
        panic!("no resolve");
    };
    assert!(args.destination_is_fenced);
}

#[test]
fn the_long_help_names_every_option_unit_and_exit_code() {
    let mut command = Cli::command();
    let migrate = command.find_subcommand_mut("migrate").unwrap();
    let help = migrate.render_long_help().to_string();
    for word in [
        "--qmp",
        "--name",
        "--to",
        "--identity",
        "--state",
        "--cutover",
        "--max-downtime",
        "--pause-timeout",
        "--max-bandwidth",
        "--timeout",
        "--on-stall",
        "--lanes",
        "--connections",
        "--compress",
        "--verify",
        "--hooks",
        "--json",
        "EXAMPLES",
        "UNITS",
        "EXIT STATUS",
        "  3  in doubt",
    ] {
        assert!(help.contains(word), "{word} is missing in:\n{help}");
    }
    assert!(
        command
            .render_long_help()
            .to_string()
            .contains("EXIT STATUS")
    );
}
