//! What a processor says of itself: the capability MSRs, and CPUID.

use shadow::caps::{CapabilityWord, Policy, usable_physical_bits};
use shadow::controls::*;
use shadow::cpuid::CpuidView;
use shadow::fields::ControlField;
use shadow::msr::VMX_CAPABILITIES;
use shadow::{FieldId, FieldSet, VmxCaps};

use super::machine::PROCESSORS;
use crate::Input;

/// A processor of arbitrary capability MSRs, but that no control must be 1 that may not be.
fn processor(input: &mut Input<'_>) -> VmxCaps {
    let base = &PROCESSORS[input.below(2)].caps;
    let (width, key_bits) = (32 + u32::from(input.byte() % 21), u64::from(input.byte() & 0xf) << 32);
    let mut caps = VmxCaps::read(
        |msr| {
            let old = base.msr(msr).unwrap_or(0);
            if input.flag() { input.neighbour(old) } else { old }
        },
        usable_physical_bits(width, key_bits),
        if base.cr4_fixed1 >> 12 & 1 != 0 { 57 } else { 48 },
    );
    for allowed in [&mut caps.pin, &mut caps.primary, &mut caps.secondary, &mut caps.exit, &mut caps.entry] {
        allowed.may_be_1 |= allowed.must_be_1;
    }
    caps
}

/// A processor, what its guest hypervisors are offered, and control words for it.
///
/// The input: the processor's model and edits of its MSRs, fields that VMREAD does not know, a control to withhold, and
/// wanted controls.
pub fn capabilities(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut known = FieldSet::ALL;
    for _ in 0..input.byte() & 3 {
        let number = input.below(shadow::fields::FIELD_COUNT);
        FieldId::all().nth(number).into_iter().for_each(|id| known.remove(id));
    }
    let caps = processor(&mut input).with_fields(&known);
    assert!(caps.fields().minus(&known).is_empty() && caps.missing.and(&known).is_empty());
    let withheld = [Control::Secondary(Secondary::from_bits_retain(1 << (input.byte() & 31)))];
    let policy = Policy { revision: input.long(), withheld: if input.flag() { &withheld } else { &[] } };
    let offered = caps.offered(&policy);
    assert!(offered.fields().minus(&caps.fields()).is_empty());
    check_word::<Pin>(&caps, &offered, &mut input);
    check_word::<Primary>(&caps, &offered, &mut input);
    check_word::<Secondary>(&caps, &offered, &mut input);
    check_word::<Tertiary>(&caps, &offered, &mut input);
    check_word::<ExitControls>(&caps, &offered, &mut input);
    check_word::<SecondaryExitControls>(&caps, &offered, &mut input);
    check_word::<EntryControls>(&caps, &offered, &mut input);
    check_word::<VmFunctions>(&caps, &offered, &mut input);
    assert_eq!(offered.ept_vpid & !caps.ept_vpid, 0);
    assert_eq!(offered.revision(), policy.revision & 0x7fff_ffff);
    for msr in VMX_CAPABILITIES {
        let (own, shown) = (caps.msr(msr), offered.msr(msr));
        assert!(own.is_some() || shown.is_none(), "{msr:#x} is offered and does not exist");
    }
    assert!(caps.missing_essential().is_none_or(|id| !known.contains(id)));
}

/// What is offered is allowed and has a name; a chosen word is one that is allowed.
fn check_word<W: ControlField + CapabilityWord>(caps: &VmxCaps, offered: &VmxCaps, input: &mut Input<'_>) {
    let (must_be_1, may_be_1) = W::allowed(caps);
    let (must_be_1, may_be_1) = (must_be_1.into_word(), may_be_1.into_word());
    let (still_must, may_still) = W::allowed(offered);
    let (still_must, may_still) = (still_must.into_word(), may_still.into_word());
    assert!(
        still_must & must_be_1 == must_be_1 && may_still & !may_be_1 == 0 && still_must & !may_still == 0,
        "{}",
        W::NAME
    );
    let named = W::BITS.iter().filter(|bit| bit.merge != BitMerge::Hidden).map(|bit| 1 << bit.position);
    assert_eq!(may_still & !still_must & !named.sum::<u64>(), 0, "{}: hidden bits are offered", W::NAME);

    let [on, off] = [(); 2].map(|()| W::from_word(if input.flag() { input.neighbour(may_still) } else { 0 }));
    match offered.choose(on, off) {
        Ok(word) => {
            let word = word.into_word();
            assert!(word & still_must == still_must && word & !may_still == 0, "{}: {word:#x}", W::NAME);
            assert!(word & on.into_word() == on.into_word() && word & off.into_word() == 0);
        }
        Err(conflict) => crate::is_one_line(conflict),
    }
}

/// CPUID of any processor.
///
/// The input: leaf, subleaf, CR4, and what the processor answers.
pub fn cpuid(bytes: &[u8]) {
    const BETWEEN: std::ops::Range<u32> = 0x4000_0000..0x8000_0000;
    let mut input = Input::new(bytes);
    let leaf = if input.flag() { input.long() } else { u32::from(input.byte() & 0x3f) | u32::from(input.byte()) << 24 };
    let (subleaf, cr4) = (input.neighbour(0) as u32, input.neighbour(0x2020));
    let caps = &PROCESSORS[input.below(2)].caps;
    let answers: [u32; 4] = std::array::from_fn(|_| input.long());
    let highest: [u32; 2] = [input.neighbour(0x24) as u32, input.neighbour(0x8000_0008) as u32];
    let processor = |asked: u32, _: u32| match asked {
        0 => [highest[0], answers[1], answers[2], answers[3]],
        0x8000_0000 => [highest[1], 0, 0, 0],
        _ => answers,
    };
    let view = CpuidView::new(caps, processor);
    let answer = view.answer(leaf, subleaf, cr4, processor);
    let there = highest[0].min(0x24);
    if BETWEEN.contains(&leaf) || leaf < 0x4000_0000 && leaf > there {
        assert_eq!(answer, view.answer(there, subleaf, cr4, processor), "as the highest basic leaf");
    }
    match (leaf, subleaf) {
        (0, _) => assert_eq!(answer[0], there),
        (1, _) if there >= 1 => {
            assert!(answer[2] >> 31 == 0, "no hypervisor");
            assert_eq!(answer[2] >> 27 & 1 != 0, cr4 >> 18 & 1 != 0, "OSXSAVE");
            assert_eq!(answer[2] & !(1 << 27) & !answers[2], 0);
        }
        (7, 0) if there >= 7 => {
            assert!(answer[0] <= 2 && answer[1] & !answers[1] == 0 && answer[1] >> 25 & 1 == 0, "no Intel PT");
            assert_eq!(answer[2] & !(1 << 4) & !answers[2], 0);
        }
        (0x8000_0008, _) if (0x8000_0008..).contains(&highest[1]) => assert!(answer[0] & 0xff <= caps.physical_bits),
        _ => (),
    }
}
