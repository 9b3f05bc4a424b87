//! Geometry and bit sets against sets of plain block numbers.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// The blocks of a set, numbered from the start of the region.
fn blocks(bits: &RegionBits) -> BTreeSet<u64> {
    bits.iter()
        .flat_map(|(window, bits)| {
            let base = u64::from(window.0) * u64::from(WINDOW_BLOCKS);
            bits.iter()
                .map(|block| base + u64::from(block))
                .collect::<Vec<_>>()
        })
        .collect()
}

fn window_set(bits: &WindowBits) -> BTreeSet<u32> {
    (0..WINDOW_BLOCKS).filter(|b| bits.contains(*b)).collect()
}

fn window_bits() -> impl Strategy<Value = WindowBits> {
    prop_oneof![
        any::<[u64; 8]>().prop_map(WindowBits),
        (0u32..600, 0u32..600).prop_map(|(from, to)| WindowBits::span(from, to)),
        prop::collection::vec(0u32..WINDOW_BLOCKS, 0..4).prop_map(|blocks| {
            let mut bits = WindowBits::EMPTY;
            blocks.into_iter().for_each(|block| bits.insert(block));
            bits
        }),
    ]
}

/// Lengths around the edges of blocks and windows.
fn region_len() -> impl Strategy<Value = RegionLen> {
    let edge = prop_oneof![
        Just(1u64),
        Just(u64::from(BLOCK_SIZE)),
        Just(u64::from(WINDOW_SIZE)),
        0..3 * u64::from(WINDOW_SIZE),
    ];
    (0u64..4, edge, -2i64..=2).prop_map(|(windows, rest, off)| {
        RegionLen((windows * u64::from(WINDOW_SIZE) + rest).saturating_add_signed(off))
    })
}

#[test]
fn the_last_block_and_window_may_be_short() {
    let len = RegionLen(u64::from(WINDOW_SIZE) + 4096 + 1);
    assert_eq!((len.windows(), len.blocks()), (2, 514));
    let (first, second, third) = (WindowIndex(0), WindowIndex(1), WindowIndex(2));
    assert_eq!(len.blocks_in(first), 512);
    assert_eq!(len.blocks_in(second), 2);
    assert_eq!(len.blocks_in(third), 0);
    assert_eq!(len.block_len(second, 0), 4096);
    assert_eq!(len.block_len(second, 1), 1);
    assert_eq!(len.block_len(second, 2), 0);
    assert_eq!(len.bytes_of(second, &WindowBits::FULL), 4097);
    assert_eq!(len.bytes_of(third, &WindowBits::FULL), 0);
    assert_eq!(
        len.runs(second, &WindowBits::FULL),
        [Run {
            offset: u64::from(WINDOW_SIZE),
            len: 4097
        }]
    );
    assert!(len.runs(third, &WindowBits::FULL).is_empty());
}

#[test]
fn an_empty_region_has_nothing() {
    let len = RegionLen(0);
    assert_eq!((len.windows(), len.blocks()), (0, 0));
    assert!(len.all_of(WindowIndex(0)).is_empty());
    assert!(RegionBits::full(len).is_empty());
}

#[test]
fn the_largest_numbers_do_not_overflow() {
    for len in [
        RegionLen(u64::MAX),
        RegionLen(crate::limits::MAX_REGION_LEN),
    ] {
        let window = WindowIndex(u32::MAX);
        assert!(len.windows() >= 1 << 25);
        assert!(len.blocks_in(window) <= WINDOW_BLOCKS);
        assert!(len.block_len(window, WINDOW_BLOCKS - 1) <= BLOCK_SIZE);
        assert!(len.bytes_of(window, &WindowBits::FULL) <= WINDOW_SIZE);
    }
    let mut bits = RegionBits::empty(RegionLen(10_000));
    bits.insert_bytes(u64::MAX, u64::MAX);
    bits.insert_whole_blocks(u64::MAX, u64::MAX);
    bits.insert(WindowIndex(u32::MAX), &WindowBits::FULL);
    assert!(bits.is_empty());
    bits.insert_bytes(9_000, u64::MAX);
    assert_eq!(blocks(&bits), BTreeSet::from([2]));
}

proptest! {
    #[test]
    fn window_sets_are_sets(a in window_bits(), b in window_bits(), count in 0u32..600) {
        let (set_a, set_b) = (window_set(&a), window_set(&b));
        prop_assert_eq!(a.iter().collect::<BTreeSet<_>>(), set_a.clone());
        prop_assert!(a.iter().is_sorted());
        prop_assert_eq!(a.count() as usize, set_a.len());
        prop_assert_eq!(a.is_empty(), set_a.is_empty());
        prop_assert_eq!(a.last(), set_a.last().copied());
        prop_assert_eq!(window_set(&a.or(&b)), &set_a | &set_b);
        prop_assert_eq!(window_set(&a.and(&b)), &set_a & &set_b);
        prop_assert_eq!(window_set(&a.minus(&b)), &set_a - &set_b);
        let lowest: BTreeSet<_> = set_a.iter().copied().take(count as usize).collect();
        prop_assert_eq!(window_set(&a.lowest(count)), lowest);
    }

    #[test]
    fn spans_hold_what_they_say(from in 0u32..600, to in 0u32..600) {
        let expected: BTreeSet<_> = (from..to).filter(|block| *block < WINDOW_BLOCKS).collect();
        prop_assert_eq!(window_set(&WindowBits::span(from, to)), expected);
    }

    #[test]
    fn runs_cover_the_blocks_and_nothing_else(len in region_len(), window in 0u32..6, bits in window_bits()) {
        let window = WindowIndex(window);
        let runs = len.runs(window, &bits);
        let mut bytes = 0;
        let mut covered = BTreeSet::new();
        for run in &runs {
            prop_assert!(run.len > 0 && run.offset % u64::from(BLOCK_SIZE) == 0);
            let end = run.offset + u64::from(run.len);
            prop_assert!(end <= len.0, "a byte outside the region");
            covered.extend(run.offset / 4096..end.div_ceil(4096));
            bytes += run.len;
        }
        for pair in runs.windows(2) {
            prop_assert!(pair[0].offset + u64::from(pair[0].len) < pair[1].offset, "not joined or not ascending");
        }
        let base = u64::from(window.0) * 512;
        let expected: BTreeSet<_> = bits.iter().map(|block| base + u64::from(block)).filter(|block| *block < len.blocks()).collect();
        prop_assert_eq!(covered, expected);
        prop_assert_eq!(bytes, len.bytes_of(window, &bits));
    }

    #[test]
    fn windows_cut_a_region_without_gap_or_overlap(len in region_len()) {
        let blocks: u64 = (0..len.windows()).map(|window| u64::from(len.blocks_in(WindowIndex(window)))).sum();
        let bytes: u64 = (0..len.windows()).map(|window| u64::from(len.bytes_of(WindowIndex(window), &WindowBits::FULL))).sum();
        prop_assert_eq!(blocks, len.blocks());
        prop_assert_eq!(bytes, len.0);
        prop_assert_eq!(RegionBits::full(len).count(), len.blocks());
    }

    #[test]
    fn region_sets_are_sets(
        len in region_len(),
        steps in prop::collection::vec((0u8..5, 0u64..5 * u64::from(WINDOW_SIZE), 0u64..3 * u64::from(WINDOW_SIZE), window_bits()), 0..12),
    ) {
        let mut bits = RegionBits::empty(len);
        let mut oracle = BTreeSet::<u64>::new();
        let byte_range = |block: u64| (block * 4096, ((block + 1) * 4096).min(len.0));
        for (step, at, count, mask) in steps {
            let window = WindowIndex(u32::try_from(at / u64::from(WINDOW_SIZE)).unwrap());
            let masked = mask.iter().map(|block| u64::from(window.0) * 512 + u64::from(block));
            match step {
                0 => {
                    bits.insert_bytes(at, count);
                    oracle.extend((0..len.blocks()).filter(|block| {
                        let (from, to) = byte_range(*block);
                        from.max(at) < to.min(at + count)
                    }));
                }
                1 => {
                    bits.insert_whole_blocks(at, count);
                    oracle.extend((0..len.blocks()).filter(|block| {
                        let (from, to) = byte_range(*block);
                        at <= from && to <= at + count
                    }));
                }
                2 => {
                    bits.insert(window, &mask);
                    oracle.extend(masked.filter(|block| *block < len.blocks()));
                }
                3 => {
                    bits.remove(window, &mask);
                    masked.for_each(|block| { oracle.remove(&block); });
                }
                _ => {
                    let mut other = RegionBits::empty(len);
                    other.insert_bytes(at, count);
                    oracle.extend(blocks(&other));
                    bits.union(&other);
                }
            }
            prop_assert_eq!(&blocks(&bits), &oracle);
            prop_assert_eq!(bits.count(), oracle.len() as u64);
            prop_assert_eq!(bits.is_empty(), oracle.is_empty());
        }
        bits.fill();
        prop_assert_eq!(blocks(&bits), (0..len.blocks()).collect::<BTreeSet<_>>());
        bits.clear();
        prop_assert!(bits.is_empty());
    }
}
