//! The SDM's algorithm for a control word: the bits that must be 1, that may be 1, and that are wanted, and the default
//! for all others (SDM A.2 "Reserved Controls and Default Settings", 32.5.1 "Algorithms for Determining VMX
//! Capabilities").

use super::{CapabilityWord, VmxCaps};
use crate::controls::Conflict;

impl VmxCaps {
    /// The value of a control word with the bits of `on` at 1 and those of `off` at 0. A bit of neither gets the only
    /// setting that the processor allows or, if it allows both, its default: 1 in the default1 class, else 0. So the
    /// processor behaves as if it lacked every control that this crate has no name for.
    ///
    /// ```
    /// use shadow::VmxCaps;
    /// use shadow::controls::{Allowed, Primary};
    ///
    /// let caps = VmxCaps { primary: Allowed::from_msr(0xfff9_fffe_0400_6172), ..VmxCaps::default() };
    /// let cr3_exits = Primary::CR3_LOAD_EXITING | Primary::CR3_STORE_EXITING;
    /// // CR3 exits are in the default1 class, so a caller without a use for them turns them off.
    /// let value = caps.choose(Primary::HLT_EXITING, cr3_exits)?;
    /// assert_eq!(value.bits(), 0x0400_61f2);
    ///
    /// let conflict = caps.choose(Primary::ACTIVATE_TERTIARY, Primary::empty()).unwrap_err();
    /// assert_eq!(conflict.to_string(), "primary processor-based VM-execution controls; cannot be 1: ACTIVATE_TERTIARY");
    /// # Ok::<(), shadow::controls::Conflict<Primary>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The processor does not allow a wanted setting, or both settings of one bit are wanted.
    pub fn choose<W: CapabilityWord>(&self, on: W, off: W) -> Result<W, Conflict<W>> {
        let (must_be_1, may_be_1) = W::allowed(self);
        let conflict = Conflict {
            unavailable: on.difference(may_be_1),
            compulsory: off.intersection(must_be_1),
            contradictory: on.intersection(off),
        };
        if !(conflict.unavailable.is_empty() && conflict.compulsory.is_empty() && conflict.contradictory.is_empty()) {
            return Err(conflict);
        }
        let default1 = W::DEFAULT1.intersection(may_be_1).difference(off);
        Ok(must_be_1.union(on).union(default1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controls::Allowed;
    use crate::controls::{EntryControls, ExitControls, Pin, Primary, Secondary, Tertiary};
    use crate::fake::skylake_caps;
    use proptest::prelude::*;
    use std::string::ToString;

    #[test]
    fn a_control_the_processor_lacks_is_a_conflict_that_names_it() {
        let conflict = skylake_caps()
            .choose(
                Secondary::ENABLE_EPT | Secondary::INSTRUCTION_TIMEOUT | Secondary::ENABLE_PCONFIG,
                Secondary::empty(),
            )
            .unwrap_err();
        assert_eq!(conflict.unavailable, Secondary::INSTRUCTION_TIMEOUT | Secondary::ENABLE_PCONFIG);
        assert!(conflict.compulsory.is_empty() && conflict.contradictory.is_empty());
        assert!(conflict.to_string().ends_with("cannot be 1: ENABLE_PCONFIG | INSTRUCTION_TIMEOUT"), "{conflict}");
    }

    #[test]
    fn a_control_that_must_be_1_cannot_be_switched_off() {
        let caps = VmxCaps { exit: Allowed { must_be_1: 0x0003_6dff, may_be_1: 0x007f_ffff }, ..VmxCaps::default() };
        let conflict = caps.choose(ExitControls::empty(), ExitControls::SAVE_DEBUG_CONTROLS).unwrap_err();
        assert_eq!(conflict.compulsory, ExitControls::SAVE_DEBUG_CONTROLS);
    }

    #[test]
    fn a_contradictory_wish_is_a_conflict() {
        let conflict = skylake_caps().choose(Pin::NMI_EXITING, Pin::NMI_EXITING).unwrap_err();
        assert_eq!(conflict.contradictory, Pin::NMI_EXITING);
    }

    #[test]
    fn an_unmentioned_control_of_the_default1_class_is_1_and_any_other_0() {
        let caps = VmxCaps { entry: Allowed { must_be_1: 0, may_be_1: u32::MAX }, ..skylake_caps() };
        let entry = caps.choose(EntryControls::LOAD_EFER, EntryControls::empty()).unwrap();
        assert_eq!(entry.bits(), 0x11ff | EntryControls::LOAD_EFER.bits());
        let without = caps.choose(EntryControls::empty(), EntryControls::LOAD_DEBUG_CONTROLS).unwrap();
        assert_eq!(without.bits(), 0x11fb);
        assert_eq!(caps.choose(Tertiary::empty(), Tertiary::all()), Ok(Tertiary::empty()));
    }

    proptest! {
        #[test]
        fn a_chosen_word_is_one_that_vm_entry_accepts_and_has_what_was_wanted(
            must: u32, may: u32, on: u32, off: u32
        ) {
            let allowed = Allowed { must_be_1: must & may, may_be_1: may };
            let caps = VmxCaps { primary: allowed, ..VmxCaps::default() };
            let (on, off) = (Primary::from_bits_retain(on), Primary::from_bits_retain(off));
            match caps.choose(on, off) {
                Ok(value) => {
                    prop_assert!(allowed.permits(value.bits()));
                    prop_assert!(value.contains(on) && !value.intersects(off));
                }
                Err(Conflict { unavailable, compulsory, contradictory }) => {
                    prop_assert!(!(unavailable | compulsory | contradictory).is_empty());
                    prop_assert!(on.contains(unavailable) && off.contains(compulsory));
                }
            }
        }
    }

    #[test]
    fn a_bit_that_is_not_offered_keeps_its_default_setting_and_one_that_must_be_1_keeps_that() {
        let allowed = Allowed { must_be_1: 0b0000_0010, may_be_1: 0b0001_1111 };
        let only = allowed.only(0b0000_0101, 0b0001_0001);
        assert_eq!(only, Allowed { must_be_1: 0b0001_0010, may_be_1: 0b0001_0111 });
    }

    #[test]
    fn hiding_a_control_never_hides_one_that_must_be_1() {
        let allowed = Allowed { must_be_1: 0x2, may_be_1: 0xf }.without(0x3);
        assert_eq!(allowed.may_be_1, 0xe);
    }

    #[test]
    fn capability_msrs_survive_the_round_trip() {
        let msr = 0x0401_e172_0400_6172;
        assert_eq!(Allowed::from_msr(msr).to_msr(), msr);
    }
}
