//! A stage: host alpha that sends, host beta whose agent receives, and what a test asks of both afterwards.
//!
//! Owns the set-up that nearly every test with both agents begins with, and the questions with which it ends: is the guest here,
//! unharmed and alone, and is nothing left of it there. Each question panics with both agents' logs, since a
//! stage is for tests.

use std::path::Path;
use std::time::{Duration, Instant};

use super::hosts::{Agent, Host, Hosts};
use super::process::{Finished, Running, descriptors};
use super::role::{Programs, Role};
use super::sim::{SimGuest, SimSpec};

/// How long something that must come true may take.
pub const SOON: Duration = Duration::from_secs(30);
/// How long a slow copy may take to come so far.
const IN_COPY: Duration = Duration::from_secs(120);

/// Two hosts and the agent of the second.
#[derive(Debug)]
pub struct Stage {
    /// Sends.
    pub alpha: Host,
    /// Receives.
    pub beta: Host,
    /// The agent of beta.
    pub agent: Agent,
    /// Both of them; last, so that its folder goes last.
    pub hosts: Hosts,
}

impl Stage {
    /// Sets it up; `executable` plays the programs.
    ///
    /// # Panics
    /// It cannot be set up.
    #[must_use]
    pub fn set(executable: &str) -> Self {
        Self::set_with(executable, &[])
    }

    /// As [`set`](Self::set), with further arguments for the agent.
    ///
    /// # Panics
    /// It cannot be set up.
    #[must_use]
    pub fn set_with(executable: &str, more: &[&str]) -> Self {
        let programs = Programs::played_by(Path::new(executable));
        let hosts = Hosts::new(programs).unwrap_or_else(|error| panic!("hosts: {error:#}"));
        let host = |name| {
            hosts
                .host(name)
                .unwrap_or_else(|error| panic!("host {name}: {error:#}"))
        };
        let (alpha, beta) = (host("alpha"), host("beta"));
        let agent = beta
            .serve(more)
            .unwrap_or_else(|error| panic!("the agent of beta: {error:#}"));
        Self {
            alpha,
            beta,
            agent,
            hosts,
        }
    }

    /// Starts a guest at alpha; beta takes it from alpha.
    ///
    /// # Panics
    /// It does not come up.
    #[must_use]
    pub fn guest(&self, spec: SimSpec) -> SimGuest {
        let guest = SimGuest::start(spec, &self.alpha).unwrap_or_else(|error| panic!("{error:#}"));
        guest
            .expect_at(&self.beta, &["alpha"])
            .unwrap_or_else(|error| panic!("{error:#}"));
        guest
    }

    /// Migrates `guest` from alpha to beta and waits for the end.
    ///
    /// # Panics
    /// The command cannot be run.
    #[must_use]
    pub fn migrate(&self, guest: &SimGuest, more: &[&str]) -> Finished {
        self.alpha
            .migrate(guest.name(), self.agent.port, more)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", self.agent_log()))
    }

    /// Begins to migrate `guest` from alpha to beta.
    ///
    /// # Panics
    /// The command cannot be run.
    #[must_use]
    pub fn begin(&self, guest: &SimGuest, more: &[&str]) -> Running {
        self.alpha
            .start_migrate(guest.name(), self.agent.port, more)
            .unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// What the destination agent has said.
    #[must_use]
    pub fn agent_log(&self) -> String {
        self.agent.process.stderr()
    }

    /// Panics unless `done` ended with `code`; with everything that both said.
    ///
    /// # Panics
    /// It did not.
    pub fn expect_code(&self, done: &Finished, code: i32) {
        assert_eq!(
            done.code(),
            code,
            "exit code; the source said\n{}{}\nthe destination said\n{}",
            done.stdout,
            done.stderr,
            self.agent_log()
        );
    }

    /// The guest goes on at beta, whole, and there is nothing of it at alpha.
    ///
    /// # Panics
    /// Anything else.
    pub fn expect_moved(&self, guest: &SimGuest) {
        guest
            .wait_for_beats(20)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", self.agent_log()));
        guest
            .verify_on(&self.beta)
            .unwrap_or_else(|error| panic!("{error:#}"));
        assert!(!guest.is_on(&self.alpha), "the guest is still at alpha");
        self.expect_beats(guest);
    }

    /// The guest goes on at alpha, whole, and beta is as if it had never been sent.
    ///
    /// # Panics
    /// Anything else.
    pub fn expect_stayed(&self, guest: &SimGuest) {
        guest
            .wait_for_beats(20)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", self.agent_log()));
        guest
            .verify_on(&self.alpha)
            .unwrap_or_else(|error| panic!("{error:#}"));
        self.expect_beats(guest);
        self.expect_clean(guest);
    }

    /// Migrates `guest` from alpha to beta: it must arrive.
    ///
    /// # Panics
    /// It does not.
    pub fn expect_moves(&self, guest: &SimGuest, more: &[&str]) {
        let done = self.migrate(guest, more);
        self.expect_code(&done, 0);
        self.expect_moved(guest);
    }

    /// The guest's process at alpha has the descriptors that it had `before`: nobody tracks it any more.
    ///
    /// # Panics
    /// It has others.
    pub fn expect_traceless(&self, guest: &SimGuest, before: &[String]) {
        let mut now = Vec::new();
        let as_before = soon(|| {
            now = descriptors(guest.first_pid());
            now == before
        });
        assert!(as_before, "descriptors {before:?} became {now:?}");
    }

    fn expect_beats(&self, guest: &SimGuest) {
        guest
            .beats()
            .and_then(|beats| beats.check())
            .unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// Nothing is left of the guest at beta: no process, no socket, no file in the run folder.
    ///
    /// # Panics
    /// Something is left.
    pub fn expect_clean(&self, guest: &SimGuest) {
        let mut left = Vec::new();
        let clean = soon(|| {
            left = guest.traces_on(&self.beta);
            left.is_empty()
        });
        assert!(clean, "left at beta: {left:?}\n{}", self.agent_log());
    }
}

/// What the source agent on `host` says of the migration of `guest`, as long as there is one.
#[must_use]
pub fn status(host: &Host, guest: &str) -> Option<serde_json::Value> {
    let status = host.ask(Role::Source, "status", guest, &["--json"]).ok()?;
    status.json().ok()
}

/// Waits until `running`, which migrates `guest` from `host`, has accounted for so many bytes at the destination.
///
/// # Panics
/// It ends before.
pub fn wait_for_bytes(host: &Host, guest: &str, running: &mut Running, bytes: u64) {
    let seen = running.wait_for("the middle of the copy", IN_COPY, |_, _| {
        (status(host, guest)?["bytes_done"].as_u64()? > bytes).then_some(())
    });
    seen.unwrap_or_else(|error| panic!("{error:#}"));
}

/// Whether `holds` comes true within [`SOON`].
pub fn soon(mut holds: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    loop {
        if holds() {
            return true;
        }
        if began.elapsed() > SOON {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
