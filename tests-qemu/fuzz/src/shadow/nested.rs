//! VMCS12: VM entries and exits of a nested guest whose hypervisor writes what it likes.

use std::sync::LazyLock;

use ept::Gpa;
use shadow::caps::CapabilityWord;
use shadow::check::{self, HOST_BASES, HostMode};
use shadow::controls::{
    ControlWords, EntryControls, ExitControls, Pin, Primary, Secondary, SecondaryExitControls, Tertiary,
};
use shadow::encoding::Area;
use shadow::exit::InterruptionInfo;
use shadow::fields::*;
use shadow::host_load::{HostImage, LeftBehind, load_host_state};
use shadow::hw::{GuestMemory, VmcsAccess};
use shadow::merge::{Inherited, Surroundings, make_live, prepare};
use shadow::permission::Permissions;
use shadow::sync::{SyncSets, save_exit_info, save_guest_state, save_stale, save_stale_controls};
use shadow::{FieldSet, Vmcs12};

use super::laws::{self, Entry, check_merged};
use super::machine::{PROCESSORS, Processor, Ram, Vmcs};
use crate::Input;
use crate::input::edit;

/// The VMCS region.
const REGION: Gpa = Gpa(0x1000);
const PAGE: usize = 4096;
const MSR_BITMAP_12: u64 = 0x3000;

/// A VMCS12 that passes every check, and the mode in which its hypervisor enters.
#[derive(Debug)]
struct Valid {
    processor: &'static Processor,
    vmcs12: Vmcs12,
    mode: HostMode,
    live: FieldSet,
    sets: SyncSets,
}

fn chosen<W: CapabilityWord>(processor: &Processor, wanted: W) -> W {
    let (must_be_1, may_be_1) = W::allowed(&processor.offered);
    wanted.intersection(may_be_1).union(must_be_1)
}

/// Each control that can be on together with those before it.
fn most_controls(processor: &Processor) -> ControlWords {
    let mut words = like_kvm(processor);
    macro_rules! add_each {
        ($($word:ident: $type:ty),*) => {
            $(for bit in <$type>::FROM_GUEST.intersection(<$type>::allowed(&processor.offered).1).iter() {
                let more = ControlWords { $word: words.$word | bit, ..words };
                if more.check_dependencies().is_ok() {
                    words = more;
                }
            })*
        };
    }
    // The processor-based controls twice: some need those of another word.
    add_each!(pin: Pin, primary: Primary, secondary: Secondary, tertiary: Tertiary, exit: ExitControls);
    add_each!(entry: EntryControls, pin: Pin, primary: Primary, secondary: Secondary, exit: ExitControls);
    words
}

fn like_kvm(processor: &Processor) -> ControlWords {
    ControlWords {
        pin: chosen(processor, Pin::EXTERNAL_INTERRUPT_EXITING | Pin::NMI_EXITING),
        primary: chosen(processor, Primary::ACTIVATE_SECONDARY | Primary::USE_MSR_BITMAPS | Primary::HLT_EXITING),
        secondary: chosen(processor, Secondary::ENABLE_EPT | Secondary::ENABLE_VPID | Secondary::UNRESTRICTED_GUEST),
        exit: chosen(
            processor,
            ExitControls::HOST_ADDRESS_SPACE_SIZE
                | ExitControls::SAVE_DEBUG_CONTROLS
                | ExitControls::SAVE_PAT
                | ExitControls::LOAD_PAT
                | ExitControls::LOAD_EFER,
        ),
        entry: chosen(
            processor,
            EntryControls::LOAD_DEBUG_CONTROLS
                | EntryControls::LOAD_PAT
                | EntryControls::LOAD_EFER
                | EntryControls::IA32E_MODE_GUEST,
        ),
        ..ControlWords::default()
    }
}

/// A 32-bit hypervisor that uses as little as it can.
fn least_controls(processor: &Processor) -> ControlWords {
    ControlWords {
        pin: chosen(processor, Pin::empty()),
        primary: chosen(processor, Primary::empty()),
        exit: chosen(processor, ExitControls::empty()),
        entry: chosen(processor, EntryControls::empty()),
        ..ControlWords::default()
    }
}

fn valid_vmcs12(processor: &Processor, words: ControlWords) -> (Vmcs12, HostMode) {
    let is_64 = words.exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
    let mut vmcs12 = Vmcs12::new(REGION, &processor.offered);
    vmcs12.set(PIN_CONTROLS, words.pin);
    vmcs12.set(PRIMARY_CONTROLS, words.primary);
    vmcs12.set(SECONDARY_CONTROLS, words.secondary);
    vmcs12.set(EXIT_CONTROLS, words.exit);
    vmcs12.set(ENTRY_CONTROLS, words.entry);
    let optional = [
        (TERTIARY_CONTROLS.id(), words.tertiary.bits()),
        (SECONDARY_EXIT_CONTROLS.id(), SecondaryExitControls::empty().bits()),
        (EPT_POINTER.id(), 0x5000 | 3 << 3 | 6),
        (VPID.id(), 1),
        (MSR_BITMAP.id(), MSR_BITMAP_12),
        (TSC_MULTIPLIER.id(), 1 << 48),
        (HOST_PAT.id(), 0x0007_0406_0007_0406),
        (HOST_EFER.id(), if is_64 { 0xd01 } else { 0x800 }),
    ];
    for (id, word) in optional.into_iter().filter(|(id, _)| processor.offered_fields.contains(*id)) {
        vmcs12.set_word(id, word);
    }
    vmcs12.set(VMCS_LINK_POINTER, u64::MAX);
    vmcs12.set(HOST_CR0, 0x8001_0021);
    vmcs12.set(HOST_CR3, 0x2000);
    vmcs12.set(HOST_CR4, 0x2020);
    vmcs12.set(HOST_CS_SELECTOR, 0x10);
    vmcs12.set(HOST_SS_SELECTOR, 0x18);
    vmcs12.set(HOST_TR_SELECTOR, 0x40);
    vmcs12.set(HOST_RIP, if is_64 { 0xffff_8000_0000_1000 } else { 0x1000 });
    vmcs12.set(GUEST_CR0, 0x8000_0021);
    vmcs12.set(GUEST_CR4, 0x2020);
    vmcs12.set(GUEST_RFLAGS, 2);
    (vmcs12, if is_64 { HostMode::Ia32e } else { HostMode::Legacy })
}

static VALID: LazyLock<Vec<Valid>> = LazyLock::new(|| {
    let mut all = Vec::new();
    for processor in &*PROCESSORS {
        for words in [like_kvm(processor), least_controls(processor), most_controls(processor)] {
            for live in [FieldSet::EMPTY, *Permissions::widest(&processor.offered).live()] {
                let (vmcs12, mode) = valid_vmcs12(processor, words);
                let sets = SyncSets::new(&processor.offered, &live);
                let checked = check::controls(&vmcs12, &processor.offered, &Ram::new())
                    .and_then(|()| check::host_state(&vmcs12, &processor.offered, mode));
                assert_eq!(checked, Ok(()), "a valid VMCS12 is not: {words:?}");
                all.push(Valid { processor, vmcs12, mode, live, sets });
            }
        }
    }
    all
});

/// The host's fields of vmcs02.
fn new_vmcs02(processor: &Processor) -> Vmcs {
    let mut vmcs02 = Vmcs::new(processor);
    vmcs02.poke(EPT_POINTER.id(), 0x70_0000_0000 | 3 << 3 | 6);
    vmcs02.poke(VPID.id(), 2);
    vmcs02.poke(MSR_BITMAP.id(), 0x61_0000_0000);
    vmcs02.poke(VMREAD_BITMAP.id(), 0x62_0000_0000);
    vmcs02.poke(VMWRITE_BITMAP.id(), 0x62_0000_1000);
    vmcs02
}

/// A guest hypervisor with a current VMCS.
struct Nested {
    valid: &'static Valid,
    vmcs01: Vmcs,
    vmcs02: Vmcs,
    vmcs12: Vmcs12,
    memory: Ram,
}

impl Nested {
    /// With a valid VMCS12, which is in its region too. `number` chooses which.
    fn new(number: u8) -> Self {
        let valid = &VALID[usize::from(number) % VALID.len()];
        let (processor, memory) = (valid.processor, Ram::new());
        valid.vmcs12.store(&memory);
        memory.write_u32(REGION, processor.offered.revision());
        let mut vmcs01 = Vmcs::new(processor);
        vmcs01.poke(GUEST_PAT.id(), 0x0007_0406_0007_0406);
        vmcs01.poke(GUEST_EFER.id(), 0xd01);
        vmcs01.poke(GUEST_DR7.id(), 0x400);
        Self { valid, vmcs01, vmcs02: new_vmcs02(processor), vmcs12: valid.vmcs12.clone(), memory }
    }

    /// VMPTRLD.
    fn load(&mut self) {
        self.vmcs12 = Vmcs12::load(&self.memory, REGION, &self.valid.processor.offered);
        make_live(&mut self.vmcs02, &mut self.vmcs12, &self.valid.live.and(&self.valid.processor.offered_fields));
    }

    /// VMCLEAR, and VMPTRLD of the same region: VMCS12 is as it was.
    fn store_and_load(&mut self) {
        let before = self.seen();
        save_stale(&self.vmcs02, &mut self.vmcs12);
        self.vmcs12.store(&self.memory);
        self.load();
        let after = self.seen();
        assert_eq!(before.launch_state, after.launch_state);
        for id in FieldId::all() {
            assert_eq!(before.word(id), after.word(id), "{id:?} in the region");
        }
    }

    /// VMCS12 as the guest hypervisor reads it.
    fn seen(&self) -> Vmcs12 {
        let mut seen = self.vmcs12.clone();
        seen.settle();
        save_stale(&self.vmcs02, &mut seen);
        seen
    }

    /// VMWRITE of a value near the present one.
    fn write_field(&mut self, id: FieldId, input: &mut Input<'_>) {
        if !self.valid.processor.offered_fields.contains(id) {
            return;
        }
        let word = input.neighbour(self.seen().word(id)) & id.encoding().width().mask();
        if self.valid.live.contains(id) {
            self.vmcs02.poke(id, word);
        } else {
            self.vmcs12.set_word(id, word);
        }
    }

    /// VMLAUNCH or VMRESUME, as far as the processor's part. Returns whether the nested guest runs.
    fn enter(&mut self) -> bool {
        let Valid { processor, mode, live, sets, .. } = self.valid;
        let Processor { caps, offered, .. } = processor;
        let seen = self.seen();
        self.vmcs12.settle();
        let inherited = Inherited::read(&self.vmcs01, &self.vmcs12);
        save_stale_controls(&self.vmcs02, &mut self.vmcs12);
        // What vmcs02 alone holds has no part in a verdict.
        let verdict = check::controls_of_vmcs12(&self.vmcs12, offered)
            .and_then(|()| check::host_state(&self.vmcs12, offered, *mode));
        let of_seen = check::controls_of_vmcs12(&seen, offered).and_then(|()| check::host_state(&seen, offered, *mode));
        assert_eq!(verdict, of_seen);
        if verdict.is_ok() {
            assert_eq!(check::host_bases(&seen, offered), Ok(()), "{HOST_BASES:?}");
        }
        let guest_state = check::guest_state(&self.vmcs12, offered, &self.memory);
        // The rest of the checks, which the processor makes. Only their end is of interest.
        _ = check::controls(&seen, offered, &self.memory);
        if verdict.is_err() || guest_state.is_err() {
            return false;
        }
        let ia32e = seen.get(ENTRY_CONTROLS).contains(EntryControls::IA32E_MODE_GUEST);
        let pdptes = match seen.has_secondary(Secondary::ENABLE_EPT) {
            true => None,
            false => {
                let [cr0, cr3, cr4] = [GUEST_CR0, GUEST_CR3, GUEST_CR4].map(|field| seen.get(field));
                check::read_pdptes(&self.memory, cr0, cr3, cr4, ia32e)
            }
        };
        self.vmcs02.written = FieldSet::EMPTY;
        let memory = &self.memory;
        prepare(&mut self.vmcs02, &mut self.vmcs12, &Surroundings { caps, sets, memory, inherited, pdptes });
        check_merged(&self.vmcs02, &Entry { vmcs01: &self.vmcs01, vmcs12: &seen, pdptes, memory }, processor, live);
        // An entry that the processor refuses now leaves VMCS12 as it was.
        let after = self.seen();
        for id in processor.offered_fields.iter() {
            assert_eq!(after.word(id), seen.word(id), "{id:?} after the merge");
        }
        true
    }

    /// The nested guest runs, which changes fields of vmcs02, and exits; its hypervisor continues.
    fn exit(&mut self, input: &mut Input<'_>) {
        let before = self.seen();
        let processor = self.valid.processor;
        for _ in 0..input.byte() & 7 {
            let id = any_field(input);
            let word = input.neighbour(self.vmcs02_word(id));
            if is_the_processors(id) && processor.fields.contains(id) {
                self.vmcs02.poke(id, word);
            }
        }
        let injected = InterruptionInfo(self.vmcs02.read(ENTRY_INTERRUPTION_INFO));
        self.vmcs02.poke(ENTRY_INTERRUPTION_INFO.id(), injected.invalidated().0.into());
        if processor.offered.stores_lma() {
            let controls = self.vmcs02.read(ENTRY_CONTROLS) ^ stored_by(input.byte());
            self.vmcs02.poke(ENTRY_CONTROLS.id(), controls.bits().into());
        }
        let of_processor = self.vmcs02.clone();

        save_guest_state(&self.vmcs02, &mut self.vmcs12, &self.valid.sets);
        save_exit_info(&self.vmcs02, &mut self.vmcs12, &self.valid.sets);
        let after = self.seen();
        for id in processor.offered_fields.iter() {
            let expected = laws::expected_after_exit(&before, &of_processor, processor, id);
            assert_eq!(after.word(id), expected, "{id:?} after an exit");
        }
        self.load_host_state();
    }

    fn vmcs02_word(&self, id: FieldId) -> u64 {
        if self.valid.processor.fields.contains(id) { self.vmcs02.read_raw(id) } else { 0 }
    }

    /// The end of an exit: the guest hypervisor has the host state of VMCS12.
    fn load_host_state(&mut self) {
        let offered = &self.valid.processor.offered;
        let left = LeftBehind::read(&self.vmcs02, &self.vmcs12, false);
        let image = HostImage::of(&self.vmcs12);
        self.vmcs01.written = FieldSet::EMPTY;
        let loaded = load_host_state(&mut self.vmcs01, &self.vmcs12, &image, offered, &self.memory, &left);
        assert!(loaded.is_ok() || matches!(self.valid.mode, HostMode::Legacy));
        assert!(self.vmcs01.written.iter().all(|id| id.encoding().area() == Area::Guest));
        let vmcs01 = &self.vmcs01;
        assert!(check::is_fixed(vmcs01.read(GUEST_CR0), offered.cr0_fixed0, offered.cr0_fixed1));
        assert!(check::is_fixed(vmcs01.read(GUEST_CR4), offered.cr4_fixed0, offered.cr4_fixed1));
        assert_eq!(vmcs01.read(GUEST_RIP), self.vmcs12.get(HOST_RIP));
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() & 0xf {
            0..3 => self.write_field(any_field(input), input),
            3..7 => self.write_field(field_of(input, |merge| !is_plain(merge)), input),
            7..10 => self.write_field(field_of(input, |merge| merge == Merge::ControlWord), input),
            10 => {
                let field = input.pick(&[GUEST_DEBUGCTL, GUEST_DR7, GUEST_PAT, GUEST_EFER]);
                let word = input.neighbour(self.vmcs01.read(field));
                self.vmcs01.poke(field.id(), word);
            }
            11 => {
                let at = Gpa(u64::from(input.half() & 0x3fff));
                if at.0 < REGION.0 || at.0 >= REGION.0 + PAGE as u64 {
                    self.memory.write_u32(at, input.long());
                }
            }
            12 => self.store_and_load(),
            _ => {
                if self.enter() {
                    self.exit(input);
                }
            }
        }
    }
}

/// The fields, the ones first that do more in vmcs02 than hold a value.
static BY_IMPORTANCE: LazyLock<Vec<FieldId>> = LazyLock::new(|| {
    let mut fields: Vec<FieldId> = FieldId::all().collect();
    fields.sort_by_key(|id| (id.info().merge != Merge::ControlWord, is_plain(id.info().merge)));
    fields
});

/// Whether vmcs02 holds what the guest hypervisor writes, and nothing depends on it.
const fn is_plain(merge: Merge) -> bool {
    matches!(merge, Merge::Copy | Merge::Guest | Merge::ExitInfo)
}

fn any_field(input: &mut Input<'_>) -> FieldId {
    input.pick(&BY_IMPORTANCE)
}

/// One of the first fields, whose class is `wanted`.
fn field_of(input: &mut Input<'_>, wanted: fn(Merge) -> bool) -> FieldId {
    let count = BY_IMPORTANCE.partition_point(|id| wanted(id.info().merge));
    input.pick(&BY_IMPORTANCE[..count])
}

/// Whether the processor changes a field of vmcs02 while a nested guest runs, or when it exits.
fn is_the_processors(id: FieldId) -> bool {
    matches!(id.info().merge, Merge::Guest | Merge::ExitInfo | Merge::Loaded | Merge::Pdpte | Merge::Timer)
        || id == VM_INSTRUCTION_ERROR.id()
}

/// The bit of the VM-entry controls that an exit stores, flipped or not.
fn stored_by(byte: u8) -> EntryControls {
    if byte & 1 != 0 { EntryControls::IA32E_MODE_GUEST } else { EntryControls::empty() }
}

const STEPS: usize = 64;

/// A guest hypervisor that writes its VMCS and enters.
///
/// The input: which valid VMCS12 it begins with, then steps.
pub fn vmcs12(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut nested = Nested::new(input.byte());
    nested.load();
    for _ in 0..STEPS {
        if input.is_at_end() {
            break;
        }
        nested.step(&mut input);
    }
    if nested.enter() {
        nested.exit(&mut input);
    }
    nested.store_and_load();
}

/// A VMCS region that the guest hypervisor has written to before it becomes current: an edited one, or any bytes.
///
/// The input: which valid VMCS12 is there, how many times it is entered, and the edits or the bytes.
pub fn vmcs_region(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut nested = Nested::new(input.byte());
    let style = input.byte();
    let region = &mut nested.memory.bytes()[REGION.0 as usize..][..PAGE];
    if style & 0x80 == 0 {
        edit(&mut input, &mut region[..16 + 8 * FIELD_COUNT]);
    } else {
        let content = input.take(PAGE);
        region[4..4 + content.len().min(PAGE - 4)].copy_from_slice(&content[..content.len().min(PAGE - 4)]);
    }
    nested.load();
    for _ in 0..=style & 1 {
        if nested.enter() {
            nested.exit(&mut input);
        }
    }
    nested.store_and_load();
}
