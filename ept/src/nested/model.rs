//! Random programs on the [model](crate::fake::model).

use crate::fake::model::{END, EPT12S, Machine, READ_ONLY, SPLIT, Step, TABLE_COUNT, TABLES};
use crate::{Levels, Rights};
use proptest::prelude::*;

fn index() -> impl Strategy<Value = u64> {
    prop_oneof![12 => Just(0_u64), 4 => 1_u64..3, 1 => Just(511)]
}

fn table() -> impl Strategy<Value = u64> {
    prop_oneof![3 => Just(0x5000_u64), 3 => Just(0x6000), 2 => (0..TABLE_COUNT).prop_map(|table| TABLES + table * 4096)]
}

fn entry() -> impl Strategy<Value = u64> {
    let page = prop_oneof![
        Just(0x9000),
        Just(SPLIT + 0x1000),
        Just(READ_ONLY),
        Just(SPLIT),
        Just(0),
        Just(1 << 30),
        Just(END),
        Just(1 << 41)
    ];
    let rights = prop_oneof![4 => Just(0x407_u64), 1 => 0_u64..8, 1 => (0_u64..8).prop_map(|rights| rights | 0x400)];
    prop_oneof![
        1 => Just(0),
        3 => (table(), rights.clone()).prop_map(|(table, rights)| table | rights),
        6 => (page, rights, prop_oneof![6 => Just(6_u64), 1 => 0_u64..8], any::<[bool; 2]>()).prop_map(
            |(page, rights, kind, [large, ignore_pat])| {
                page | rights | kind << 3 | u64::from(large) << 7 | u64::from(ignore_pat) << 6
            }
        ),
    ]
}

/// A GiB of the nested guest becomes one page, and then tables again.
fn regrouping() -> impl Strategy<Value = Step> {
    let above = (0_u64..2, prop_oneof![Just((1 << 30) | 0x4b7_u64), Just(0x4407)])
        .prop_map(|(index, entry)| Step::Edit { table: 0x3000, index, entry });
    let below = (0_u64..3, prop_oneof![Just(0x5407_u64), Just(0x6407)]).prop_map(|(index, entry)| Step::Edit {
        table: 0x4000,
        index,
        entry,
    });
    prop_oneof![above, below]
}

fn access() -> impl Strategy<Value = Rights> {
    let kinds = [Rights::READ, Rights::WRITE, Rights::READ.or(Rights::WRITE), Rights::EXECUTE, Rights::USER_EXECUTE];
    prop::sample::select(kinds.to_vec())
}

fn step() -> impl Strategy<Value = Step> {
    let address = (index(), index(), index(), index(), 0_u64..4)
        .prop_map(|(a, b, c, d, offset)| a << 39 | b << 30 | c << 21 | d << 12 | (offset * 8));
    prop_oneof![
        6 => (table(), index(), entry()).prop_map(|(table, index, entry)| Step::Edit { table, index, entry }),
        3 => regrouping(),
        1 => (table(), index()).prop_map(|(table, index)| Step::ClearFlags { table, index }),
        8 => (0..EPT12S, address, access())
            .prop_map(|(ept12, address, access)| Step::Access { ept12, address, access }),
        1 => (0..EPT12S).prop_map(|ept12| Step::Single { ept12 }),
        1 => Just(Step::Global),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn an_access_finds_what_the_tables_say_or_said_since_the_last_invalidation(
        steps in prop::collection::vec(step(), 1..80),
        five_levels: bool,
        // EPT01 takes 4 tables; 9 leave room for one translation at a time.
        budget in prop_oneof![Just(10_u64), Just(16), Just(400)],
    ) {
        let mut machine = Machine::new(budget, if five_levels { Levels::Five } else { Levels::Four });
        steps.iter().for_each(|step| machine.run(step));
        machine.finish();
    }
}
