//! Work that is done in parallel, one item on each processor of this host.

use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Does `work` on each of `items`. Returns the results in the items' order.
pub fn map<I, T, W>(items: Vec<I>, work: W) -> Vec<T>
where
    I: Send,
    T: Send,
    W: Fn(I) -> T + Sync,
{
    let processors = thread::available_parallelism().map_or(1, usize::from);
    map_with(processors.min(items.len()), items, work)
}

fn map_with<I, T, W>(workers: usize, items: Vec<I>, work: W) -> Vec<T>
where
    I: Send,
    T: Send,
    W: Fn(I) -> T + Sync,
{
    let waiting = Mutex::new(items.into_iter().enumerate());
    // No code panics while it holds the lock.
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let worker = || -> Vec<(usize, T)> {
        let items = std::iter::from_fn(next);
        items.map(|(number, item)| (number, work(item))).collect()
    };
    let mut done: Vec<(usize, T)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_items_whoever_ends_first() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let receiver = Mutex::new(receiver);
        let results = map_with(2, vec![1, 2, 3], |item| {
            match item {
                1 => receiver.lock().unwrap().recv().unwrap(),
                3 => sender.send(()).unwrap(),
                _ => (),
            }
            item * 10
        });
        assert_eq!(results, [10, 20, 30]);
    }

    #[test]
    fn no_more_work_is_under_way_than_there_are_workers() {
        let (under_way, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        map_with(2, (0..20).collect(), |_: u32| {
            most.fetch_max(under_way.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            thread::yield_now();
            under_way.fetch_sub(1, Ordering::SeqCst);
        });
        assert!((1..=2).contains(&most.into_inner()));
    }
}
