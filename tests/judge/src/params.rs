//! The judge's parameters, as words `judge.KEY=VALUE` of the kernel command line.
//!
//! Owns their names, defaults and text form in both directions: the lab writes them, the judge reads them.
//! An unknown key or a bad value is an error: the judge stops with it instead of testing something else.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::content::Content;

/// What the judge does. Rates are per second of the guest's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    /// Bytes of memory to fill; must fit into the guest beside kernel and program (leave 100 MiB).
    pub memory: u64,
    /// What memory and disks are filled with.
    pub content: Content,
    /// Bytes of memory rewritten per second.
    pub dirty: u64,
    /// Bytes from the beginning of the filled memory that are rewritten at all; all of it if larger.
    pub working_set: u64,
    /// Bytes of memory checked per second.
    pub verify: u64,
    /// Disks to work on, by kernel name (`vda`).
    pub disks: Vec<String>,
    /// Bytes written per second to each disk.
    pub disk: u64,
    /// Bytes read back and checked per second from each disk.
    pub disk_verify: u64,
    /// Whether writes bypass the guest's page cache (checking reads always do).
    pub direct: bool,
    /// Whether the disks are read through the page cache too, which then holds them: a guest that has used its disks.
    pub cached: bool,
    /// Start of all random choices and contents.
    pub seed: u64,
    /// Time between two beats.
    pub beat: Duration,
    /// Power off after this time.
    pub shutdown_after: Option<Duration>,
    /// Reboot after this time, on each boot anew.
    pub reboot_after: Option<Duration>,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            memory: 64 << 20,
            content: Content::Mixed,
            dirty: 8 << 20,
            working_set: u64::MAX,
            verify: 64 << 20,
            disks: Vec::new(),
            disk: 2 << 20,
            disk_verify: 4 << 20,
            direct: true,
            cached: false,
            seed: 1,
            beat: Duration::from_millis(1),
            shutdown_after: None,
            reboot_after: None,
        }
    }
}

/// A parameter that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kernel command line: {word}: {why}")]
pub struct ParamError {
    word: String,
    why: &'static str,
}

impl FromStr for Params {
    type Err = ParamError;

    /// Reads the words that begin with `judge.`; the others belong to the kernel.
    fn from_str(line: &str) -> Result<Self, ParamError> {
        let mut params = Self::default();
        for word in line.split_whitespace() {
            if let Some(pair) = word.strip_prefix("judge.") {
                params.set(pair).map_err(|why| ParamError {
                    word: word.into(),
                    why,
                })?;
            }
        }
        Ok(params)
    }
}

impl Params {
    fn set(&mut self, pair: &str) -> Result<(), &'static str> {
        let (key, value) = pair.split_once('=').ok_or("has no value")?;
        match key {
            "mem" => self.memory = bytes(value)?,
            "content" => self.content = content(value)?,
            "dirty" => self.dirty = bytes(value)?,
            "ws" => self.working_set = bytes(value)?,
            "verify" => self.verify = bytes(value)?,
            "disks" => {
                self.disks = value
                    .split(',')
                    .filter(|name| !name.is_empty())
                    .map(Into::into)
                    .collect();
            }
            "disk" => self.disk = bytes(value)?,
            "disk_verify" => self.disk_verify = bytes(value)?,
            "direct" => self.direct = flag(value)?,
            "cached" => self.cached = flag(value)?,
            "seed" => self.seed = number(value)?,
            "beat_us" => self.beat = Duration::from_micros(number(value)?.max(1)),
            "shutdown_after" => self.shutdown_after = Some(Duration::from_secs(number(value)?)),
            "reboot_after" => self.reboot_after = Some(Duration::from_secs(number(value)?)),
            _ => return Err("is not known"),
        }
        Ok(())
    }
}

impl fmt::Display for Params {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let content = match self.content {
            Content::Random => "random",
            Content::Text => "text",
            Content::Mixed => "mixed",
        };
        write!(f, "judge.mem={} judge.content={content}", self.memory)?;
        write!(
            f,
            " judge.dirty={} judge.ws={}",
            self.dirty, self.working_set
        )?;
        write!(f, " judge.verify={} judge.seed={}", self.verify, self.seed)?;
        if !self.disks.is_empty() {
            write!(f, " judge.disks={}", self.disks.join(","))?;
        }
        write!(
            f,
            " judge.disk={} judge.disk_verify={}",
            self.disk, self.disk_verify
        )?;
        write!(f, " judge.direct={}", u8::from(self.direct))?;
        write!(f, " judge.cached={}", u8::from(self.cached))?;
        write!(f, " judge.beat_us={}", self.beat.as_micros())?;
        if let Some(after) = self.shutdown_after {
            write!(f, " judge.shutdown_after={}", after.as_secs())?;
        }
        if let Some(after) = self.reboot_after {
            write!(f, " judge.reboot_after={}", after.as_secs())?;
        }
        Ok(())
    }
}

/// A size: digits, then nothing, K, M or G (powers of 1024).
pub fn bytes(text: &str) -> Result<u64, &'static str> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K')) => (&text[..at], 10),
        Some((at, 'M')) => (&text[..at], 20),
        Some((at, 'G')) => (&text[..at], 30),
        Some(_) | None => (text, 0),
    };
    number(digits)?
        .checked_mul(1 << shift)
        .ok_or("is too large")
}

fn number(text: &str) -> Result<u64, &'static str> {
    text.parse().map_err(|_| "is not a number")
}

fn flag(text: &str) -> Result<bool, &'static str> {
    match text {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err("is neither 0 nor 1"),
    }
}

fn content(text: &str) -> Result<Content, &'static str> {
    match text {
        "random" => Ok(Content::Random),
        "text" => Ok(Content::Text),
        "mixed" => Ok(Content::Mixed),
        _ => Err("is none of random, text, mixed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_lab_writes_the_judge_reads() {
        let params = Params {
            memory: 384 << 20,
            content: Content::Text,
            disks: vec!["vda".into(), "vdb".into()],
            direct: false,
            cached: true,
            reboot_after: Some(Duration::from_secs(9)),
            ..Params::default()
        };
        let line = format!("quiet console=ttyS0 {params} panic=0");
        assert_eq!(line.parse(), Ok(params));
    }

    #[test]
    fn sizes_take_units() {
        let params: Params = "judge.mem=384M judge.dirty=50M judge.ws=2G judge.disk=512K"
            .parse()
            .unwrap();
        assert_eq!(params.memory, 384 << 20);
        assert_eq!(params.dirty, 50 << 20);
        assert_eq!(params.working_set, 2 << 30);
        assert_eq!(params.disk, 512 << 10);
    }

    #[test]
    fn mistakes_are_named() {
        for line in [
            "judge.memory=1M",
            "judge.mem=",
            "judge.mem=1T",
            "judge.direct=yes",
            "judge.cached=2",
            "judge.content=noise",
            "judge.seed",
            "judge.mem=99999999999G",
        ] {
            let error = line.parse::<Params>().unwrap_err().to_string();
            assert!(error.contains(line), "{error}");
        }
    }
}
