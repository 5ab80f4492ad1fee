//! The test suite of the shadow-field permissions: every field of the table, and what a guest hypervisor observes under
//! any permission.

use super::*;
use crate::Vmcs12;
use crate::caps::Policy;
use crate::encoding::Encoding;
use crate::exit::InterruptionInfo;
use crate::fake::{FakeVmcs, skylake_caps};
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::index::{FieldTable, lookup};
use crate::insn::{SyncStale, VmxOperation};
use crate::merge::make_live;
use crate::outcome::Failure;
use crate::sync::{SyncSets, exit_effects, save_exit_info, save_guest_state, save_stale, save_stale_field};
use ept::Gpa;
use proptest::prelude::*;
use std::vec;
use std::vec::Vec;

const ALL_ACCESSES: [Access; 4] = [
    Access::empty(),
    Access::READ,
    Access::WRITE,
    Access::from_bits_retain(Access::READ.bits() | Access::WRITE.bits()),
];

fn exits(bitmap: &[u8], encoding: Encoding) -> bool {
    let bit = encoding.0 as usize;
    bit >= 8 * BITMAP_BYTES || bitmap[bit / 8] >> (bit % 8) & 1 != 0
}

fn read_only_exit_information() -> VmxCaps {
    let mut offered = skylake_caps().offered(&Policy::EVERYTHING);
    offered.misc &= !(1 << 29);
    offered
}

#[test]
fn every_field_is_granted_just_as_its_merge_class_allows() {
    for offered in [skylake_caps().offered(&Policy::EVERYTHING), read_only_exit_information()] {
        for id in FieldId::all() {
            let most = match id.info().merge {
                _ if !offered.fields().contains(id) => Access::empty(),
                Merge::Copy | Merge::Guest => Access::all(),
                Merge::ExitInfo if offered.vmwrite_any() => Access::all(),
                Merge::ExitInfo => Access::READ,
                Merge::ControlWord
                | Merge::Loaded
                | Merge::Pdpte
                | Merge::Timer
                | Merge::Translated
                | Merge::HostState
                | Merge::Passing
                | Merge::HostOnly => Access::empty(),
            };
            for wanted in ALL_ACCESSES {
                let mut permissions = Permissions::widest(&offered);
                assert_eq!(permissions.get(id), most, "{id:?}");
                let before = permissions;
                let outcome = permissions.set(id, wanted);
                let expected = match () {
                    () if !offered.fields().contains(id) => Err(Denied::NoSuchField(id)),
                    () if most.contains(wanted) => Ok(()),
                    () if most.is_empty() => Err(Denied::NotTheGuests(id)),
                    () => Err(Denied::ReadOnly(id)),
                };
                assert_eq!(outcome, expected, "{id:?} {wanted:?}");
                match outcome {
                    Ok(()) => assert_eq!(permissions.get(id), wanted, "{id:?}"),
                    Err(_) => assert_eq!(permissions, before, "{id:?}"),
                }
            }
        }
    }
}

#[test]
fn without_shadowing_nothing_is_granted() {
    let fields = skylake_caps().offered(&Policy::EVERYTHING).fields();
    for id in fields.iter() {
        let mut permissions = Permissions::without_shadowing(&fields);
        assert_eq!(permissions.set(id, Access::READ), Err(Denied::NoShadowing));
        assert_eq!(permissions.set(id, Access::empty()), Ok(()));
    }
}

#[test]
fn the_bitmaps_let_through_exactly_what_is_granted_of_every_field() {
    let offered = skylake_caps().offered(&Policy::EVERYTHING);
    for id in FieldId::all().filter(|&id| offered.fields().contains(id)) {
        let mut permissions = Permissions::widest(&offered);
        let most = permissions.most(id);
        let (mut vmread, mut vmwrite) = (vec![0; BITMAP_BYTES], vec![0; BITMAP_BYTES]);
        permissions.fill_bitmaps(&mut vmread, &mut vmwrite);
        for wanted in ALL_ACCESSES.map(|access| access & most) {
            permissions.set(id, wanted).unwrap();
            permissions.update_bitmaps(id, &mut vmread, &mut vmwrite);
            let (mut vmread_anew, mut vmwrite_anew) = (vec![0; BITMAP_BYTES], vec![0; BITMAP_BYTES]);
            permissions.fill_bitmaps(&mut vmread_anew, &mut vmwrite_anew);
            assert!(vmread == vmread_anew && vmwrite == vmwrite_anew, "{id:?} {wanted:?}");
        }
        for raw in 0..0x8000 {
            let granted = lookup(Encoding(raw)).map_or(Access::empty(), |id| permissions.get(id));
            assert_eq!(exits(&vmread, Encoding(raw)), !granted.contains(Access::READ), "{raw:#x}");
            assert_eq!(exits(&vmwrite, Encoding(raw)), !granted.contains(Access::WRITE), "{raw:#x}");
        }
    }
}

/// A guest hypervisor with a current VMCS, on a processor with VMCS shadowing.
struct Machine {
    offered: VmxCaps,
    table: FieldTable,
    sets: SyncSets,
    permissions: Permissions,
    vmread: Vec<u8>,
    vmwrite: Vec<u8>,
    vmx: VmxOperation,
    vmcs02: FakeVmcs,
}

struct StaleIn<'a>(&'a mut FakeVmcs);

impl SyncStale for StaleIn<'_> {
    fn sync_stale(&mut self, vmcs12: &mut Vmcs12) {
        save_stale(self.0, vmcs12);
    }

    fn sync_field(&mut self, vmcs12: &mut Vmcs12, id: FieldId) -> u64 {
        save_stale_field(self.0, vmcs12, id)
    }

    fn write_live(&mut self, id: FieldId, word: u64) {
        self.0.write_raw(id, word);
    }
}

impl Machine {
    fn new(permissions: Permissions) -> Self {
        let caps = skylake_caps();
        let offered = caps.offered(&Policy::EVERYTHING);
        let mut vmx = VmxOperation::new(&offered);
        vmx.vmxon_region = Some(Gpa(0x1000));
        vmx.vmcs12 = Vmcs12::new(Gpa(0x2000), &offered);
        let mut vmcs02 = FakeVmcs::new(&caps);
        let sets = SyncSets::new(&offered, permissions.live());
        make_live(&mut vmcs02, &mut vmx.vmcs12, permissions.live());
        vmx.vmcs12.exit_effects = exit_effects(&vmx.vmcs12, &sets);
        let (vmread, vmwrite) = (vec![0; BITMAP_BYTES], vec![0; BITMAP_BYTES]);
        let table = FieldTable::of(&offered.fields());
        let mut machine = Self { offered, table, sets, permissions, vmread, vmwrite, vmx, vmcs02 };
        machine.permissions.fill_bitmaps(&mut machine.vmread, &mut machine.vmwrite);
        machine
    }

    fn permit(&mut self, id: FieldId, wanted: Access) {
        let wanted = wanted & self.permissions.most(id);
        self.permissions.set(id, wanted).unwrap();
        self.permissions.update_bitmaps(id, &mut self.vmread, &mut self.vmwrite);
    }

    /// VMREAD by the processor from the shadow VMCS, or by the emulation.
    fn vmread(&mut self, encoding: Encoding) -> Result<u64, Failure> {
        if exits(&self.vmread, encoding) {
            return self.vmx.vmread(&self.table, &mut StaleIn(&mut self.vmcs02), encoding.0.into());
        }
        let word = self.vmcs02.read_raw(lookup(encoding).unwrap());
        Ok(if encoding.is_high() { word >> 32 } else { word })
    }

    fn vmwrite(&mut self, encoding: Encoding, value: u64) -> Result<(), Failure> {
        if exits(&self.vmwrite, encoding) {
            let sync = &mut StaleIn(&mut self.vmcs02);
            return self.vmx.vmwrite(&self.offered, &self.table, sync, encoding.0.into(), value);
        }
        let id = lookup(encoding).unwrap();
        let word = match encoding.is_high() {
            true => self.vmcs02.read_raw(id) & 0xffff_ffff | value << 32,
            false => value & encoding.width().mask(),
        };
        self.vmcs02.write_raw(id, word);
        Ok(())
    }

    /// Runs the nested guest, which exits with a new value in each of these fields.
    fn run(&mut self, changes: &[(FieldId, u64)]) {
        let copied = self.vmx.vmcs12.dirty.and(&SHADOWABLE);
        for id in copied.iter() {
            self.vmcs02.write_raw(id, self.vmx.vmcs12.word(id));
        }
        self.vmx.vmcs12.dirty = self.vmx.vmcs12.dirty.minus(&copied);
        for &(id, value) in changes {
            self.vmcs02.poke(id, value);
        }
        let injected = InterruptionInfo(self.vmcs02.read(ENTRY_INTERRUPTION_INFO));
        self.vmcs02.poke(ENTRY_INTERRUPTION_INFO.id(), injected.invalidated().0.into());
        if self.vmx.vmcs12.live.is_empty() {
            save_exit_info(&self.vmcs02, &mut self.vmx.vmcs12, &self.sets);
        }
        save_guest_state(&self.vmcs02, &mut self.vmx.vmcs12, &self.sets);
    }
}

/// The encoding of every offered field, and the next higher one, which names a field only if the width is 64 bits.
fn encodings() -> Vec<Encoding> {
    let fields = skylake_caps().offered(&Policy::EVERYTHING).fields();
    fields.iter().flat_map(|id| [id.encoding(), Encoding(id.encoding().0 | 1)]).collect()
}

#[test]
fn every_access_to_every_field_gives_the_same_result_under_every_permission() {
    let offered = skylake_caps().offered(&Policy::EVERYTHING);
    let mut emulated = Machine::new(Permissions::without_shadowing(&offered.fields()));
    let mut shadowed = Machine::new(Permissions::widest(&offered));
    for encoding in encodings() {
        let id = lookup(encoding.full()).unwrap();
        for (round, wanted) in (1..).zip(ALL_ACCESSES) {
            shadowed.permit(id, wanted);
            let value = 0x0123_4567_89ab_cdef_u64.wrapping_mul(round);
            let written = emulated.vmwrite(encoding, value);
            assert_eq!(shadowed.vmwrite(encoding, value), written, "{encoding:?} {wanted:?}");
            for read in [encoding, encoding.full()] {
                let value = emulated.vmread(read);
                assert_eq!(shadowed.vmread(read), value, "{read:?} {wanted:?}");
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Read(Encoding),
    Write(Encoding, u64),
    Permit(Encoding, Access),
    Run(Vec<(FieldId, u64)>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Some of the fields that an exit saves whatever the controls are.
    const SAVED: [FieldId; 7] = [
        GUEST_RIP.id(),
        GUEST_RSP.id(),
        GUEST_CS_SELECTOR.id(),
        GUEST_TR_BASE.id(),
        EXIT_REASON.id(),
        EXIT_QUALIFICATION.id(),
        GUEST_LINEAR_ADDRESS.id(),
    ];
    let encoding = proptest::sample::select(encodings());
    let change = (proptest::sample::select(SAVED.to_vec()), any::<u64>());
    let step = prop_oneof![
        4 => encoding.clone().prop_map(Step::Read),
        4 => (encoding.clone(), any::<u64>()).prop_map(|(encoding, value)| Step::Write(encoding, value)),
        4 => (encoding, 0..4_u8).prop_map(|(encoding, bits)| Step::Permit(encoding, Access::from_bits_truncate(bits))),
        1 => proptest::collection::vec(change, 0..4).prop_map(Step::Run),
    ];
    proptest::collection::vec(step, 1..80)
}

proptest! {
    #[test]
    fn granting_and_denying_in_between_changes_no_result(steps in steps()) {
        let offered = skylake_caps().offered(&Policy::EVERYTHING);
        let fixed = [Permissions::without_shadowing(&offered.fields()), Permissions::widest(&offered)];
        let mut machines = fixed.map(Machine::new);
        let mut changing = Machine::new(Permissions::widest(&offered));
        for step in &steps {
            match step {
                Step::Read(encoding) => {
                    let value = changing.vmread(*encoding);
                    for machine in &mut machines {
                        prop_assert_eq!(machine.vmread(*encoding), value, "{:?}", encoding);
                    }
                }
                Step::Write(encoding, value) => {
                    let outcome = changing.vmwrite(*encoding, *value);
                    for machine in &mut machines {
                        prop_assert_eq!(machine.vmwrite(*encoding, *value), outcome, "{:?}", encoding);
                    }
                }
                Step::Permit(encoding, access) => changing.permit(lookup(encoding.full()).unwrap(), *access),
                Step::Run(changes) => {
                    changing.run(changes);
                    machines.iter_mut().for_each(|machine| machine.run(changes));
                }
            }
        }
    }
}
