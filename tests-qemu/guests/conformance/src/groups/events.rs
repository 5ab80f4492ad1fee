//! Events: windows, blocking, NMIs, interrupts, timers, debug exceptions, and the state that entries and exits move
//! (SDM 26.5, 27.4 to 27.7, 28.3 to 28.6).

mod init;
mod interrupts;
mod moved_state;
mod msr_areas;

use shadow::controls::{EntryControls, ExitControls, Pin, Primary, Secondary};
use shadow::fields::*;

use super::enter;
use super::entry_events::Delivered;
use crate::code;
use crate::output::Suite;
use crate::vm::Vm;

pub(super) const IF: u64 = 1 << 9;
pub(super) const TF: u64 = 1 << 8;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    windows(suite);
    trap_flag(suite);
    debug(suite);
    activity(suite);
    timers(suite);
    interrupts::run(suite);
    init::run(suite);
    msr_areas::run(suite);
    moved_state::run(suite);
}

/// Runs, and prints what was delivered.
fn case(suite: &mut Suite, name: impl core::fmt::Display, code: u64, change: impl FnOnce(&mut Vm)) {
    let verdict = enter(code, |vm| {
        vm.physical_nmis();
        change(vm);
    });
    suite.case(name, Delivered(verdict));
}

pub(super) fn virtual_nmis(vm: &mut Vm) {
    vm.or(PIN_CONTROLS, Pin::NMI_EXITING | Pin::VIRTUAL_NMIS);
}

fn windows(suite: &mut Suite) {
    let codes: &[(&str, u64)] = &[
        ("nop", code!("nop", "nop")),
        ("sti", code!("sti", "nop", "nop")),
        ("sti-sti", code!("sti", "sti", "nop")),
        ("sti-cli", code!("sti", "cli", "nop")),
        ("mov-ss", code!("mov eax, ss", "mov ss, eax", "nop", "nop")),
        ("sti-mov-ss", code!("mov eax, ss", "sti", "mov ss, eax", "nop", "nop")),
        ("popf", code!("pushfq", "or dword ptr [rsp], 0x200", "popfq", "nop")),
        (
            "iret",
            code!(
                "mov ecx, ss",
                "mov rdx, rsp",
                "push rcx",
                "push rdx",
                "push 0x202",
                "push 8",
                "lea rax, [rip + 2f]",
                "push rax",
                "iretq",
                "2: nop",
                "nop"
            ),
        ),
        ("hlt", code!("sti", "hlt", "nop")),
    ];
    for &(name, code) in codes {
        for flags in [0, IF] {
            for block in [0, 1, 2, 8] {
                let start = |vm: &mut Vm| _ = vm.or(GUEST_RFLAGS, flags).set(GUEST_INTERRUPTIBILITY, block);
                let suffix = format_args!("{name}-if-{}-block-{block}", flags >> 9);
                case(suite, format_args!("no-window-{suffix}"), code, start);
                case(suite, format_args!("interrupt-window-{suffix}"), code, |vm| {
                    start(vm);
                    vm.or(PRIMARY_CONTROLS, Primary::INTERRUPT_WINDOW_EXITING);
                });
                case(suite, format_args!("nmi-window-{suffix}"), code, |vm| {
                    start(vm);
                    virtual_nmis(vm);
                    vm.or(PRIMARY_CONTROLS, Primary::NMI_WINDOW_EXITING);
                });
                case(suite, format_args!("both-windows-{suffix}"), code, |vm| {
                    start(vm);
                    virtual_nmis(vm);
                    let both = Primary::NMI_WINDOW_EXITING | Primary::INTERRUPT_WINDOW_EXITING;
                    vm.or(PRIMARY_CONTROLS, both);
                });
                case(suite, format_args!("mtf-{suffix}"), code, |vm| {
                    start(vm);
                    vm.or(PRIMARY_CONTROLS, Primary::MONITOR_TRAP_FLAG);
                });
            }
        }
    }
}

/// The monitor trap flag after each kind of instruction and event.
fn trap_flag(suite: &mut Suite) {
    let mtf = |vm: &mut Vm| _ = vm.or(PRIMARY_CONTROLS, Primary::MONITOR_TRAP_FLAG);
    for (name, code) in [
        ("nop", code!("nop")),
        ("jump", code!("jmp 2f", "nop", "2:")),
        ("cpuid", code!("cpuid")),
        ("rep-movsb", code!("lea rsi, [rsp - 64]", "lea rdi, [rsp - 128]", "mov ecx, 3", "rep movsb")),
        ("int", code!("int 0x80")),
        ("int3", code!("int3")),
        ("ud", code!("ud2")),
        ("mov-ss", code!("mov eax, ss", "mov ss, eax", "nop")),
        ("mov-cr3", code!("mov rax, cr3", "mov cr3, rax")),
        ("wrmsr", code!("mov ecx, 0x174", "xor eax, eax", "xor edx, edx", "wrmsr")),
    ] {
        case(suite, format_args!("mtf-over-{name}"), code, mtf);
        case(suite, format_args!("mtf-over-{name}-no-exceptions"), code, |vm| {
            mtf(vm);
            vm.set(EXCEPTION_BITMAP, 0);
        });
        // Counts the exits until VMCALL.
        let mut vm = Vm::new(code);
        mtf(&mut vm);
        vm.set(EXCEPTION_BITMAP, 0);
        let steps = (1..40).find(|_| !vm.run().is_monitor_trap_flag());
        suite.case(format_args!("mtf-steps-of-{name}"), format_args!("{steps:?}"));
    }
    for (name, info) in [
        ("interrupt", 0x8000_0021_u32),
        ("nmi", 0x8000_0202),
        ("exception", 0x8000_0306),
        ("software", 0x8000_0480),
        ("mtf", 0x8000_0700),
    ] {
        for monitor in [false, true] {
            case(suite, format_args!("inject-{name}-mtf-{monitor}"), code!("nop"), |vm| {
                vm.or(GUEST_RFLAGS, IF).set(ENTRY_INTERRUPTION_INFO, info).set(ENTRY_INSTRUCTION_LENGTH, 1);
                if monitor {
                    mtf(vm);
                }
            });
        }
    }
}

/// Single steps, breakpoints, pending debug exceptions.
fn debug(suite: &mut Suite) {
    let ways: [(&str, u32); 2] = [("exiting", u32::MAX), ("delivered", 0)];
    for (way, bitmap) in ways {
        for (name, code) in [
            ("nop", code!("nop", "nop")),
            ("mov-ss", code!("mov eax, ss", "mov ss, eax", "nop", "nop")),
            ("cpuid", code!("nop", "cpuid")),
            ("mov-ss-cpuid", code!("mov eax, ss", "mov ss, eax", "cpuid")),
            ("hlt", code!("hlt")),
        ] {
            for hlt in [Primary::empty(), Primary::HLT_EXITING] {
                case(suite, format_args!("single-step-{name}-{way}-hlt-{}", hlt.bits() >> 7), code, |vm| {
                    vm.set(EXCEPTION_BITMAP, bitmap).or(GUEST_RFLAGS, TF).or(PRIMARY_CONTROLS, hlt);
                    vm.or(ENTRY_CONTROLS, EntryControls::LOAD_DEBUG_CONTROLS);
                });
            }
        }
        for pending in [0x1000, 0x1001, 0x4000, 0x1004, 0xf] {
            for block in [0, 1, 2] {
                case(suite, format_args!("pending-{pending:#x}-block-{block}-{way}"), code!("nop", "nop"), |vm| {
                    vm.set(EXCEPTION_BITMAP, bitmap).set(GUEST_PENDING_DEBUG, pending);
                    vm.set(GUEST_INTERRUPTIBILITY, block).or(GUEST_RFLAGS, IF);
                    if block != 0 && pending & 0x4000 != 0 {
                        vm.or(GUEST_RFLAGS, TF);
                    }
                });
            }
        }
        // A breakpoint on the second instruction.
        case(
            suite,
            format_args!("breakpoint-{way}"),
            code!("lea rax, [rip + 2f]", "mov dr0, rax", "mov eax, 0x402", "mov dr7, rax", "nop", "2: nop"),
            |vm| {
                vm.set(EXCEPTION_BITMAP, bitmap);
            },
        );
        case(
            suite,
            format_args!("watchpoint-mov-ss-{way}"),
            code!(
                "lea rax, [rsp - 8]",
                "mov dr1, rax",
                "mov eax, 0xd00408",
                "mov dr7, rax",
                "mov word ptr [rsp - 8], 0x10",
                "mov ss, [rsp - 8]",
                "cpuid"
            ),
            |vm| {
                vm.set(EXCEPTION_BITMAP, bitmap);
            },
        );
    }
}

/// HLT and shutdown, ended by injected events or only by the guard.
fn activity(suite: &mut Suite) {
    for state in [0, 1, 2] {
        for (name, info) in [
            ("none", 0_u32),
            ("interrupt", 0x8000_0021),
            ("nmi", 0x8000_0202),
            ("machine-check", 0x8000_0312),
            ("debug", 0x8000_0301),
            ("exception", 0x8000_0306),
        ] {
            case(suite, format_args!("activity-{state}-inject-{name}"), code!("nop"), |vm| {
                vm.set(GUEST_ACTIVITY_STATE, state).or(GUEST_RFLAGS, IF).set(ENTRY_INTERRUPTION_INFO, info);
            });
        }
        case(suite, format_args!("activity-{state}-window"), code!("nop"), |vm| {
            vm.set(GUEST_ACTIVITY_STATE, state).or(GUEST_RFLAGS, IF);
            vm.or(PRIMARY_CONTROLS, Primary::INTERRUPT_WINDOW_EXITING);
        });
        case(suite, format_args!("activity-{state}-mtf"), code!("nop"), |vm| {
            vm.set(GUEST_ACTIVITY_STATE, state).or(GUEST_RFLAGS, IF);
            vm.or(PRIMARY_CONTROLS, Primary::MONITOR_TRAP_FLAG);
        });
        case(suite, format_args!("activity-{state}-pending-debug"), code!("nop"), |vm| {
            vm.set(GUEST_ACTIVITY_STATE, state).set(GUEST_PENDING_DEBUG, 0x1001);
        });
    }
    case(suite, "hlt-then-guard", code!("hlt"), |_| ());
}

/// The timers' behaviour, as far as it does not depend on the machine's speed.
fn timers(suite: &mut Suite) {
    const GUARD: u32 = 3_000_000;
    for save in [false, true] {
        let mut vm = Vm::new(code!("mov ecx, 1000", "2: loop 2b", "cpuid"));
        if save {
            vm.or(EXIT_CONTROLS, ExitControls::SAVE_PREEMPTION_TIMER);
        }
        let verdict = vm.run();
        let value = vm.get(PREEMPTION_TIMER_VALUE);
        suite.case(
            format_args!("timer-save-{save}"),
            format_args!("{verdict} less={} zero={}", value < GUARD, value == 0),
        );
        let _ = vm.set(PREEMPTION_TIMER_VALUE, 100).set(GUEST_RIP, code!("2: jmp 2b"));
        let verdict = vm.run();
        let value = vm.get(PREEMPTION_TIMER_VALUE);
        let running = matches!(value, 100);
        suite.case(
            format_args!("timer-expired-save-{save}"),
            format_args!("{} kept={running} zero={}", verdict.is_preemption_timer(), value == 0),
        );
    }
    for (name, offset, multiplier) in [
        ("none", 0, 1 << 48),
        ("offset", 1 << 60, 1 << 48),
        ("negative", (1_u64 << 60).wrapping_neg(), 1 << 48),
        ("scaled", 0, 1_u64 << 63),
        ("both", 1 << 61, 1 << 63),
    ] {
        for (way, code) in
            [("rdtsc", code!("rdtsc")), ("rdtscp", code!("rdtscp")), ("rdmsr", code!("mov ecx, 0x10", "rdmsr"))]
        {
            for offsetting in [false, true] {
                let mut vm = Vm::new(code);
                vm.set(TSC_OFFSET, offset).set(TSC_MULTIPLIER, multiplier);
                if offsetting {
                    vm.or(PRIMARY_CONTROLS, Primary::USE_TSC_OFFSETTING);
                    vm.or(SECONDARY_CONTROLS, Secondary::USE_TSC_SCALING);
                }
                let verdict = vm.run();
                let tsc = vm.registers.rdx << 32 | vm.registers.rax;
                // 0x8000 times 2^33 ticks and more: far beyond what any run takes without scaling.
                let large = tsc << 4 >> 4 >= 1 << 46;
                suite.case(
                    format_args!("tsc-{name}-{way}-offsetting-{offsetting}"),
                    format_args!("{verdict} top={:#x} large={large}", tsc >> 60),
                );
            }
        }
    }
}
