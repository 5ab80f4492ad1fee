//! Instructions with a control bit of their own, and those that exit whatever the controls say.

use shadow::controls::{Primary, Secondary};
use shadow::fields::*;
use shadow::registers::CR4_OSXSAVE;

use super::case;
use crate::code;
use crate::nested_paging::LINEAR;
use crate::output::Suite;
use crate::vm::Vm;

const ACROSS: u64 = LINEAR + 0x1000;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    unconditional(suite);
    primary(suite);
    secondary(suite);
    vmx(suite);
    timing(suite);
}

fn unconditional(suite: &mut Suite) {
    case(suite, "cpuid", code!("cpuid"), |_| ());
    case(suite, "cpuid-prefixed", code!(".byte 0x66, 0x48", "cpuid"), |_| ());
    case(suite, "invd", code!("invd"), |_| ());
    case(suite, "getsec", code!("xor eax, eax", ".byte 0x0f, 0x37"), |_| ());
    let xsetbv = code!("xor ecx, ecx", "mov eax, 7", "xor edx, edx", "xsetbv");
    case(suite, "xsetbv-without-osxsave", xsetbv, |_| ());
    case(suite, "xsetbv", xsetbv, |vm| _ = vm.or(GUEST_CR4, CR4_OSXSAVE));
    case(suite, "rsm", code!("rsm"), |_| ());
    case(suite, "ud2", code!("ud2"), |_| ());
}

fn primary(suite: &mut Suite) {
    let cases: &[(&str, u64, Primary)] = &[
        ("hlt", code!("hlt"), Primary::HLT_EXITING),
        ("invlpg", code!("mov rax, 0x140001000", "invlpg [rax]"), Primary::INVLPG_EXITING),
        (
            "invlpg-sib",
            code!("mov rax, 0x140001000", "mov ecx, 2", "invlpg [rax + rcx * 8 + 3]"),
            Primary::INVLPG_EXITING,
        ),
        ("invlpg-high", code!("mov rax, 0xffff900000000000", "invlpg [rax]"), Primary::INVLPG_EXITING),
        ("invlpg-non-canonical", code!("mov rax, 0x900000000000", "invlpg [rax]"), Primary::INVLPG_EXITING),
        ("mwait", code!("xor eax, eax", "xor ecx, ecx", "mwait"), Primary::MWAIT_EXITING),
        (
            "mwait-armed",
            code!("lea rax, [rip]", "xor ecx, ecx", "xor edx, edx", "monitor", "xor eax, eax", "mwait"),
            Primary::MWAIT_EXITING,
        ),
        ("mwait-bad-hint", code!("xor eax, eax", "mov ecx, 8", "mwait"), Primary::MWAIT_EXITING),
        ("monitor", code!("lea rax, [rip]", "xor ecx, ecx", "xor edx, edx", "monitor"), Primary::MONITOR_EXITING),
        (
            "monitor-bad-hint",
            code!("lea rax, [rip]", "mov ecx, 1", "xor edx, edx", "monitor"),
            Primary::MONITOR_EXITING,
        ),
        ("rdpmc", code!("xor ecx, ecx", "rdpmc"), Primary::RDPMC_EXITING),
        ("rdpmc-bad-counter", code!("mov ecx, 0x12345", "rdpmc"), Primary::RDPMC_EXITING),
        ("rdtsc", code!("rdtsc"), Primary::RDTSC_EXITING),
        ("rdtscp", code!("rdtscp"), Primary::RDTSC_EXITING),
        ("pause", code!("pause"), Primary::PAUSE_EXITING),
    ];
    for &(name, code, control) in cases {
        case(suite, format_args!("{name}-off"), code, |_| ());
        case(suite, format_args!("{name}-on"), code, |vm| _ = vm.or(PRIMARY_CONTROLS, control));
        case(suite, format_args!("{name}-on-at-cpl-3"), code, |vm| {
            vm.or(PRIMARY_CONTROLS, control);
            user(vm);
        });
        case(suite, format_args!("{name}-off-at-cpl-3"), code, user);
    }
    case(suite, "lock-hlt", code!(".byte 0xf0", "hlt"), |vm| _ = vm.or(PRIMARY_CONTROLS, Primary::HLT_EXITING));
    const CR4_TSD_PCE: u64 = 1 << 2;
    case(suite, "rdtsc-tsd-at-cpl-3", code!("rdtsc"), |vm| {
        vm.or(GUEST_CR4, CR4_TSD_PCE).or(PRIMARY_CONTROLS, Primary::RDTSC_EXITING);
        user(vm);
    });
}

/// The nested guest begins at CPL 3.
pub fn user(vm: &mut Vm) {
    const DPL_3: u32 = 3 << 5;
    vm.set(GUEST_CS_SELECTOR, 0x3b).or(GUEST_CS_ACCESS_RIGHTS, DPL_3);
    vm.set(GUEST_SS_SELECTOR, 0x33).or(GUEST_SS_ACCESS_RIGHTS, DPL_3);
    for (selector, rights) in [(GUEST_DS_SELECTOR, GUEST_DS_ACCESS_RIGHTS), (GUEST_ES_SELECTOR, GUEST_ES_ACCESS_RIGHTS)]
    {
        vm.set(selector, 0x33).or(rights, DPL_3);
    }
}

fn secondary(suite: &mut Suite) {
    let exiting: &[(&str, u64, Secondary)] = &[
        ("wbinvd", code!("wbinvd"), Secondary::WBINVD_EXITING),
        ("rdrand", code!("rdrand rax"), Secondary::RDRAND_EXITING),
        ("rdrand-16", code!("rdrand cx"), Secondary::RDRAND_EXITING),
        ("rdrand-r9", code!("rdrand r9d"), Secondary::RDRAND_EXITING),
        ("rdseed", code!("rdseed rbx"), Secondary::RDSEED_EXITING),
        ("rdseed-32", code!("rdseed r15d"), Secondary::RDSEED_EXITING),
        ("pause-loop", code!("pause", "pause", "pause"), Secondary::PAUSE_LOOP_EXITING),
    ];
    for &(name, code, control) in exiting {
        // Random values stay in registers that no case prints; flags are cleared.
        case(suite, format_args!("{name}-off"), code, |_| ());
        case(suite, format_args!("{name}-on"), code, |vm| _ = vm.or(SECONDARY_CONTROLS, control));
    }
    let enabling: &[(&str, u64, Secondary)] = &[
        ("rdtscp", code!("rdtscp"), Secondary::ENABLE_RDTSCP),
        ("rdpid", code!(".byte 0xf3, 0x0f, 0xc7, 0xf8"), Secondary::ENABLE_RDTSCP),
        (
            "invpcid",
            code!("lea rcx, [rip + 1f]", "mov eax, 2", "invpcid rax, [rcx]", "vmcall", "1: .quad 0, 0"),
            Secondary::ENABLE_INVPCID,
        ),
        (
            "xsaves",
            code!("lea rcx, [rip]", "xor eax, eax", "xor edx, edx", "xsaves [rsp - 0x1000]"),
            Secondary::ENABLE_XSAVES,
        ),
        ("xrstors", code!("xor eax, eax", "xor edx, edx", "xrstors [rsp - 0x1000]"), Secondary::ENABLE_XSAVES),
        (
            "tpause",
            code!("xor eax, eax", "xor edx, edx", "xor ecx, ecx", ".byte 0x66, 0x0f, 0xae, 0xf1"),
            Secondary::ENABLE_USER_WAIT_AND_PAUSE,
        ),
    ];
    for &(name, code, control) in enabling {
        for enabled in [false, true] {
            case(suite, format_args!("{name}-enabled-{enabled}"), code, |vm| {
                vm.or(GUEST_CR4, CR4_OSXSAVE);
                if enabled {
                    vm.or(SECONDARY_CONTROLS, control);
                } else {
                    vm.clear(SECONDARY_CONTROLS, control);
                }
                vm.or(XSS_EXITING_BITMAP, u64::MAX);
            });
        }
    }
    for register in [0, 5, 7] {
        let code = match register {
            0 => code!("mov eax, 4", "invpcid rax, [rsp]"),
            5 => code!("mov r13d, 2", "invpcid r13, [rsp + rcx * 4 + 0x20]"),
            _ => code!("mov edi, 9", "invpcid rdi, fs:[rsp + 0x1000]"),
        };
        case(suite, format_args!("invpcid-exit-{register}"), code, |vm| {
            vm.or(PRIMARY_CONTROLS, Primary::INVLPG_EXITING);
        });
    }
}

/// VMX instructions exit whatever their operands are (SDM 26.1.2).
fn vmx(suite: &mut Suite) {
    let cases: &[(&str, u64)] = &[
        ("vmcall", code!("vmcall")),
        ("vmlaunch", code!("vmlaunch")),
        ("vmresume", code!("vmresume")),
        ("vmxoff", code!("vmxoff")),
        ("vmclear", code!("vmclear [rax + 8]")),
        ("vmclear-rip", code!("vmclear [rip + 0x100]")),
        ("vmptrld", code!("vmptrld [rbx + rcx * 2 + 0x12345]")),
        ("vmptrst", code!("vmptrst gs:[r8 + r9 * 8]")),
        ("vmxon", code!("vmxon [rsp - 8]")),
        ("vmread-register", code!("vmread rax, rbx")),
        ("vmread-high-registers", code!("vmread r8, r15")),
        ("vmread-memory", code!("vmread [rdi], rsi")),
        ("vmwrite-register", code!("vmwrite rcx, rdx")),
        ("vmwrite-memory", code!("vmwrite r10, [r11 + r12 * 4 - 1]")),
        ("vmwrite-address-32", code!("vmwrite rax, [ebx + ecx]")),
        ("invept", code!("invept rax, [rsp]")),
        ("invvpid", code!("invvpid r9, fs:[rbp]")),
        ("vmfunc", code!("xor eax, eax", "vmfunc")),
        ("vmptrld-absolute", code!("vmptrld [0x1000]")),
    ];
    for &(name, code) in cases {
        case(suite, name, code, |_| ());
        case(suite, format_args!("{name}-at-cpl-3"), code, user);
    }
    case(suite, "vmptrld-non-canonical", code!("mov rax, 0x800000000000", "vmptrld [rax]"), |_| ());
    case(suite, "vmptrld-not-mapped", code!("vmptrld [rax]"), |vm| vm.registers.rax = 7 << 30);
    case(suite, "invept-not-mapped", code!("invept rcx, [rax]"), |vm| vm.registers.rax = ACROSS);
}

/// The preemption timer, and PAUSE-loop windows: whether they cause an exit, not when.
fn timing(suite: &mut Suite) {
    let forever = code!("2: jmp 2b");
    case(suite, "preemption-timer", forever, |vm| _ = vm.set(PREEMPTION_TIMER_VALUE, 5000));
    case(suite, "preemption-timer-zero", forever, |vm| _ = vm.set(PREEMPTION_TIMER_VALUE, 0));
    case(suite, "pause-loop", code!("2: pause", "jmp 2b"), |vm| {
        vm.or(SECONDARY_CONTROLS, Secondary::PAUSE_LOOP_EXITING).set(PLE_GAP, 1000).set(PLE_WINDOW, 3000);
    });
}
