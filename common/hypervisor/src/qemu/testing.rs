//! What the driver's tests share.

/// Tells why a test is skipped; in CI that is a failure.
pub(crate) fn skip(why: &str) {
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "skipped in CI: {why}"
    );
    println!("skipped: {why}");
}
