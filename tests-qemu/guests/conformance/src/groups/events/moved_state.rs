//! State that entries load and exits save or load (SDM 27.3.2, 28.3, 28.5), for both settings of the control that
//! decides.

use core::arch::asm;
use core::fmt;

use shadow::controls::{EntryControls, ExitControls};
use shadow::fields::*;

use crate::code;
use crate::cpu::{dr7, rdmsr, wrmsr};
use crate::output::Suite;
use crate::vm::{Registers, Vm};

const PAT: u32 = 0x277;
const EFER: u32 = 0xc000_0080;
const DEBUGCTL: u32 = 0x1d9;

/// The host right after an exit.
struct Host {
    rflags: u64,
    gdtr: [u64; 2],
    idtr: [u64; 2],
    selectors: [u16; 7],
    dr7: u64,
    msrs: [u64; 8],
}

impl Host {
    fn observe(registers: &Registers) -> Self {
        let mut selectors = [0_u16; 7];
        let [es, cs, ss, ds, fs, gs, tr] = &mut selectors;
        // SAFETY: only reads.
        unsafe {
            asm!(
                "mov {0:x}, es",
                "mov {1:x}, cs",
                "mov {2:x}, ss",
                "mov {3:x}, ds",
                "mov {4:x}, fs",
                "mov {5:x}, gs",
                "str {6:x}",
                out(reg) * es,
                out(reg) * cs,
                out(reg) * ss,
                out(reg) * ds,
                out(reg) * fs,
                out(reg) * gs,
                out(reg) * tr
            );
        }
        let msrs = [PAT, EFER, DEBUGCTL, 0x174, 0x175, 0x176, 0xc000_0100, 0xc000_0101];
        Self {
            rflags: registers.host_rflags,
            gdtr: registers.host_gdtr,
            idtr: registers.host_idtr,
            selectors,
            dr7: dr7(),
            msrs: msrs.map(|msr| rdmsr(msr).unwrap_or(0)),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "flags={:#x} gdt={:x?} idt={:x?} sel={:x?}", self.rflags, self.gdtr, self.idtr, self.selectors)?;
        write!(f, " dr7={:#x} msrs={:x?}", self.dr7, self.msrs)
    }
}

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    host(suite);
    saved(suite);
    loaded(suite);
    failed_entry(suite);
}

/// Loads distinct host values; each exit control off and on.
fn host(suite: &mut Suite) {
    let controls = [
        ("none", ExitControls::empty()),
        ("pat", ExitControls::LOAD_PAT),
        ("efer", ExitControls::LOAD_EFER),
        ("both", ExitControls::LOAD_PAT.union(ExitControls::LOAD_EFER)),
    ];
    for (name, control) in controls {
        for (guest, code) in [
            ("cpuid", code!("cpuid")),
            (
                "changes",
                code!(
                    "mov eax, 0x455",
                    "mov dr7, rax",
                    "mov ecx, 0x1d9",
                    "mov eax, 1",
                    "xor edx, edx",
                    "wrmsr",
                    "mov ecx, 0x277",
                    "mov eax, 0x06060606",
                    "mov edx, eax",
                    "wrmsr",
                    "std",
                    "stc",
                    "cpuid"
                ),
            ),
        ] {
            let mut vm = Vm::new(code);
            vm.clear(EXIT_CONTROLS, ExitControls::LOAD_PAT | ExitControls::LOAD_EFER);
            vm.or(EXIT_CONTROLS, control);
            vm.set(HOST_PAT, 0x0007_0406_0007_0401).set(HOST_SYSENTER_CS, 0x77);
            vm.set(HOST_SYSENTER_ESP, 0x1234_5678).set(HOST_SYSENTER_EIP, 0x8765_4321);
            vm.set(HOST_FS_BASE, 0x1111_0000).set(HOST_GS_BASE, 0x2222_0000);
            vm.set(HOST_FS_SELECTOR, 0x10).set(HOST_ES_SELECTOR, 0).set(HOST_DS_SELECTOR, 0);
            let (verdict, host) = vm.run_and_observe(Host::observe);
            restore();
            suite.case(format_args!("host-{name}-{guest}"), format_args!("{verdict} {host}"));
        }
    }
}

fn restore() {
    for msr in [0x174, 0x175, 0x176, 0xc000_0100, 0xc000_0101] {
        let _ = wrmsr(msr, 0);
    }
}

/// Changes of the nested guest, with the "save" control off and on.
fn saved(suite: &mut Suite) {
    let code = code!(
        "mov eax, 0x455",
        "mov dr7, rax",
        "mov ecx, 0x1d9",
        "mov eax, 2",
        "xor edx, edx",
        "wrmsr",
        "mov ecx, 0x277",
        "mov eax, 0x06060606",
        "mov edx, eax",
        "wrmsr",
        "mov ecx, 0xc0000080",
        "mov eax, 0xd01",
        "xor edx, edx",
        "wrmsr",
        "mov ecx, 0x176",
        "mov eax, 0x99",
        "wrmsr",
        "mov eax, 0x30",
        "mov gs, eax",
        "xor eax, eax",
        "mov fs, eax",
        "cpuid"
    );
    for bits in 0..16 {
        let mut vm = Vm::new(code);
        for (index, control) in
            [ExitControls::SAVE_DEBUG_CONTROLS, ExitControls::SAVE_PAT, ExitControls::SAVE_EFER, ExitControls::LOAD_PAT]
                .into_iter()
                .enumerate()
        {
            if bits >> index & 1 != 0 {
                vm.or(EXIT_CONTROLS, control);
            } else {
                vm.clear(EXIT_CONTROLS, control);
            }
        }
        let (verdict, host) = vm.run_and_observe(Host::observe);
        restore();
        let state = [
            vm.get(GUEST_DR7),
            vm.get(GUEST_DEBUGCTL),
            vm.get(GUEST_PAT),
            vm.get(GUEST_EFER),
            vm.get(GUEST_SYSENTER_EIP),
        ];
        suite.case(
            format_args!("saved-{bits:04b}"),
            format_args!("{verdict} {state:x?} host dr7={:#x} {:x?}", host.dr7, host.msrs),
        );
        let rights = [
            vm.get(GUEST_FS_ACCESS_RIGHTS),
            vm.get(GUEST_GS_ACCESS_RIGHTS),
            vm.get(GUEST_CS_ACCESS_RIGHTS),
            vm.get(ENTRY_CONTROLS).bits(),
        ];
        suite.case(format_args!("saved-segments-{bits:04b}"), format_args!("{rights:x?}"));
    }
}

/// DR7, DEBUGCTL, PAT and EFER in the nested guest, with the "load" control off and on.
fn loaded(suite: &mut Suite) {
    let reads: [(&str, u64); 4] = [
        ("dr7", code!("mov rax, dr7", "xor edx, edx")),
        ("debugctl", code!("mov ecx, 0x1d9", "rdmsr")),
        ("pat", code!("mov ecx, 0x277", "rdmsr")),
        ("efer", code!("mov ecx, 0xc0000080", "rdmsr")),
    ];
    for bits in 0..8 {
        for (name, code) in reads {
            let mut vm = Vm::new(code);
            for (index, control) in
                [EntryControls::LOAD_DEBUG_CONTROLS, EntryControls::LOAD_PAT, EntryControls::LOAD_EFER]
                    .into_iter()
                    .enumerate()
            {
                if bits >> index & 1 != 0 {
                    vm.or(ENTRY_CONTROLS, control);
                } else {
                    vm.clear(ENTRY_CONTROLS, control);
                }
            }
            vm.set(GUEST_DR7, 0x4aa)
                .set(GUEST_DEBUGCTL, 2)
                .set(GUEST_PAT, 0x0606_0606_0606_0606)
                .set(GUEST_EFER, 0xd01);
            let verdict = vm.run();
            let value = vm.registers.rdx << 32 | vm.registers.rax & 0xffff_ffff;
            suite.case(format_args!("loaded-{bits:03b}-{name}"), format_args!("{verdict} {value:#x}"));
        }
    }
}

/// A failed entry loads the host state, and leaves the guest state and the injection alone.
fn failed_entry(suite: &mut Suite) {
    let mut vm = Vm::new(code!("cpuid"));
    vm.set(GUEST_RFLAGS, 0x200).set(ENTRY_INTERRUPTION_INFO, 0x8000_0306).set(HOST_SYSENTER_CS, 0x55);
    vm.set(HOST_FS_BASE, 0x3333_0000).set(EXIT_QUALIFICATION, 0x77).set(EXIT_INSTRUCTION_LENGTH, 9);
    vm.set(IDT_VECTORING_INFO, 0x8000_0301);
    let (verdict, host) = vm.run_and_observe(Host::observe);
    restore();
    suite.case("failed-entry", format_args!("{verdict} {host}"));
    let fields = [
        vm.get(ENTRY_INTERRUPTION_INFO),
        vm.get(IDT_VECTORING_INFO),
        vm.get(EXIT_INTERRUPTION_INFO),
        vm.get(EXIT_INSTRUCTION_LENGTH),
    ];
    suite.case("failed-entry-fields", format_args!("{fields:x?}"));
}
