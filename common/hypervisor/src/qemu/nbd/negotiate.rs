//! The handshake of an NBD connection.
//!
//! The client's whole part goes out at once: the server answers option by option in order, so one round trip
//! is enough, which matters for the bitmap of the last round.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::error::NbdError;
use super::wire;

/// Replies to one option that are believed.
const MAX_REPLIES: usize = 256;

/// What the server offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) size: u64,
    pub(super) flags: u16,
    /// Meta contexts that were chosen, by id.
    pub(super) contexts: Vec<(u32, String)>,
}

/// Carries out the handshake for `export` with `contexts`.
pub(super) async fn negotiate<R, W>(
    read: &mut R,
    write: &mut W,
    export: &str,
    contexts: &[&str],
) -> Result<Offer, NbdError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let io = |what| {
        move |source| NbdError::Io {
            export: export.to_owned(),
            what,
            source,
        }
    };
    let mut hello = [0; 18];
    read.read_exact(&mut hello)
        .await
        .map_err(io("no greeting"))?;
    check_hello(&hello)?;
    write
        .write_all(&wire::handshake(export, contexts))
        .await
        .map_err(io("the handshake could not be sent"))?;
    let mut offer = Offer {
        size: 0,
        flags: 0,
        contexts: Vec::new(),
    };
    answers(read, export, wire::OPT_STRUCTURED_REPLY, |_, _| Ok(())).await?;
    if !contexts.is_empty() {
        let found = &mut offer.contexts;
        answers(read, export, wire::OPT_SET_META_CONTEXT, |kind, data| {
            if kind == wire::REP_META_CONTEXT {
                found.push(wire::meta_context(data)?);
            }
            Ok(())
        })
        .await?;
        check_contexts(export, contexts, found)?;
    }
    let mut info = None;
    answers(read, export, wire::OPT_GO, |kind, data| {
        if kind == wire::REP_INFO {
            info = wire::export_info(data)?.or(info);
        }
        Ok(())
    })
    .await?;
    (offer.size, offer.flags) =
        info.ok_or_else(|| NbdError::Protocol("it does not tell the export's size".to_owned()))?;
    Ok(offer)
}

fn check_hello(hello: &[u8; 18]) -> Result<(), NbdError> {
    let mut take = wire::Take(hello);
    let mut parse = || Ok::<_, String>((take.u64()?, take.u64()?, take.u16()?));
    let (magic, option_magic, flags) = parse().map_err(NbdError::Protocol)?;
    let wanted = wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES;
    if magic != wire::HELLO_MAGIC || option_magic != wire::OPTION_MAGIC || flags & wanted != wanted
    {
        return Err(NbdError::Protocol(
            "its greeting is not that of a fixed newstyle server".to_owned(),
        ));
    }
    Ok(())
}

fn check_contexts(export: &str, wanted: &[&str], found: &[(u32, String)]) -> Result<(), NbdError> {
    for name in wanted {
        if !found.iter().any(|(_, known)| known == name) {
            return Err(NbdError::Refused {
                export: export.to_owned(),
                why: format!("it has no meta context {name}"),
            });
        }
    }
    Ok(())
}

/// Reads the replies to `option` up to its ACK; `each` sees the others.
async fn answers<R: AsyncRead + Unpin>(
    read: &mut R,
    export: &str,
    option: u32,
    mut each: impl FnMut(u32, &[u8]) -> Result<(), String>,
) -> Result<(), NbdError> {
    for _ in 0..MAX_REPLIES {
        let mut head = [0; wire::OPTION_REPLY_LEN];
        let io = |source| NbdError::Io {
            export: export.to_owned(),
            what: "the handshake was not answered",
            source,
        };
        read.read_exact(&mut head).await.map_err(io)?;
        let reply = wire::option_reply(&head).map_err(NbdError::Protocol)?;
        if reply.option != option {
            return Err(NbdError::Protocol(format!(
                "it answers option {} where {option} is due",
                reply.option
            )));
        }
        let mut data = vec![0; reply.len as usize];
        read.read_exact(&mut data).await.map_err(io)?;
        if reply.kind & wire::REP_ERROR != 0 {
            return Err(NbdError::Refused {
                export: export.to_owned(),
                why: refusal(option, reply.kind, &data),
            });
        }
        if reply.kind == wire::REP_ACK {
            return Ok(());
        }
        each(reply.kind, &data).map_err(NbdError::Protocol)?;
    }
    Err(NbdError::Protocol("it never ends an option".to_owned()))
}

fn refusal(option: u32, kind: u32, text: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(text).chars().take(500).collect();
    format!(
        "option {option} answered with error {}: {text}",
        kind & !wire::REP_ERROR
    )
}
