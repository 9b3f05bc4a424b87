//! The ordinary course of sessions against the real agent: resume, attempts, cancel, hooks, stop, restart, owner.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod support;

use support::{Client, LANES, Site, cancelled, hello, spec};
use vmferry_common::digest::WindowHasher;
use vmferry_proto::error::ErrorCode;
use vmferry_proto::geometry::{WindowBits, WindowIndex};
use vmferry_proto::ids::{Attempt, FrameSeq, Lane, RegionId, RegisterId, SessionNumber};
use vmferry_proto::message::{
    AttemptKey, Compared, Digests, ToDestination, ToSource, Verdict, VerifyWindows, WindowRange,
};

fn verdict(message: ToSource) -> Verdict {
    match message {
        ToSource::Outcome(outcome) => outcome.verdict,
        other => panic!("not an Outcome: {other:?}"),
    }
}

#[tokio::test]
async fn a_lost_session_goes_on_from_what_was_applied() {
    let site = Site::new();
    let mut first = Client::welcome(&site, hello(1)).await;
    let before = first.offer().await;
    assert_eq!(before.resume, None);
    for fill in 1..=3 {
        let frame = first.frame(0, 0, WindowBits::first(4), fill);
        first.send_frame(frame).await;
    }
    let frame = first.frame(1, 1, WindowBits::first(4), 9);
    first.send_frame(frame).await;
    first.expect_progress_of(Lane(0), FrameSeq(3)).await;
    first.expect_progress_of(Lane(1), FrameSeq(1)).await;
    first.connection.close(0u32.into(), b"the link is cut");

    let mut again = hello(1);
    again.session = SessionNumber(2);
    let mut second = Client::welcome(&site, again).await;
    let after = second.offer().await;
    assert_eq!(
        after.incarnations, before.incarnations,
        "the copy is the same one"
    );
    let resume = after.resume.expect("where the first session stopped");
    assert_eq!(resume.session, SessionNumber(1));
    let applied: Vec<u64> = resume.lanes.iter().map(|lane| lane.applied.0).collect();
    let flushed: Vec<u64> = resume.lanes.iter().map(|lane| lane.flushed.0).collect();
    assert_eq!(
        (applied, flushed),
        (vec![3, 1], vec![3, 1]),
        "drained and flushed"
    );
    second.cancel().await;
    site.still_serves().await;
}

#[tokio::test]
async fn digests_are_of_what_was_written() {
    let site = Site::new();
    let mut client = Client::ready(&site, 1).await;
    client.send_all(0x33).await;
    let attempt = client.open_attempt(1).await;
    let mut last = client.last(attempt);
    last.verify = vec![
        VerifyWindows {
            region: RegionId(0),
            first: WindowIndex(1),
            stride: 2,
        },
        VerifyWindows {
            region: RegionId(1),
            first: WindowIndex(0),
            stride: 1,
        },
    ];
    client.say(ToDestination::Final(last)).await;
    let ToSource::Digests(Digests {
        windows,
        last: true,
        ..
    }) = client.hear().await
    else {
        panic!("not the digests");
    };
    let hasher = WindowHasher::new(hello(1).migration);
    let asked: Vec<_> = windows
        .iter()
        .map(|digest| (digest.region.0, digest.window.0))
        .collect();
    assert_eq!(asked, [(0, 1), (0, 3), (1, 0), (1, 1)]);
    for digest in &windows {
        let len = spec().regions[usize::from(digest.region.0)].len;
        let bytes = len.bytes_of(digest.window, &len.all_of(digest.window));
        assert_eq!(digest.digest, hasher.digest(&vec![0x33; bytes as usize]));
    }
    client.expect_complete().await;
    // What differs may be sent again, and another Final names the new end.
    let frame = client.frame(0, 1, WindowBits::first(1), 0x44);
    client.send_frame(frame).await;
    client.say(ToDestination::Final(client.last(attempt))).await;
    client.expect_complete().await;
    client
        .say(ToDestination::Cancel {
            reason: cancelled(),
        })
        .await;
    client.expect_cancelled_after_outcome().await;
    drop(client);
    site.still_serves().await;
}

fn range(region: u16, first: u32, count: u32) -> ToDestination {
    ToDestination::Compare(WindowRange {
        region: RegionId(region),
        first: WindowIndex(first),
        count,
    })
}

/// `[WIRE-49]`: in the order of the questions, of whole windows that are there and of no others.
#[tokio::test]
async fn what_the_copy_has_is_compared() {
    let site = Site::new();
    let mut client = Client::ready(&site, 1).await;
    client.send_all(0x33).await;
    let lanes: Vec<FrameSeq> = client.last(Attempt(1)).lanes;
    for (lane, seq) in (0u8..).map(Lane).zip(lanes) {
        client.expect_progress_of(lane, seq).await;
    }
    client.connection.close(0u32.into(), b"the link is cut");
    let mut again = hello(1);
    again.session = SessionNumber(2);
    let mut client = Client::welcome(&site, again).await;
    client.offer().await;
    for question in [range(0, 1, 2), range(1, 0, 256), range(1, u32::MAX, 256)] {
        client.say(question).await;
    }
    let hasher = WindowHasher::new(hello(1).migration);
    for expected in [vec![(0, 1), (0, 2)], vec![(1, 0), (1, 1)], Vec::new()] {
        let ToSource::Compared(Compared { windows }) = client.hear().await else {
            panic!("not compared");
        };
        let windows_of = windows.iter().map(|it| (it.region.0, it.window.0));
        assert_eq!(windows_of.collect::<Vec<_>>(), expected);
        for digest in windows {
            let len = spec().regions[usize::from(digest.region.0)].len;
            let bytes = len.bytes_of(digest.window, &len.all_of(digest.window));
            assert_eq!(digest.digest, hasher.digest(&vec![0x33; bytes as usize]));
        }
    }
    client.cancel().await;
    site.still_serves().await;
}

#[tokio::test]
async fn a_window_that_was_not_wholly_received_is_not_compared() {
    let site = Site::new();
    let mut client = Client::ready(&site, 1).await;
    let frame = client.frame(0, 0, WindowBits::first(128), 1);
    client.send_frame(frame).await;
    client.expect_progress_of(Lane(0), FrameSeq(1)).await;
    client.say(range(0, 0, 4)).await;
    let answer = client.hear().await;
    let nothing = Compared {
        windows: Vec::new(),
    };
    assert_eq!(answer, ToSource::Compared(nothing));
    client.cancel().await;
    site.still_serves().await;
}

#[tokio::test]
async fn a_copy_with_a_gap_is_not_complete() {
    let site = Site::new();
    let mut client = Client::ready(&site, 1).await;
    let frame = client.frame(0, 0, WindowBits::first(128), 1);
    client.send_frame(frame).await;
    let attempt = client.open_attempt(1).await;
    client.say(ToDestination::Final(client.last(attempt))).await;
    let Verdict::Aborted(reason) = verdict(client.hear().await) else {
        panic!("not aborted");
    };
    assert_eq!(reason.code, ErrorCode::NotIdentical);
    assert!(
        reason.detail.contains("ram") && reason.detail.contains("block 128"),
        "{reason}"
    );
    client.cancel().await;
    site.still_serves().await;
}

#[tokio::test]
async fn a_question_settles_an_open_attempt_and_the_answer_stays() {
    let mut site = Site::new();
    let mut client = Client::greet(&site, "alpha", hello(1)).await;
    let register = client.expect_welcome().await.register;
    client.offer().await;
    let attempt = client.open_attempt(1).await;
    drop(client);

    let key = AttemptKey {
        migration: hello(1).migration,
        attempt,
        register,
    };
    let mut again = hello(1);
    again.session = SessionNumber(2);
    let mut asking = Client::welcome(&site, again.clone()).await;
    // The register has never heard of these.
    for unknown in [
        AttemptKey {
            attempt: Attempt(7),
            ..key
        },
        AttemptKey {
            register: RegisterId::from_bytes([0; 16]),
            ..key
        },
    ] {
        asking.say(ToDestination::Query(unknown)).await;
        assert_eq!(verdict(asking.hear().await), Verdict::Unknown);
    }
    asking.say(ToDestination::Commit(key)).await;
    assert!(matches!(verdict(asking.hear().await), Verdict::Aborted(_)));
    asking.say(ToDestination::Query(key)).await;
    assert!(matches!(verdict(asking.hear().await), Verdict::Aborted(_)));
    drop(asking);

    // Not even a crash makes it forget.
    site.kill_agent();
    site.start();
    again.session = SessionNumber(3);
    let mut later = Client::welcome(&site, again).await;
    later.say(ToDestination::Commit(key)).await;
    assert!(matches!(verdict(later.hear().await), Verdict::Aborted(_)));
    later.cancel().await;
    site.still_serves().await;
}

/// Receives something, ends the agent as `end` does, and starts another one: it goes on with the copy.
async fn the_next_agent_goes_on(end: impl AsyncFnOnce(&mut Site, &mut Client)) {
    let mut site = Site::new();
    let mut client = Client::welcome(&site, hello(1)).await;
    let before = client.offer().await;
    let frame = client.frame(0, 0, WindowBits::first(4), 1);
    client.send_frame(frame).await;
    client.expect_progress_of(Lane(0), FrameSeq(1)).await;
    let guests = site.guests_alive();
    assert_eq!(guests.len(), 1);
    end(&mut site, &mut client).await;
    drop(client);
    assert_eq!(site.guests_alive(), guests, "it ended with the agent");
    site.start();
    let mut again = hello(1);
    again.session = SessionNumber(2);
    let mut client = Client::welcome(&site, again).await;
    let after = client.offer().await;
    assert_eq!(after.incarnations, before.incarnations);
    let resume = after.resume.unwrap();
    assert_eq!(resume.session, SessionNumber(1));
    assert_eq!(resume.lanes[0].applied, FrameSeq(1));
    assert_eq!(resume.lanes[0].flushed, FrameSeq(1), "it was flushed");
    assert_eq!(site.guests_alive(), guests);
    client.cancel().await;
    site.still_serves().await;
}

#[tokio::test]
async fn what_a_killed_agent_received_is_gone_on_with() {
    the_next_agent_goes_on(async |site, _| site.kill_agent()).await;
}

#[tokio::test]
async fn a_stopped_agent_tells_its_sources_and_leaves_the_copy_to_the_next() {
    the_next_agent_goes_on(async |site, client| {
        site.terminate_agent();
        client.expect_error(ErrorCode::ShuttingDown).await;
        client.connection.close(0u32.into(), b"read");
        assert_eq!(site.await_agent(), Some(0));
    })
    .await;
}

/// `[HAND-7]`: an agent that cannot take up at its start what its journal says does so as soon as it can.
#[tokio::test]
async fn what_cannot_be_taken_up_at_the_start_is_taken_up_later() {
    let mut site = Site::new();
    let client = Client::ready(&site, 1).await;
    site.kill_agent();
    drop(client);
    let (file, away) = (site.path("guests").join("web.toml"), site.path("web.away"));
    std::fs::rename(&file, &away).unwrap();
    site.start();
    let taken_up = "going on from the journal";
    site.until("the complaint", |site| {
        site.logs().contains("its guest file is gone")
    })
    .await;
    assert!(!site.logs().contains(taken_up));
    std::fs::rename(&away, &file).unwrap();
    site.until("the next try", |site| site.logs().contains(taken_up))
        .await;
    assert_eq!(site.logs().matches("its guest file is gone").count(), 1);
    site.still_serves_with(2).await;
}

#[tokio::test]
async fn a_forgotten_copy_gives_way_to_the_next_migration_of_its_source() {
    let site = Site::new();
    let client = Client::ready(&site, 1).await;
    client.connection.close(0u32.into(), b"killed");
    drop(client);
    site.until("the loss of the session", |site| {
        site.logs().contains("session lost")
    })
    .await;
    // Another sender may not take its place.
    let mut other = Client::greet(&site, "gamma", hello(2)).await;
    other.expect_error(ErrorCode::GuestBusy).await;
    site.still_serves_with(3).await;
}

#[tokio::test]
async fn a_copy_gives_way_to_the_next_migration_of_its_source_before_the_loss_of_the_session_is_noticed()
 {
    let site = Site::new();
    let mut client = Client::ready(&site, 1).await;
    let mut other = Client::greet(&site, "gamma", hello(2)).await;
    other.expect_error(ErrorCode::GuestBusy).await;
    site.still_serves_with(3).await;
    client.expect_error(ErrorCode::Cancelled).await;
}

#[tokio::test]
async fn a_hook_that_refuses_keeps_the_guest_out() {
    let site = Site::new();
    site.write_hook("negotiate", "echo no guests today; exit 1");
    let mut client = Client::greet(&site, "alpha", hello(1)).await;
    let error = client.expect_error(ErrorCode::HookVeto).await;
    assert!(error.detail.contains("no guests today"), "{error}");

    site.write_hook("negotiate", "exit 0");
    site.write_hook(
        "pause",
        &format!("cat >> {}; exit 7", site.path("told").display()),
    );
    let mut client = Client::ready(&site, 2).await;
    client
        .say(ToDestination::OpenAttempt {
            attempt: Attempt(1),
        })
        .await;
    client.expect_error(ErrorCode::HookVeto).await;
    let told = std::fs::read_to_string(site.path("told")).unwrap();
    let told: serde_json::Value = serde_json::from_str(told.trim()).unwrap();
    assert_eq!(
        (told["phase"].as_str(), told["peer"].as_str()),
        (Some("pause"), Some("alpha"))
    );
    site.write_hook("pause", "exit 0");
    site.still_serves().await;
}

#[tokio::test]
async fn status_and_owner_say_how_it_stands() {
    let site = Site::new();
    let mut client = Client::ready(&site, 1).await;
    let frame = client.frame(0, 0, WindowBits::first(4), 1);
    client.send_frame(frame).await;
    client.expect_progress_of(Lane(0), FrameSeq(1)).await;
    let output = site.command(&["status", "web-1", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let migration = &status["migrations"][0];
    assert_eq!(migration["phase"], "copy");
    assert_eq!(migration["connected"], true);
    assert_eq!(
        migration["lanes"].as_array().unwrap().len(),
        usize::from(LANES)
    );
    assert!(migration["applied_bytes"].as_u64().unwrap() > 16384);
    assert_eq!(site.command(&["status", "db-1"]).status.code(), Some(1));
    // On its way is not owned: a boot guard must not let it start here.
    let owner = site.command(&["owner", "web-1", "--json"]);
    assert_eq!(owner.status.code(), Some(1), "{owner:?}");
    let owner: serde_json::Value = serde_json::from_slice(&owner.stdout).unwrap();
    assert_eq!(owner["may_run"], false);
    client.cancel().await;
}
