//! VM-entry MSR-load, VM-exit MSR-store and MSR-load areas (SDM 27.4, 28.4, 28.6). A VM-exit load that fails is a VMX
//! abort, which ends the machine, so it is not tried.

use shadow::controls::{EntryControls, ExitControls};
use shadow::fields::*;

use crate::code;
use crate::cpu::{rdmsr, wrmsr};
use crate::memory::{LONG_MSR_AREA, MSR_AREAS};
use crate::output::Suite;
use crate::vm::Vm;

const STORE: usize = 0;
const EXIT_LOAD: usize = 0x80;
const ENTRY_LOAD: usize = 0x100;
const KERNEL_GS_BASE: u64 = 0xc000_0102;
const LSTAR: u64 = 0xc000_0082;

fn put(area: usize, index: usize, msr: u64, value: u64) {
    MSR_AREAS.set(area + 2 * index, msr);
    MSR_AREAS.set(area + 2 * index + 1, value);
}

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    round_trip(suite);
    stored_capabilities(suite);
    changed_by_the_guest(suite);
    longest(suite);
    bad_loads(suite);
    registers_of_failed_entries(suite);
}

fn round_trip(suite: &mut Suite) {
    let mut vm = Vm::new(code!("mov ecx, 0xc0000102", "rdmsr"));
    put(ENTRY_LOAD, 0, KERNEL_GS_BASE, 0x1111);
    put(ENTRY_LOAD, 1, LSTAR, 0x2222);
    put(STORE, 0, KERNEL_GS_BASE, 0);
    put(STORE, 1, LSTAR, 0);
    put(EXIT_LOAD, 0, KERNEL_GS_BASE, 0x3333);
    put(EXIT_LOAD, 1, LSTAR, 0x4444);
    vm.set(ENTRY_MSR_LOAD_COUNT, 2).set(EXIT_MSR_STORE_COUNT, 2).set(EXIT_MSR_LOAD_COUNT, 2);
    let verdict = vm.run();
    suite.case("round-trip", format_args!("{verdict} rax={:#x}", vm.registers.rax));
    suite.case("stored", format_args!("{:#x} {:#x}", MSR_AREAS.get(STORE + 1), MSR_AREAS.get(STORE + 3)));
    let host = [KERNEL_GS_BASE, LSTAR].map(|msr| rdmsr(msr as u32).unwrap_or(0));
    suite.case("loaded-by-exit", format_args!("{host:x?}"));
    vm.set(EXIT_MSR_LOAD_COUNT, 0)
        .set(ENTRY_MSR_LOAD_COUNT, 0)
        .set(GUEST_RIP, code!("mov ecx, 0xc0000102", "mov eax, 0x5555", "xor edx, edx", "wrmsr"));
    let verdict = vm.run();
    suite.case("stored-after-wrmsr", format_args!("{verdict} {:#x}", MSR_AREAS.get(STORE + 1)));
    for (name, msr) in [
        ("efer", 0xc000_0080_u64),
        ("pat", 0x277),
        ("sysenter-cs", 0x174),
        ("star", 0xc000_0081),
        ("fs-base", 0xc000_0100),
        ("apic-base", 0x1b),
        ("tsc-aux", 0xc000_0103),
    ] {
        let mut vm = Vm::new(code!("nop"));
        put(STORE, 0, msr, 0);
        vm.set(EXIT_MSR_STORE_COUNT, 1);
        let verdict = vm.run();

        let value = MSR_AREAS.get(STORE + 1);
        suite.case(format_args!("store-{name}"), format_args!("{verdict} {value:#x}"));
    }
    for msr in [KERNEL_GS_BASE, LSTAR] {
        let _ = wrmsr(msr as u32, 0);
    }
}

/// MSRs that a hypervisor emulates: the stored values are those that RDMSR reads.
fn stored_capabilities(suite: &mut Suite) {
    for (name, msr) in [
        ("vmx-basic", 0x480_u64),
        ("vmx-misc", 0x485),
        ("vmx-secondary", 0x48b),
        ("vmx-ept-vpid", 0x48c),
        ("feature-control", 0x3a),
    ] {
        let mut vm = Vm::new(code!("nop"));
        put(STORE, 0, LSTAR, 0);
        put(STORE, 1, msr, 0);
        vm.set(EXIT_MSR_STORE_COUNT, 2);
        let verdict = vm.run();
        let is_what_rdmsr_reads = rdmsr(msr as u32) == Ok(MSR_AREAS.get(STORE + 3));
        suite.case(format_args!("store-{name}"), format_args!("{verdict} {is_what_rdmsr_reads}"));
    }
}

/// A nested guest changes the VM-exit areas: their content at the exit counts.
fn changed_by_the_guest(suite: &mut Suite) {
    const RUNS: &[(&str, u64)] = &[
        ("kernel-gs-base", KERNEL_GS_BASE),
        ("star", 0xc000_0081),
        ("efer", 0xc000_0080),
        ("pat", 0x277),
        ("sysenter-cs", 0x174),
        ("sysenter-esp", 0x175),
        ("sysenter-eip", 0x176),
        ("fs-base", 0xc000_0100),
        ("gs-base", 0xc000_0101),
        ("feature-control", 0x3a),
    ];
    for &(name, msr) in RUNS {
        let mut vm = Vm::new(code!("mov [rbx], ecx"));
        for index in 0..2 {
            put(STORE, index, LSTAR, 0);
        }
        vm.registers.rbx = MSR_AREAS.address() + 8 * (STORE as u64 + 2);
        vm.registers.rcx = msr;
        vm.set(EXIT_MSR_STORE_COUNT, 2);
        let verdict = vm.run();
        let stored = [MSR_AREAS.get(STORE), MSR_AREAS.get(STORE + 2), MSR_AREAS.get(STORE + 3)];
        suite.case(format_args!("changed-store-{name}"), format_args!("{verdict} {stored:x?}"));
    }
    let mut vm = Vm::new(code!("mov [rdi], ecx"));
    put(EXIT_LOAD, 0, KERNEL_GS_BASE, 0x4444);
    vm.registers.rdi = MSR_AREAS.address() + 8 * EXIT_LOAD as u64;
    vm.registers.rcx = LSTAR;
    vm.set(EXIT_MSR_LOAD_COUNT, 1);
    let verdict = vm.run();
    suite.case("changed-load", format_args!("{verdict} {:#x}", rdmsr(LSTAR as u32).unwrap_or(0)));
    let _ = wrmsr(LSTAR as u32, 0);
}

/// Areas with the most entries that `IA32_VMX_MISC[27:25]` = 0 recommends.
fn longest(suite: &mut Suite) {
    const MOST: u32 = 512;
    for count in [MOST - 1, MOST] {
        let last = 2 * count as usize - 1;
        for index in 0..MOST as usize {
            LONG_MSR_AREA.set(2 * index, LSTAR);
            LONG_MSR_AREA.set(2 * index + 1, 0x1000 + index as u64);
        }
        let mut vm = Vm::new(code!("mov ecx, 0xc0000082", "rdmsr"));
        vm.set(ENTRY_MSR_LOAD_ADDRESS, LONG_MSR_AREA.address()).set(ENTRY_MSR_LOAD_COUNT, count);
        let verdict = vm.run();
        suite.case(format_args!("load-{count}"), format_args!("{verdict} rax={:#x}", vm.registers.rax));
        let mut vm = Vm::new(code!("mov ecx, 0xc0000082", "mov eax, 0x77", "xor edx, edx", "wrmsr"));
        vm.set(EXIT_MSR_STORE_ADDRESS, LONG_MSR_AREA.address()).set(EXIT_MSR_STORE_COUNT, count);
        let verdict = vm.run();
        let stored = [LONG_MSR_AREA.get(1), LONG_MSR_AREA.get(last), LONG_MSR_AREA.get(2 * MOST as usize - 1)];
        suite.case(format_args!("store-{count}"), format_args!("{verdict} {stored:x?}"));
        LONG_MSR_AREA.set(last, 0x88);
        let mut vm = Vm::new(code!("nop"));
        vm.set(EXIT_MSR_LOAD_ADDRESS, LONG_MSR_AREA.address()).set(EXIT_MSR_LOAD_COUNT, count);
        let verdict = vm.run();
        let lstar = rdmsr(LSTAR as u32).unwrap_or(0);
        suite.case(format_args!("exit-load-{count}"), format_args!("{verdict} {lstar:#x}"));
        let _ = wrmsr(LSTAR as u32, 0);
    }
}

/// IA32_PAT and IA32_EFER after an entry that fails before it loads them, after it has loaded them, and after its MSRs
/// have loaded others; by each way in which entry and exit load them (SDM 27.8, 28.5.1).
fn registers_of_failed_entries(suite: &mut Suite) {
    const PAT: u64 = 0x277;
    const EFER: u64 = 0xc000_0080;
    const NEVER_LOADED: u64 = 0xc000_0100;
    // SCE shows whose EFER is there.
    let [efer_of_entry, efer_of_area, efer_of_exit] = [0xd01, 0xd01, 0xd00];
    let [pat_of_entry, pat_of_area, pat_of_exit] =
        [0x0606_0606_0606_0606, 0x0404_0404_0404_0404, 0x0007_0406_0007_0506];
    let areas: [(&str, &[(u64, u64)]); 4] = [
        ("nothing", &[]),
        ("pat", &[(PAT, pat_of_area)]),
        ("efer", &[(EFER, efer_of_area)]),
        ("both", &[(PAT, pat_of_area), (EFER, efer_of_area)]),
    ];
    for loads in 0..16 {
        for (name, area) in areas.into_iter().chain([("guest-state", &[][..])]) {
            let mut vm = Vm::new(code!("nop"));
            let has = |bit: u32| loads >> bit & 1 != 0;
            let entry = [(EntryControls::LOAD_PAT, has(0)), (EntryControls::LOAD_EFER, has(1))];
            let exit = [(ExitControls::LOAD_PAT, has(2)), (ExitControls::LOAD_EFER, has(3))];
            for (control, is_on) in entry {
                if is_on {
                    vm.or(ENTRY_CONTROLS, control)
                } else {
                    vm.clear(ENTRY_CONTROLS, control)
                };
            }
            for (control, is_on) in exit {
                if is_on {
                    vm.or(EXIT_CONTROLS, control)
                } else {
                    vm.clear(EXIT_CONTROLS, control)
                };
            }
            vm.set(GUEST_PAT, pat_of_entry).set(GUEST_EFER, efer_of_entry);
            vm.set(HOST_PAT, pat_of_exit).set(HOST_EFER, efer_of_exit);
            for (index, &(msr, value)) in area.iter().chain(&[(NEVER_LOADED, 0)]).enumerate() {
                put(ENTRY_LOAD, index, msr, value);
            }
            vm.set(ENTRY_MSR_LOAD_COUNT, area.len() as u32 + 1);
            if name == "guest-state" {
                vm.set(GUEST_RFLAGS, 0);
            }
            let (verdict, found) = vm.run_and_observe(|_| [PAT, EFER].map(|msr| rdmsr(msr as u32).unwrap_or(0)));
            suite.case(
                format_args!("failed-entry-loads-{loads:04b}-after-{name}"),
                format_args!("{verdict} {found:x?}"),
            );
        }
    }
}

/// Entries that VM entry rejects: exit reason 34, the qualification is the number of the entry.
fn bad_loads(suite: &mut Suite) {
    let entries: &[(&str, u64, u64)] = &[
        ("fs-base", 0xc000_0100, 0),
        ("gs-base", 0xc000_0101, 0),
        ("reserved", 1 << 32 | KERNEL_GS_BASE, 0),
        ("reserved-high", 1 << 63 | KERNEL_GS_BASE, 0),
        ("x2apic-tpr", 0x808, 0),
        ("x2apic-last", 0x8ff, 0),
        ("smm-monitor-ctl", 0x9b, 0),
        ("smbase", 0x9e, 0),
        ("microcode-update", 0x79, 0),
        ("microcode-revision", 0x8b, 0),
        ("non-canonical", KERNEL_GS_BASE, 1 << 47),
        ("efer-reserved", 0xc000_0080, 1 << 1),
        ("efer-without-lma", 0xc000_0080, 0),
        ("pat-reserved", 0x277, 2),
        ("debugctl-reserved", 0x1d9, 1 << 20),
        ("vmx-basic", 0x480, 0),
        ("feature-control", 0x3a, 5),
        ("sysenter-cs", 0x174, 8),
        ("sysenter-esp-non-canonical", 0x175, 1 << 47),
        ("kernel-gs-base", KERNEL_GS_BASE, 0x1234),
    ];
    for &(name, msr, value) in entries {
        for position in [0, 1, 3] {
            let mut vm = Vm::new(code!("mov ecx, 0xc0000102", "rdmsr"));
            let _ = wrmsr(LSTAR as u32, 0);
            for index in 0..5 {
                put(ENTRY_LOAD, index, LSTAR, 0x100 + index as u64);
            }
            put(ENTRY_LOAD, position, msr, value);
            vm.set(ENTRY_MSR_LOAD_COUNT, 5);
            let verdict = vm.run();
            // MSRs that were loaded before the bad entry keep their values.
            let lstar = rdmsr(LSTAR as u32).unwrap_or(0);
            suite.case(format_args!("entry-load-{name}-at-{position}"), format_args!("{verdict} lstar={lstar:#x}"));
        }
    }
    let _ = wrmsr(LSTAR as u32, 0);
    let _ = wrmsr(KERNEL_GS_BASE as u32, 0);
}
