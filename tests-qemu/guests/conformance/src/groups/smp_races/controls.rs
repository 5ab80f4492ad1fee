//! Bitmaps, MSR areas, shadow VMCSs and VMCS regions, edited while they are used.

use shadow::controls::{Primary, Secondary};
use shadow::fields::*;

use super::arena::{self, AREAS, BITMAPS, SHADOWING, mine, own};
use super::{FAILS, Race, SUCCEEDS, VMCALL, enter};
use crate::code;
use crate::cpu::{rdmsr, vmclear, vmptrld};
use crate::memory::VMCS;
use crate::random::Random;
use crate::vm::{Verdict, Vm, revision};

const EXCEPTION: u64 = 0;
const VMREAD: u64 = 23;
const VMWRITE: u64 = 25;
const IO: u64 = 30;
const RDMSR: u64 = 31;
const WRMSR: u64 = 32;
const INVALID_GUEST_STATE: u64 = 0x8000_0021;
const MSR_LOADING: u64 = 0x8000_0022;
/// VM-instruction errors of VMPTRLD.
const WRONG_REVISION: u64 = 11;

const SHADOW_INDICATOR: u64 = 1 << 31;

/// MSRs that hold any canonical value, and that the image does not use.
const HARMLESS: [u64; 5] = [0x175, 0x176, 0xc000_0082, 0xc000_0083, 0xc000_0102];
/// MSR entries that VM entry cannot load: FS base, an x2APIC register, an absent MSR, reserved bits of the index.
const NOT_LOADABLE: [u64; 4] = [0xc000_0100, 0x802, 0x1_2345, 1 << 40 | 0x175];
/// Entries of each MSR area.
const ENTRIES: u32 = 4;

pub const RACES: &[Race] = &[
    Race {
        name: "msr-bitmap",
        build: arena::clear,
        exists: || true,
        prepare: |vm| _ = vm.set(MSR_BITMAP, BITMAPS.address()),
        step: access_msr,
        edit: |random, _| edit_word(random, 0..512),
        allowed: &[VMCALL, RDMSR, WRMSR, EXCEPTION],
    },
    Race {
        name: "io-bitmaps",
        build: arena::clear,
        exists: || true,
        prepare: |vm| {
            vm.or(PRIMARY_CONTROLS, Primary::USE_IO_BITMAPS);
            vm.set(IO_BITMAP_A, BITMAPS.address() + 0x1000).set(IO_BITMAP_B, BITMAPS.address() + 0x2000);
        },
        step: access_port,
        edit: |random, _| edit_word(random, 512..1536),
        allowed: &[VMCALL, IO],
    },
    Race {
        name: "entry-msr-load",
        build: build_areas,
        exists: || true,
        prepare: |vm| {
            vm.set(ENTRY_MSR_LOAD_ADDRESS, AREAS.address() + 0x800).set(ENTRY_MSR_LOAD_COUNT, ENTRIES);
        },
        step: |vm, _| enter(vm, code!("nop")),
        edit: |random, _| {
            let entry = 0x100 + random.below(ENTRIES.into()) as usize * 2;
            let index = if random.below(4) == 0 { pick(random, &NOT_LOADABLE) } else { pick(random, &HARMLESS) };
            AREAS.set(entry, index);
            AREAS.set(entry + 1, random.below(u64::MAX) >> random.below(64));
        },
        allowed: &[VMCALL, MSR_LOADING],
    },
    Race {
        // An MSR that can't be stored or loaded would be a VMX abort.
        name: "exit-msr-areas",
        build: build_areas,
        exists: || true,
        prepare: |vm| {
            vm.set(EXIT_MSR_STORE_ADDRESS, AREAS.address()).set(EXIT_MSR_STORE_COUNT, ENTRIES);
            vm.set(EXIT_MSR_LOAD_ADDRESS, AREAS.address() + 0x400).set(EXIT_MSR_LOAD_COUNT, ENTRIES);
        },
        step: |vm, _| enter(vm, code!("nop")),
        edit: |random, _| {
            let entry = random.below(2) as usize * 0x80 + random.below(ENTRIES.into()) as usize * 2;
            AREAS.set(entry, pick(random, &HARMLESS));
            AREAS.set(entry + 1, random.below(1 << 47));
        },
        allowed: &[VMCALL],
    },
    Race {
        name: "shadowing-bitmaps",
        build: arena::clear,
        exists: has_shadowing,
        prepare: link,
        step: access_vmcs,
        edit: |random, _| SHADOWING.set(random.below(1024) as usize, random.below(u64::MAX)),
        allowed: &[VMCALL, VMREAD, VMWRITE],
    },
    Race {
        name: "shadow-vmcs",
        build: arena::clear,
        exists: has_shadowing,
        prepare: link,
        step: access_vmcs,
        edit: |random, user| match random.below(16) {
            0 => own(user).set(0, random.below(u64::MAX)),
            1..8 => own(user).set(0, revision() | SHADOW_INDICATOR),
            _ => own(user).set(1 + random.below(511) as usize, random.below(u64::MAX)),
        },
        allowed: &[VMCALL, VMREAD, VMWRITE, INVALID_GUEST_STATE],
    },
    Race {
        name: "vmcs-region",
        build: arena::clear,
        exists: || true,
        prepare: |_| (),
        step: load_region,
        edit: |random, user| match random.below(4) {
            0 => own(user).set(0, random.below(u64::MAX)),
            1 => own(user).set(1 + random.below(511) as usize, random.below(u64::MAX)),
            _ => own(user).set(0, revision()),
        },
        allowed: &[SUCCEEDS, FAILS | WRONG_REVISION],
    },
];

fn pick(random: &mut Random, from: &[u64]) -> u64 {
    from[random.below(from.len() as u64) as usize]
}

fn edit_word(random: &mut Random, words: core::ops::Range<u64>) {
    let word = words.start + random.below(words.end - words.start);
    BITMAPS.set(word as usize, random.below(u64::MAX));
}

fn access_msr(vm: &mut Vm, random: &mut Random) -> Verdict {
    vm.registers.rcx = pick(random, &HARMLESS);
    (vm.registers.rax, vm.registers.rdx) = (0, 0);
    enter(vm, if random.below(2) == 0 { code!("rdmsr") } else { code!("wrmsr") })
}

/// Accesses the POST port, and a port without a device.
fn access_port(vm: &mut Vm, random: &mut Random) -> Verdict {
    (vm.registers.rax, vm.registers.rdx) = (0, pick(random, &[0x80, 0xe0e0]));
    enter(vm, if random.below(2) == 0 { code!("in al, dx") } else { code!("out dx, al") })
}

/// Builds areas that load and store harmless MSRs only.
fn build_areas() {
    arena::clear();
    for (area, entry) in (0..3).flat_map(|area| (0..ENTRIES as usize).map(move |entry| (area, entry))) {
        AREAS.set(area * 0x80 + entry * 2, HARMLESS[0]);
    }
}

fn has_shadowing() -> bool {
    const PROCBASED_CTLS2: u32 = 0x48b;
    rdmsr(PROCBASED_CTLS2).unwrap_or(0) >> 32 & u64::from(Secondary::VMCS_SHADOWING.bits()) != 0
}

/// A shadow VMCS of this user's own, and the bitmaps of all.
fn link(vm: &mut Vm) {
    let region = mine();
    region.set(0, revision() | SHADOW_INDICATOR);
    let _ = vmclear(region.address());
    vm.or(SECONDARY_CONTROLS, Secondary::VMCS_SHADOWING);
    vm.set(VMREAD_BITMAP, SHADOWING.address()).set(VMWRITE_BITMAP, SHADOWING.address() + 0x1000);
    vm.set(VMCS_LINK_POINTER, region.address());
}

fn access_vmcs(vm: &mut Vm, random: &mut Random) -> Verdict {
    let fields = [GUEST_RIP.id(), GUEST_CR3.id(), EXIT_REASON.id(), VPID.id(), GUEST_ES_LIMIT.id()];
    vm.registers.rcx = fields[random.below(fields.len() as u64) as usize].encoding().0.into();
    vm.registers.rax = random.below(u64::MAX);
    enter(vm, if random.below(2) == 0 { code!("vmread rax, rcx") } else { code!("vmwrite rcx, rax") })
}

/// Makes the region active and clear again. Returns VMPTRLD's outcome.
fn load_region(_: &mut Vm, _: &mut Random) -> Verdict {
    let outcome = vmptrld(mine().address());
    let _ = vmclear(mine().address());
    let _ = vmptrld(VMCS.address());
    Verdict::NotEntered(outcome)
}
