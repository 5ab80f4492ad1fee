//! What an exit reports: reason, qualification, instruction information, and encodings in registers.

use ept::Gpa;
use shadow::Vmcs12;
use shadow::controls::Secondary;
use shadow::descriptor::Descriptor;
use shadow::encoding::Encoding;
use shadow::exit::{ExitReason, InsnInfo, InterruptionInfo, IoAccess, Qualification};
use shadow::fields::{MSR_BITMAP, PRIMARY_CONTROLS, SECONDARY_CONTROLS};
use shadow::hw::GuestMemory;
use shadow::index::lookup;
use shadow::msr::Access;
use shadow::operand::{AddressSpace, Segment, linear_address};
use shadow::policy::{IoExits, Route, intercepts_field, is_always_reflected, route};
use shadow::registers::{is_canonical, linear_bits_of};

use super::machine::{PROCESSORS, Ram};
use crate::Input;

/// An exit with any information.
///
/// The input: the fields of the exit information in a row, then the operand's registers and segment, and VMCS12.
pub fn exits(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let reason = if input.flag() { ExitReason(input.long()) } else { ExitReason(u32::from(input.byte() % 96)) };
    let (word, interruption) = (input.quad(), InterruptionInfo(input.long()));
    let qualification = Qualification::of(reason, word, interruption);
    assert_eq!(qualification, Qualification::of(reason.without_modifiers(), word, interruption));
    if let Qualification::Io(access) = qualification {
        check_io(access);
    }
    assert_eq!(reason.info().map(|info| info.reason), reason.name().map(|_| reason.without_modifiers()));
    assert!(reason.of_failed_entry().is_entry_failure() && !format!("{reason:?} {qualification:?}").is_empty());
    check_operand(&mut input, word);
    check_descriptor(Descriptor(input.quad()));
    check_encoding(&mut input);
    check_route(&mut input, reason);
}

fn check_io(access: IoAccess) {
    assert!((1..=8).contains(&access.bytes()) && u64::from(access.port()) == access.0 >> 16 & 0xffff);
}

/// The address of an operand is one that the processor would use.
fn check_operand(input: &mut Input<'_>, displacement: u64) {
    let info = InsnInfo(input.long());
    let registers: [u64; 16] = std::array::from_fn(|_| input.neighbour(u64::MAX));
    let offset = info.effective_address(displacement, |number| registers[number]);
    let bytes = [1, 4, 8, 16][input.below(4)];
    let segment =
        Segment { base: input.neighbour(0), limit: input.neighbour(0xffff_ffff) as u32, access_rights: input.long() };
    let access = if input.flag() { Access::Read } else { Access::Write };
    let (cr4, rflags) = (input.neighbour(0x2020), input.neighbour(2));
    let space = AddressSpace::of(cr4, rflags);
    if let Ok(linear) = linear_address(info, offset, bytes, access, &segment, Some(space)) {
        assert!(is_canonical(linear, linear_bits_of(cr4)));
    }
    // Outside 64-bit mode an address has at most 32 bits.
    let offset = offset & 0xffff_ffff;
    if let Ok(linear) = linear_address(info, offset, bytes, access, &segment, None) {
        assert!(linear >> 32 == 0 && segment.access_rights >> 16 & 1 == 0);
        assert_eq!(linear, (segment.base.wrapping_add(offset)) & 0xffff_ffff);
    }
}

/// A descriptor and its segment say the same.
fn check_descriptor(descriptor: Descriptor) {
    let Segment { base, limit, access_rights } = descriptor.segment();
    let is_granular = access_rights >> 15 & 1 != 0;
    let rights = u64::from(access_rights);
    let short_limit = u64::from(if is_granular { limit >> 12 } else { limit });
    let low = short_limit & 0xffff | (base & 0xff_ffff) << 16 | (rights & 0xf0ff) << 40;
    assert_eq!(low | short_limit >> 16 << 48 | base >> 24 << 56, descriptor.0);
    assert!(rights & !0xf0ff == 0 && (!is_granular || limit & 0xfff == 0xfff));
    assert_eq!(
        (u32::from(descriptor.kind()), u32::from(descriptor.dpl())),
        (access_rights & 0xf, access_rights >> 5 & 3)
    );
    assert!(!descriptor.is_system() || !(descriptor.is_code() || descriptor.is_readable() || descriptor.is_writable()));
    assert!(!descriptor.is_code() || !descriptor.is_writable());
    assert!(descriptor.is_code() || !descriptor.is_conforming_code());
}

/// An encoding names a field only if the SDM defines the encoding.
fn check_encoding(input: &mut Input<'_>) {
    let encoding = Encoding(input.neighbour(0x6c00) as u32);
    if let Some(id) = lookup(encoding) {
        assert!(encoding.reserved() == 0 && id.encoding() == encoding.full());
        assert_eq!((encoding.index(), encoding.area(), encoding.width()), {
            let own = id.encoding();
            (own.index(), own.area(), own.width())
        });
    }
}

/// What is always reflected is reflected under every VMCS12.
fn check_route(input: &mut Input<'_>, reason: ExitReason) {
    let processor = &PROCESSORS[0];
    let (mut memory, mut vmcs12) = (Ram::new(), Vmcs12::new(Gpa(0), &processor.offered));
    vmcs12.set_word(PRIMARY_CONTROLS.id(), input.long().into());
    let secondary = Secondary::from_bits_retain(input.long());
    vmcs12.set(SECONDARY_CONTROLS, secondary);
    vmcs12.set(MSR_BITMAP, 0x1000);
    let rcx = input.neighbour(0x480);
    let byte = input.byte();
    memory.bytes()[0x1000..0x2000].fill(byte);
    let route = route(reason.without_modifiers(), rcx, &vmcs12, &memory);
    let shadows = vmcs12.has_secondary(Secondary::VMCS_SHADOWING);
    for io in [IoExits::GuestHypervisors, IoExits::HostsToo] {
        let is_port = matches!(io, IoExits::GuestHypervisors) && route == Route::Port;
        if is_always_reflected(reason, rcx, io) && !shadows {
            assert!(route == Route::Reflect || is_port, "{reason:?}: {route:?}");
        }
    }
    let field = input.quad();
    assert_eq!(intercepts_field(Gpa(0x1000), &memory, field), field >= 0x8000 || byte >> (field % 8) & 1 != 0);
    assert_eq!(memory.read_u32(Gpa(0x1000)), u32::from_le_bytes([byte; 4]), "routing writes nothing");
}
