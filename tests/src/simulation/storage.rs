//! A host's disk, as its journal sees it.
//!
//! Owns what is in the page cache and what is on the platter. A power cut keeps what was synced; of the rest it keeps
//! whatever the dice say: some of the folder's changes, a beginning of a file. Writes are short. Of the run folder it keeps
//! nothing. A killed agent loses nothing that it stored, and stores nothing more: between any two words of a file as well.
//! It shows the agents nothing but `vmferry_common::storage::Storage`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmferry_common::storage::{Held, Locked, NewFile, Patience, Storage, Words};

use super::dice::Dice;
use super::facts::What;
use super::plan::Class;
use super::words::{NodeWords, WordFile};
use super::world::{Node, State, Stop};

#[derive(Debug, Clone, Default)]
struct Inode {
    cached: Vec<u8>,
    /// What a power cut leaves for sure.
    platter: Option<Vec<u8>>,
}

/// The disk.
#[derive(Debug, Default)]
pub(super) struct Disk {
    inodes: Vec<Inode>,
    folder: BTreeMap<PathBuf, usize>,
    platter: BTreeMap<PathBuf, usize>,
    /// Changes of the folder that are not synced.
    unsynced: Vec<(PathBuf, Option<usize>)>,
    locks: BTreeMap<PathBuf, u64>,
    words: BTreeMap<PathBuf, Arc<WordFile>>,
    lies: bool,
}

impl Disk {
    pub(super) fn new(lies: bool) -> Self {
        Self {
            lies,
            ..Self::default()
        }
    }

    /// All processes of the host are gone.
    pub(super) fn unlock_all(&mut self) {
        self.locks.clear();
    }

    /// The file of this kind as a power cut now would leave it at least.
    pub(super) fn durable(&self, kind: &str) -> Option<Vec<u8>> {
        let (_, inode) = self
            .platter
            .iter()
            .find(|(path, _)| path.extension().is_some_and(|ext| ext == kind))?;
        self.inodes.get(*inode)?.platter.clone()
    }

    pub(super) fn cut_power(&mut self, dice: &mut Dice) {
        for (path, inode) in std::mem::take(&mut self.unsynced) {
            if dice.chance(500) {
                match inode {
                    Some(inode) => self.platter.insert(path, inode),
                    None => self.platter.remove(&path),
                };
            }
        }
        for inode in &mut self.inodes {
            let left = inode.platter.take().unwrap_or_else(|| {
                let most = inode.cached.len() as u64;
                let len = usize::try_from(dice.between(0, most)).unwrap_or_default();
                inode.cached[..len].to_vec()
            });
            inode.cached = left.clone();
            inode.platter = Some(left);
        }
        self.folder = self.platter.clone();
        self.locks.clear();
    }

    fn change(&mut self, path: &Path, inode: Option<usize>) {
        match inode {
            Some(inode) => self.folder.insert(path.to_owned(), inode),
            None => self.folder.remove(path),
        };
        self.unsynced.push((path.to_owned(), inode));
    }
}

/// What is kept where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Folder {
    /// The state folder: the journal.
    State,
    /// The run folder, which a power cut empties.
    Run,
}

/// A host's disk in the hands of one life of an agent.
#[derive(Debug, Clone)]
pub(super) struct NodeDisk {
    node: Node,
    folder: Folder,
}

impl NodeDisk {
    /// Where `node` keeps its journal.
    pub(super) fn state(node: &Node) -> Arc<Self> {
        Self::of(node, Folder::State)
    }

    /// Where `node` keeps what it leaves for a later agent.
    pub(super) fn run(node: &Node) -> Arc<Self> {
        Self::of(node, Folder::Run)
    }

    fn of(node: &Node, folder: Folder) -> Arc<Self> {
        Arc::new(Self {
            node: node.clone(),
            folder,
        })
    }

    const fn class(&self) -> Class {
        match self.folder {
            Folder::State => Class::Journal,
            Folder::Run => Class::Notes,
        }
    }

    const fn disk<'a>(&self, state: &'a mut State) -> &'a mut Disk {
        let host = state.host(self.node.host);
        match self.folder {
            Folder::State => &mut host.disk,
            Folder::Run => &mut host.run,
        }
    }

    /// One step that makes something durable.
    fn sync(&self, what: impl FnOnce(&mut Disk) -> io::Result<()>) -> io::Result<()> {
        self.step(what)?;
        if self.folder == Folder::State {
            let host = self.node.host;
            self.node.world.state().tell(What::Synced { host });
        }
        Ok(())
    }

    /// One step. A dead agent is answered with an error, which nothing comes of.
    fn step<T>(&self, what: impl FnOnce(&mut Disk) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.node.world.state();
        self.node
            .enter(&mut state, self.class())
            .map_err(|stop| failure(&stop))?;
        let done = what(self.disk(&mut state))?;
        self.node
            .leave(&mut state, self.class())
            .map_err(|stop| failure(&stop))?;
        Ok(done)
    }
}

fn failure(stop: &Stop) -> io::Error {
    match stop {
        Stop::Dead => io::Error::other("this agent is dead"),
        Stop::Failed => io::Error::from(io::ErrorKind::StorageFull),
    }
}

fn missing() -> io::Error {
    io::Error::from(io::ErrorKind::NotFound)
}

impl Storage for NodeDisk {
    fn blocks(&self) -> bool {
        false
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.step(|disk| {
            let inode = disk.folder.get(path).ok_or_else(missing)?;
            let inode = disk.inodes.get(*inode).ok_or_else(missing)?;
            Ok(inode.cached.clone())
        })
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        let inode = self.step(|disk| {
            let inode = disk.inodes.len();
            disk.inodes.push(Inode::default());
            disk.change(path, Some(inode));
            Ok(inode)
        })?;
        let disk = self.clone();
        Ok(Box::new(OpenFile { disk, inode }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(|disk| {
            let inode = *disk.folder.get(from).ok_or_else(missing)?;
            disk.change(to, Some(inode));
            disk.change(from, None);
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step(|disk| {
            if disk.words.remove(path).is_none() {
                disk.folder.get(path).ok_or_else(missing)?;
                disk.change(path, None);
            }
            Ok(())
        })
    }

    fn sync_folder(&self, _folder: &Path) -> io::Result<()> {
        self.sync(|disk| {
            if !disk.lies {
                disk.unsynced.clear();
                disk.platter = disk.folder.clone();
            }
            Ok(())
        })
    }

    fn make_folder(&self, _path: &Path) -> io::Result<()> {
        self.step(|_| Ok(()))
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<OsString>> {
        self.step(|disk| {
            let inside = disk
                .folder
                .keys()
                .filter(|path| path.parent() == Some(folder));
            Ok(inside
                .filter_map(|path| Some(path.file_name()?.to_owned()))
                .collect())
        })
    }

    fn lock(&self, path: &Path, _patience: Patience) -> io::Result<Locked> {
        let epoch = self.node.epoch;
        let mut taken = None;
        let done = self.step(|disk| {
            if disk.locks.insert(path.to_owned(), epoch) != Some(epoch) {
                let (disk, path) = (self.clone(), path.to_owned());
                taken = Some(NodeLock { disk, path });
            }
            Ok(())
        });
        // Where that failed after it was taken it is let go again, as a descriptor is.
        done.map(|()| match taken {
            Some(lock) => Locked::Taken(Box::new(lock)),
            None => Locked::HeldBy(Some(std::process::id())),
        })
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        self.step(|disk| {
            let inside = disk.folder.keys().filter(|file| file.starts_with(path));
            for file in inside.cloned().collect::<Vec<_>>() {
                disk.change(&file, None);
            }
            disk.words.retain(|file, _| !file.starts_with(path));
            Ok(())
        })
    }

    fn create_words(&self, path: &Path, count: usize) -> io::Result<Box<dyn Words>> {
        let file = self.step(|disk| {
            let file = WordFile::new(count);
            disk.words.insert(path.to_owned(), file.clone());
            Ok(file)
        })?;
        Ok(Box::new(NodeWords::new(&self.node, file)))
    }

    fn open_words(&self, path: &Path, count: usize) -> io::Result<Box<dyn Words>> {
        let file = self.step(|disk| disk.words.get(path).cloned().ok_or_else(missing))?;
        if file.len() != count {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Box::new(NodeWords::new(&self.node, file)))
    }
}

#[derive(Debug)]
struct OpenFile {
    disk: NodeDisk,
    inode: usize,
}

impl Write for OpenFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Short: most writes take more than one step.
        let len = bytes.len().min(bytes.len() / 2 + 16);
        self.disk.step(|disk| {
            let inode = disk.inodes.get_mut(self.inode).ok_or_else(missing)?;
            inode.cached.extend_from_slice(&bytes[..len]);
            inode.platter = None;
            Ok(len)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl NewFile for OpenFile {
    fn sync(&mut self) -> io::Result<()> {
        self.disk.sync(|disk| {
            if !disk.lies {
                let inode = disk.inodes.get_mut(self.inode).ok_or_else(missing)?;
                inode.platter = Some(inode.cached.clone());
            }
            Ok(())
        })
    }
}

#[derive(Debug)]
struct NodeLock {
    disk: NodeDisk,
    path: PathBuf,
}

impl Held for NodeLock {}

impl Drop for NodeLock {
    fn drop(&mut self) {
        let Node { world, host, epoch } = &self.disk.node;
        let mut state = world.state();
        let locks = &mut state.host(*host).disk.locks;
        if locks.get(&self.path) == Some(epoch) {
            locks.remove(&self.path);
        }
    }
}

/// A disk that holds one record, for whoever wants to know what it says.
#[derive(Debug)]
pub(super) struct OneFile(pub(super) Vec<u8>);

impl Storage for OneFile {
    fn blocks(&self) -> bool {
        false
    }

    fn read(&self, _path: &Path) -> io::Result<Vec<u8>> {
        Ok(self.0.clone())
    }

    fn create(&self, _path: &Path) -> io::Result<Box<dyn NewFile>> {
        Err(read_only())
    }

    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        Err(read_only())
    }

    fn remove(&self, _path: &Path) -> io::Result<()> {
        Err(read_only())
    }

    fn sync_folder(&self, _folder: &Path) -> io::Result<()> {
        Err(read_only())
    }

    fn make_folder(&self, _path: &Path) -> io::Result<()> {
        Err(read_only())
    }

    fn list(&self, _folder: &Path) -> io::Result<Vec<OsString>> {
        Ok(Vec::new())
    }

    fn lock(&self, _path: &Path, _patience: Patience) -> io::Result<Locked> {
        Err(read_only())
    }

    fn remove_folder(&self, _path: &Path) -> io::Result<()> {
        Err(read_only())
    }

    fn create_words(&self, _path: &Path, _count: usize) -> io::Result<Box<dyn Words>> {
        Err(read_only())
    }

    fn open_words(&self, _path: &Path, _count: usize) -> io::Result<Box<dyn Words>> {
        Err(read_only())
    }
}

fn read_only() -> io::Error {
    io::Error::from(io::ErrorKind::ReadOnlyFilesystem)
}

/// A record from bytes of a disk.
pub(super) fn disk_of(bytes: Vec<u8>) -> Arc<dyn Storage> {
    Arc::new(OneFile(bytes))
}
