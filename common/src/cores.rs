//! Work that keeps a core busy for long, beside tasks that must not wait.
//!
//! Owns who may work so at a time: as many as there are cores. Such work within a task holds up what its worker of the runtime has to
//! do next, and the task that was woken last nobody else may take: after a write to a connection that is the one that sends. Compressing
//! one frame on a busy host left a line without packets for 15 ms. So the worker's other tasks are handed on first.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Semaphore;

/// Turns at the cores.
#[derive(Debug)]
pub struct Cores(Semaphore);

impl Cores {
    /// For so many at once, one at least.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self(Semaphore::new(count.max(1)))
    }

    /// Does `work` when it is its turn, on this thread. Cancel safe until it has begun; from then on it ends.
    pub async fn work<T>(&self, work: impl FnOnce() -> T) -> T {
        // Nobody closes it.
        let _turn = self.0.acquire().await;
        match Handle::current().runtime_flavor() {
            // There is nobody to hand anything to.
            RuntimeFlavor::CurrentThread => work(),
            _ => tokio::task::block_in_place(work),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::sync::mpsc;

    const LONG: Duration = Duration::from_secs(30);

    /// The one worker of the runtime is at work, until what the work woke just before has run.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_was_woken_last_runs_beside_the_work() {
        let cores = Arc::new(Cores::new(1));
        let (wake, mut woken) = mpsc::unbounded_channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let waker =
            tokio::spawn(async move { woken.recv().await.is_some_and(|()| tell.send(()).is_ok()) });
        tokio::task::yield_now().await;
        let worker = tokio::spawn(async move {
            assert!(wake.send(()).is_ok());
            cores.work(move || told.recv_timeout(LONG).is_ok()).await
        });
        assert!(worker.await.is_ok_and(|heard| heard), "it ran meanwhile");
        assert!(waker.await.is_ok_and(|ran| ran));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_more_work_at_once_than_there_are_cores() {
        let cores = Arc::new(Cores::new(2));
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let works: Vec<_> = (0..8)
            .map(|_| {
                let (cores, now, most) = (cores.clone(), now.clone(), most.clone());
                tokio::spawn(async move {
                    let work = || {
                        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::sleep(Duration::from_millis(5));
                        now.fetch_sub(1, Ordering::SeqCst);
                    };
                    cores.work(work).await;
                })
            })
            .collect();
        for work in works {
            assert!(work.await.is_ok());
        }
        assert_eq!(most.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_runtime_of_one_thread_works_too() {
        assert_eq!(Cores::new(0).work(|| 7).await, 7);
    }
}
