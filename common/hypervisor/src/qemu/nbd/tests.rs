//! The client against a small server of this file, against arbitrary bytes, and against the real `qemu-nbd`.

use std::io::ErrorKind;
use std::process::{Child, Command as Process, Stdio};
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::wire::{self, Extent, OPTION_MAGIC};
use super::{Nbd, NbdError};
use crate::qemu::testing::skip;

const SIZE: usize = 1 << 20;

/// Greeting and the answers to `STRUCTURED_REPLY`, `SET_META_CONTEXT` (where `context` is given) and `GO`.
fn server_handshake(context: Option<&str>, flags: u16) -> Vec<u8> {
    let mut out = wire::HELLO_MAGIC.to_be_bytes().to_vec();
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(3u16.to_be_bytes());
    option_reply(&mut out, wire::OPT_STRUCTURED_REPLY, wire::REP_ACK, &[]);
    if let Some(name) = context {
        let data = [&7u32.to_be_bytes(), name.as_bytes()].concat();
        option_reply(
            &mut out,
            wire::OPT_SET_META_CONTEXT,
            wire::REP_META_CONTEXT,
            &data,
        );
        option_reply(&mut out, wire::OPT_SET_META_CONTEXT, wire::REP_ACK, &[]);
    }
    let mut info = wire::INFO_EXPORT.to_be_bytes().to_vec();
    info.extend((SIZE as u64).to_be_bytes());
    info.extend(flags.to_be_bytes());
    option_reply(&mut out, wire::OPT_GO, wire::REP_INFO, &info);
    option_reply(&mut out, wire::OPT_GO, wire::REP_ACK, &[]);
    out
}

fn option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend(wire::OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    out.extend(data);
}

fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = wire::CHUNK_MAGIC.to_be_bytes().to_vec();
    out.extend(flags.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    out.extend(payload);
    out
}

fn data_chunk(flags: u16, cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let payload = [&offset.to_be_bytes(), data].concat();
    chunk(flags, wire::CHUNK_DATA, cookie, &payload)
}

/// A client whose server has done its handshake and now says what the test makes it say.
async fn client(context: Option<&str>) -> (Nbd, DuplexStream) {
    let (ours, mut theirs) = duplex(4 << 20);
    theirs
        .write_all(&server_handshake(context, 0x4d))
        .await
        .unwrap();
    let (read, write) = tokio::io::split(ours);
    let contexts: Vec<&str> = context.into_iter().collect();
    let nbd = Nbd::over(read, write, "disk", &contexts).await.unwrap();
    let said = wire::handshake("disk", &contexts).len();
    theirs.read_exact(&mut vec![0; said]).await.unwrap();
    (nbd, theirs)
}

#[derive(Debug)]
struct Request {
    command: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

async fn next_request(server: &mut DuplexStream) -> Request {
    let mut head = [0; wire::REQUEST_LEN];
    server.read_exact(&mut head).await.unwrap();
    let mut take = wire::Take(&head);
    assert_eq!(take.u32().unwrap(), wire::REQUEST_MAGIC);
    assert_eq!(take.u16().unwrap(), 0);
    Request {
        command: take.u16().unwrap(),
        cookie: take.u64().unwrap(),
        offset: take.u64().unwrap(),
        len: take.u32().unwrap(),
    }
}

#[tokio::test]
async fn replies_to_several_requests_may_come_mixed_and_in_pieces() {
    let (nbd, mut server) = client(None).await;
    let (a, b) = (nbd.clone(), nbd.clone());
    let first = tokio::spawn(async move { a.read(4096, 8192).await });
    let one = next_request(&mut server).await;
    let second = tokio::spawn(async move { b.read(0, 10).await });
    let two = next_request(&mut server).await;
    assert_eq!(
        (one.offset, one.len, two.offset, two.len),
        (4096, 8192, 0, 10)
    );
    let hole = [&4096u64.to_be_bytes()[..], &4096u32.to_be_bytes()].concat();
    let mut said = data_chunk(0, one.cookie, 8192, &[5; 4096]);
    said.extend(data_chunk(1, two.cookie, 0, b"0123456789"));
    said.extend(chunk(0, wire::CHUNK_HOLE, one.cookie, &hole));
    said.extend(chunk(1, wire::CHUNK_NONE, one.cookie, &[]));
    server.write_all(&said).await.unwrap();
    assert_eq!(second.await.unwrap().unwrap(), b"0123456789");
    let data = first.await.unwrap().unwrap();
    assert!(data[..4096].iter().all(|b| *b == 0) && data[4096..].iter().all(|b| *b == 5));
}

#[tokio::test]
async fn data_outside_its_request_ends_the_connection() {
    for (offset, len) in [(0u64, 4096), (8192, 4097), (u64::MAX - 3, 8), (4096, 0)] {
        let (nbd, mut server) = client(None).await;
        let asked = nbd.clone();
        let read = tokio::spawn(async move { asked.read(4096, 8192).await });
        let request = next_request(&mut server).await;
        let lie = data_chunk(1, request.cookie, offset, &vec![1; len]);
        server.write_all(&lie).await.unwrap();
        let error = read.await.unwrap().unwrap_err();
        assert!(
            matches!(&error, NbdError::Closed(why) if why.contains("protocol")),
            "{error}"
        );
        assert!(nbd.read(0, 1).await.is_err(), "the connection went on");
    }
}

#[tokio::test]
async fn a_read_that_is_not_answered_whole_or_twice_is_an_error() {
    for twice in [false, true] {
        let (nbd, mut server) = client(None).await;
        let read = tokio::spawn(async move { nbd.read(0, 8192).await });
        let request = next_request(&mut server).await;
        let mut said = data_chunk(0, request.cookie, 0, &[1; 4096]);
        if twice {
            said.extend(data_chunk(0, request.cookie, 0, &[1; 4096]));
        }
        said.extend(chunk(1, wire::CHUNK_NONE, request.cookie, &[]));
        server.write_all(&said).await.unwrap();
        assert!(read.await.unwrap().is_err());
    }
}

#[tokio::test]
async fn an_error_of_the_server_keeps_its_number_and_text_and_the_connection() {
    let (nbd, mut server) = client(None).await;
    let asked = nbd.clone();
    let write = tokio::spawn(async move { asked.write(0, Bytes::from_static(b"x")).await });
    let request = next_request(&mut server).await;
    assert_eq!((request.command, request.len), (1, 1));
    assert_eq!(server.read_u8().await.unwrap(), b'x');
    let text = [&28u32.to_be_bytes()[..], &4u16.to_be_bytes(), b"full"].concat();
    let reply = chunk(1, wire::CHUNK_ERROR | 1, request.cookie, &text);
    server.write_all(&reply).await.unwrap();
    match write.await.unwrap().unwrap_err() {
        NbdError::Failed { source, .. } => {
            assert_eq!(source.kind(), ErrorKind::StorageFull);
            assert!(source.to_string().contains("full"));
        }
        other => panic!("{other}"),
    }
    let flush = tokio::spawn(async move { nbd.flush().await });
    let request = next_request(&mut server).await;
    let mut simple = wire::SIMPLE_MAGIC.to_be_bytes().to_vec();
    simple.extend(0u32.to_be_bytes());
    simple.extend(request.cookie.to_be_bytes());
    server.write_all(&simple).await.unwrap();
    flush.await.unwrap().unwrap();
}

#[tokio::test]
async fn block_status_is_asked_on_until_the_range_is_known_and_cut_at_its_end() {
    let (nbd, mut server) = client(Some("qemu:dirty-bitmap:b")).await;
    let asked = tokio::spawn(async move { nbd.extents("qemu:dirty-bitmap:b", 0, 100).await });
    for (offset, len, extents) in [(0u64, 100u32, [60u32, 1]), (60, 40, [1000, 0])] {
        let request = next_request(&mut server).await;
        assert_eq!((request.offset, request.len), (offset, len));
        let payload = [7, extents[0], extents[1]].map(u32::to_be_bytes).concat();
        let reply = chunk(1, wire::CHUNK_BLOCK_STATUS, request.cookie, &payload);
        server.write_all(&reply).await.unwrap();
    }
    let extents = asked.await.unwrap().unwrap();
    let wanted = [(60, 1), (40, 0)].map(|(len, status)| Extent { len, status });
    assert_eq!(extents, wanted);
}

#[tokio::test]
async fn a_lost_connection_is_told_to_everybody() {
    let (nbd, mut server) = client(None).await;
    let waiting = nbd.clone();
    let read = tokio::spawn(async move { waiting.read(0, 1).await });
    next_request(&mut server).await;
    drop(server);
    assert!(matches!(read.await.unwrap(), Err(NbdError::Closed(_))));
    assert!(nbd.flush().await.is_err());
}

#[tokio::test]
async fn requests_outside_the_export_are_not_sent() {
    let (nbd, _server) = client(None).await;
    let size = SIZE as u64;
    for (offset, len) in [
        (size, 1),
        (u64::MAX, 1),
        (0, 0),
        (0, super::MAX_TRANSFER + 1),
    ] {
        let error = nbd.read(offset, len).await.unwrap_err();
        assert!(matches!(error, NbdError::OutOfRange { .. }), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn parsers_take_arbitrary_bytes_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = wire::block_status(&bytes);
        let _ = wire::error_chunk(&bytes);
        let _ = wire::export_info(&bytes);
        let _ = wire::meta_context(&bytes);
        if let Some(head) = bytes.first_chunk() {
            let _ = wire::reply(head);
        }
        if let Some(head) = bytes.first_chunk() {
            let _ = wire::option_reply(head);
        }
    }

    #[test]
    fn a_client_survives_whatever_follows_the_handshake(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        kind in any::<u16>(),
        flags in any::<u16>(),
        len in any::<u32>(),
        well_begun in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let (nbd, mut server) = client(Some("base:allocation")).await;
            let reader = nbd.clone();
            let read = tokio::spawn(async move { reader.read(0, 64).await });
            let first = next_request(&mut server).await;
            let status = tokio::spawn(async move { nbd.extents("base:allocation", 0, 64).await });
            let second = next_request(&mut server).await;
            let mut said = Vec::new();
            if well_begun {
                let cookie = if flags & 2 == 0 { first.cookie } else { second.cookie };
                said.extend(chunk(flags, kind & 0x8007, cookie, &[])[..16].iter());
                said.extend((if flags & 4 == 0 { len % 400 } else { len }).to_be_bytes());
            }
            said.extend(bytes);
            server.write_all(&said).await.unwrap();
            drop(server);
            if let Ok(data) = read.await.unwrap() {
                assert_eq!(data.len(), 64);
            }
            if let Ok(extents) = status.await.unwrap() {
                assert_eq!(extents.iter().map(|extent| extent.len).sum::<u32>(), 64);
            }
        });
    }

    #[test]
    fn a_handshake_of_arbitrary_bytes_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), keep in 0usize..200) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let (ours, mut theirs) = duplex(1 << 16);
            let mut said = server_handshake(None, 1);
            said.truncate(keep.min(said.len() - 1));
            said.extend(bytes);
            theirs.write_all(&said).await.unwrap();
            theirs.shutdown().await.unwrap();
            let (read, write) = tokio::io::split(ours);
            // Random bytes may complete a handshake that was cut late: then the client stands, without harm.
            if let Ok(nbd) = Nbd::over(read, write, "disk", &[]).await {
                assert!(nbd.read(0, 1).await.is_err());
            }
        });
    }
}

struct Served {
    child: Child,
    _folder: tempfile::TempDir,
    socket: std::path::PathBuf,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A real `qemu-nbd` over a raw image of `SIZE` bytes: 64 KiB of 0xaa, then a hole.
async fn real_server() -> Option<Served> {
    if Process::new("qemu-nbd").arg("--version").output().is_err() {
        skip("qemu-nbd is not installed");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image.raw");
    std::fs::write(&image, vec![0xaa; 65536]).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(SIZE as u64)
        .unwrap();
    let socket = folder.path().join("nbd.sock");
    let child = Process::new("qemu-nbd")
        .args([
            "--format=raw",
            "--persistent",
            "--shared=8",
            "--discard=unmap",
            "--export-name=disk",
            "--socket",
        ])
        .args([&socket, &image])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    for _ in 0..200 {
        if socket.exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    Some(Served {
        child,
        _folder: folder,
        socket,
    })
}

#[tokio::test]
async fn a_real_qemu_nbd_is_read_written_zeroed_mapped_and_flushed() {
    let Some(served) = real_server().await else {
        return;
    };
    let nbd = Nbd::connect(&served.socket, "disk", &["base:allocation"])
        .await
        .unwrap();
    assert_eq!(nbd.size(), SIZE as u64);
    assert!(!nbd.is_read_only());
    assert_eq!(nbd.read(0, 65536).await.unwrap(), vec![0xaa; 65536]);
    let map = nbd
        .extents("base:allocation", 0, SIZE as u64)
        .await
        .unwrap();
    assert_eq!(
        map.iter().map(|extent| u64::from(extent.len)).sum::<u64>(),
        SIZE as u64
    );
    assert_eq!(
        map[0],
        Extent {
            len: 65536,
            status: 0
        }
    );
    assert_eq!(
        map.last().unwrap().status & wire::STATUS_ZERO,
        wire::STATUS_ZERO
    );
    nbd.write(500_000, Bytes::from(vec![7; 12345]))
        .await
        .unwrap();
    nbd.write_zeroes(0, 65536).await.unwrap();
    nbd.flush().await.unwrap();
    assert_eq!(nbd.read(500_000, 12345).await.unwrap(), vec![7; 12345]);
    assert_eq!(nbd.read(0, 65536).await.unwrap(), vec![0; 65536]);
    let many: Vec<_> = (0..64u64)
        .map(|index| {
            let nbd = nbd.clone();
            tokio::spawn(async move {
                let data = Bytes::from(vec![u8::try_from(index).unwrap() + 1; 4096]);
                nbd.write(index * 8192, data.clone()).await.unwrap();
                assert_eq!(nbd.read(index * 8192, 4096).await.unwrap(), data);
            })
        })
        .collect();
    for one in many {
        one.await.unwrap();
    }
}

#[tokio::test]
async fn a_real_qemu_nbd_refuses_unknown_exports_and_contexts_by_name() {
    let Some(served) = real_server().await else {
        return;
    };
    let error = Nbd::connect(&served.socket, "other", &[])
        .await
        .unwrap_err();
    assert!(matches!(error, NbdError::Refused { .. }), "{error}");
    let error = Nbd::connect(&served.socket, "disk", &["qemu:dirty-bitmap:none"])
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("qemu:dirty-bitmap:none"),
        "{error}"
    );
}
