//! `vmferry-certs`: makes the private CA and the identities of the hosts.
//!
//! Owns the command line only; the work is done by the library. Exit codes: 0 done, 1 failed, 2 wrong usage.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use vmferry_certs::{CertificateAuthority, HostRequest, Issued, SubjectName, Validity};

/// Makes the private CA of a vmferry installation and the identities of its hosts.
#[derive(Debug, Parser)]
#[command(name = "vmferry-certs", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a private CA: DIR/ca.pem and DIR/ca.key. Keep ca.key away from the hosts.
    Init {
        /// Folder of the CA; made where it is missing.
        dir: PathBuf,
        /// Days for which the CA is valid.
        #[arg(long, default_value_t = 3650)]
        days: u32,
    },
    /// Issue the identity of a host: DIR2/cert.pem, DIR2/key.pem and DIR2/ca.pem.
    Issue {
        /// Folder of the CA.
        dir: PathBuf,
        /// Name of the host, as guest files (`from = ["NAME"]`) and `--to NAME:PORT` say it.
        #[arg(long, value_name = "HOST")]
        name: String,
        /// Further IP address or DNS name under which the host is reached; may be repeated.
        #[arg(long, value_name = "IP|DNS")]
        address: Vec<SubjectName>,
        /// Folder for the identity; made where it is missing.
        #[arg(long, value_name = "DIR2")]
        out: PathBuf,
        /// Days for which the certificate is valid, at most as long as the CA.
        #[arg(long, default_value_t = 365)]
        days: u32,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Init { dir, days } => {
            let made = CertificateAuthority::create(&dir, Validity::days(days)?)
                .with_context(|| format!("no CA was made in {}", dir.display()))?;
            println!("CA {:?}", made.authority.name());
            report(&made.issued);
            println!(
                "next: vmferry-certs issue {} --name HOST --address IP --out DIR2, once for each host",
                dir.display()
            );
        }
        Command::Issue {
            dir,
            name,
            address,
            out,
            days,
        } => {
            let validity = Validity::days(days)?;
            let request = HostRequest {
                name,
                addresses: address,
                validity,
            };
            let issued = CertificateAuthority::load(&dir)
                .and_then(|authority| authority.issue(&request, &out))
                .with_context(|| format!("no identity was issued for {}", request.name))?;
            println!("identity of {}", request.name);
            report(&issued);
            println!(
                "next: bring {} to {} as /etc/vmferry/identity, readable by root only",
                out.display(),
                request.name
            );
        }
    }
    Ok(())
}

fn report(issued: &Issued) {
    for path in &issued.files {
        println!("  wrote {}", path.display());
    }
    println!("  valid {}", issued.validity);
    if issued.cut_to_authority {
        println!("  (ends with the CA, earlier than asked for)");
    }
}
