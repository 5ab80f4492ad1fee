//! Every field that holds a physical address, aimed at absent memory: on the bare machine at a hole of the address
//! space, under a host at the memory that the host reserves for itself. The outcome must be the same: all reads give
//! ones, and no write has an effect (SDM 26 to 29 where they name an address).
//!
//! VM-exit MSR areas are not tried: there they cause a VMX abort on both machines, which ends the machine.

use core::fmt;

use shadow::controls::{Pin, Primary, Secondary, VmFunctions};
use shadow::fields::*;
use shadow::registers::CR0_PG;

use super::entry_guest::protected;
use crate::arguments::{has_memory_only, reserved_memory};
use crate::code;
use crate::cpu::{invept, vmclear, vmptrld, vmxoff, vmxon};
use crate::fault::Outcome;
use crate::memory::{OTHER_VMCS, Page, VMCS, VMXON};
use crate::nested_paging::{self, LEAF, PDPT, PML4, WINDOW, WINDOW_PD, WINDOW_PT};
use crate::output::Suite;
use crate::vm::{Verdict, Vm, load_fresh, revision};
use crate::{attempt, code_32};

const ACCESSED_DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
/// The bits of an address within a page of 1 GiB, which a nested guest sees of a target.
const IN_GIB: u64 = (1 << 30) - 1;
const EPT_VIOLATION: u64 = 48;
const EPT_MISCONFIGURATION: u64 = 49;

/// Addresses of the bare machine without memory and without a device.
const NOTHING: core::ops::Range<u64> = 0xd000_0000..0xd240_0000;

/// Runs all cases, if the bare machine defines their outcome.
pub fn run(suite: &mut Suite) {
    if has_memory_only() {
        return;
    }
    let memory = reserved_memory().unwrap_or(NOTHING);
    let middle = (memory.start + (memory.end - memory.start) / 2) & !0xfff;
    let places = [("first", memory.start), ("middle", middle), ("last", memory.end - 0x1000)];
    for (place, target) in places {
        let mut aim = Aim { suite, place, target };
        aim.regions();
        aim.operands();
        aim.tables();
        aim.pages();
        aim.guest_tables();
        aim.areas_and_bitmaps();
        aim.structures_of_features();
    }
    // Under a host the target may be an unused page of memory, which keeps written values.
    for (place, target) in places {
        let mut aim = Aim { suite, place, target };
        aim.written_pages();
        aim.alive();
    }
}

struct Aim<'a> {
    suite: &'a mut Suite,
    place: &'static str,
    target: u64,
}

impl Aim<'_> {
    fn print(&mut self, name: fmt::Arguments<'_>, result: impl fmt::Display) {
        self.suite.case(format_args!("{}-{name}", self.place), result);
    }

    /// Runs a nested guest at `code` with a structure aimed at the target. The guest reads into RCX.
    fn case(&mut self, name: fmt::Arguments<'_>, code: u64, change: impl FnOnce(&mut Vm, u64)) {
        let mut vm = Vm::new(code);
        vm.registers.rax = WINDOW;
        change(&mut vm, self.target);
        let _ = invept(2, [0; 2]);
        let verdict = vm.run();
        // A result that contains the target's address would differ between the machines.
        if let Verdict::Exited(exit) = &verdict
            && matches!(exit.reason, EPT_VIOLATION | EPT_MISCONFIGURATION)
            && (vm.get(GUEST_PHYSICAL_ADDRESS) ^ self.target) & IN_GIB & !0xfff == 0
        {
            return self.print(name, format_args!("exit={:#x} at the target", exit.reason));
        }
        let rcx = vm.registers.rcx;
        self.print(name, format_args!("{verdict} rcx={rcx:#x}"));
    }

    /// VMXON region, VMCS, link pointer.
    fn regions(&mut self) {
        let target = self.target;
        load_fresh(&VMCS);
        self.print(format_args!("vmptrld"), vmptrld(target));
        self.print(format_args!("vmclear"), vmclear(target));
        self.print(format_args!("vmptrld-after-vmclear"), vmptrld(target));
        self.print(format_args!("vmxon-in-vmx-operation"), vmxon(target));
        let off = vmxoff();
        self.print(format_args!("vmxoff"), off);
        self.print(format_args!("vmxon"), vmxon(target));
        self.print(format_args!("vmxon-again"), vmxon(VMXON.address()));
        load_fresh(&OTHER_VMCS);
        self.case(format_args!("link-pointer"), code!("cpuid"), |vm, target| _ = vm.set(VMCS_LINK_POINTER, target));
    }

    /// Memory operands of VMX instructions, and plain accesses of the guest hypervisor.
    fn operands(&mut self) {
        let target = self.target;
        let read = attempt!("mov rax, [rcx]", "cmp rax, -1"; in("rcx") target, out("rax") _);
        // All ones set ZF, which reads as a failure.
        self.print(format_args!("reads-ones"), matches!(read, Outcome::FailValid(_)));
        load_fresh(&VMCS);
        self.print(format_args!("vmptrld-operand"), attempt!("vmptrld [rcx]"; in("rcx") target));
        self.print(format_args!("vmclear-operand"), attempt!("vmclear [rcx]"; in("rcx") target));
        self.print(format_args!("vmwrite-operand"), attempt!("vmwrite rax, [rcx]"; in("rcx") target, in("rax") 0x6800));
        for kind in [1_u64, 2] {
            let invept = attempt!("invept rax, [rcx]"; in("rcx") target, in("rax") kind);
            self.print(format_args!("invept-{kind}-operand"), invept);
        }
        for kind in 0_u64..4 {
            let invvpid = attempt!("invvpid rax, [rcx]"; in("rcx") target, in("rax") kind);
            self.print(format_args!("invvpid-{kind}-operand"), invvpid);
        }
    }

    /// EPTP12 and an entry of EPT12 at each level, as a pointer to a table.
    fn tables(&mut self) {
        let read = code!("mov rcx, [rax]");
        let levels: [(&str, &Page, usize); 3] = [("pml4", &PML4, 0), ("pdpt", &PDPT, 1), ("pd", &WINDOW_PD, 0)];
        for flags in [0, ACCESSED_DIRTY] {
            let ad = flags >> 6;
            self.case(format_args!("eptp-ad-{ad}"), read, |vm, target| {
                vm.set(EPT_POINTER, nested_paging::eptp() & 0xfff | flags | target);
            });
            for (level, table, index) in levels {
                self.case(format_args!("{level}-table-ad-{ad}"), read, |vm, target| {
                    vm.or(EPT_POINTER, flags);
                    table.set(index, target | 7);
                });
            }
        }
    }

    /// Pages of each size that hold the target.
    fn pages(&mut self) {
        let accesses = [
            ("read", code!("mov rcx, [rax]")),
            ("fetch", code!("jmp rax")),
            ("compare", code!("mov rcx, -1", "cmp [rax + 8], rcx", "setne cl")),
        ];
        for (access, code) in accesses {
            self.case(format_args!("4k-{access}"), code, |_, target| WINDOW_PT.set(0, target | LEAF));
            self.case(format_args!("2m-{access}"), code, |vm, target| {
                WINDOW_PD.set(0, target & !((2 << 20) - 1) | LARGE | LEAF);
                vm.registers.rax = WINDOW + (target & ((2 << 20) - 1));
            });
            if access == "fetch" {
                // RIP would contain the target's offset in its GiB.
                continue;
            }
            self.case(format_args!("1g-{access}"), code, |vm, target| {
                PDPT.set(1, target & !((1 << 30) - 1) | LARGE | LEAF);
                vm.registers.rax = WINDOW + (target & ((1 << 30) - 1));
            });
        }
    }

    /// The nested guest's own tables, with and without EPT12.
    fn guest_tables(&mut self) {
        self.case(format_args!("guest-cr3"), code!("mov rcx, [rax]"), |vm, target| _ = vm.set(GUEST_CR3, target));
        self.case(format_args!("guest-cr3-no-ept"), code!("nop"), |vm, target| {
            vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST);
            vm.set(GUEST_CR3, target);
        });
        self.case(format_args!("pdptes-no-ept"), code_32!("nop"), |vm, target| {
            protected(vm);
            vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST);
            vm.or(GUEST_CR0, CR0_PG).set(GUEST_CR3, target);
        });
    }

    /// Areas and bitmaps of VMCS12 that the processor or the host reads.
    fn areas_and_bitmaps(&mut self) {
        self.case(format_args!("entry-msr-load"), code!("nop"), |vm, target| {
            vm.set(ENTRY_MSR_LOAD_ADDRESS, target).set(ENTRY_MSR_LOAD_COUNT, 1);
        });
        self.case(format_args!("msr-bitmap"), code!("mov ecx, 0x10", "rdmsr"), |vm, target| {
            vm.set(MSR_BITMAP, target);
        });
        let bitmaps = [
            ("a", IO_BITMAP_A, code!("mov edx, 0x80", "in al, dx")),
            ("b", IO_BITMAP_B, code!("mov edx, 0x8080", "in al, dx")),
        ];
        for (name, bitmap, code) in bitmaps {
            self.case(format_args!("io-bitmap-{name}"), code, |vm, target| {
                vm.or(PRIMARY_CONTROLS, Primary::USE_IO_BITMAPS).set(bitmap, target);
            });
        }
        self.case(format_args!("virtual-apic"), code!("mov rcx, cr8"), |vm, target| {
            vm.or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW).set(VIRTUAL_APIC_ADDRESS, target);
        });
        self.case(format_args!("apic-access"), code!("mov ecx, [rax + 0x30]"), |vm, target| {
            vm.or(SECONDARY_CONTROLS, Secondary::VIRTUALIZE_APIC_ACCESSES).set(APIC_ACCESS_ADDRESS, target);
            WINDOW_PT.set(0, target | LEAF);
        });
    }

    /// The structures of VMCS shadowing, VM functions and #VE.
    fn structures_of_features(&mut self) {
        const SHADOW_INDICATOR: u64 = 1 << 31;
        load_fresh(&OTHER_VMCS);
        OTHER_VMCS.set(0, revision() | SHADOW_INDICATOR);
        let bitmaps = [
            ("vmread", VMREAD_BITMAP, code!("mov eax, 0x681e", "vmread rcx, rax")),
            ("vmwrite", VMWRITE_BITMAP, code!("mov eax, 0x681e", "vmwrite rax, rcx")),
        ];
        for (name, bitmap, code) in bitmaps {
            self.case(format_args!("{name}-bitmap"), code, |vm, target| {
                vm.or(SECONDARY_CONTROLS, Secondary::VMCS_SHADOWING);
                vm.set(VMCS_LINK_POINTER, OTHER_VMCS.address()).set(bitmap, target);
            });
        }
        self.case(format_args!("eptp-list"), code!("xor eax, eax", "xor ecx, ecx", "vmfunc"), |vm, target| {
            vm.or(SECONDARY_CONTROLS, Secondary::ENABLE_VM_FUNCTIONS);
            vm.set(VM_FUNCTION_CONTROLS, VmFunctions::EPTP_SWITCHING).set(EPTP_LIST_ADDRESS, target);
        });
        self.case(format_args!("ve-information"), code!("mov rcx, [rax]"), |vm, target| {
            vm.or(SECONDARY_CONTROLS, Secondary::EPT_VIOLATION_VE).set(VIRTUALIZATION_EXCEPTION_INFO, target);
            WINDOW_PT.set(0, 0);
        });
    }

    /// Structures that the processor writes: the writes have no effect. Structures that are read come before these.
    fn written_pages(&mut self) {
        self.case(format_args!("pml"), code!("mov [rax + 8], cl"), |vm, target| {
            nested_paging::clear_accessed_and_dirty();
            vm.or(EPT_POINTER, ACCESSED_DIRTY).or(SECONDARY_CONTROLS, Secondary::ENABLE_PML);
            vm.set(PML_ADDRESS, target).set(PML_INDEX, 511);
        });
        self.case(format_args!("posted-interrupts"), code!("nop"), |vm, target| {
            let pin = Pin::PROCESS_POSTED_INTERRUPTS | Pin::EXTERNAL_INTERRUPT_EXITING;
            vm.or(PIN_CONTROLS, pin).or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW);
            vm.or(SECONDARY_CONTROLS, Secondary::VIRTUAL_INTERRUPT_DELIVERY);
            vm.or(EXIT_CONTROLS, shadow::controls::ExitControls::ACKNOWLEDGE_INTERRUPT);
            vm.set(POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, target);
        });
        let target = self.target;
        load_fresh(&VMCS);
        self.print(format_args!("vmptrst-operand"), attempt!("vmptrst [rcx]"; in("rcx") target));
        self.print(format_args!("vmread-operand"), attempt!("vmread [rcx], rax"; in("rcx") target, in("rax") 0x6800));
        self.case(format_args!("4k-write"), code!("mov [rax + 0x100], rcx"), |_, target| {
            WINDOW_PT.set(0, target | LEAF)
        });
    }

    /// Checks that the host still works after all these cases.
    fn alive(&mut self) {
        self.case(format_args!("alive"), code!("mov rcx, [rax + 16]", "cpuid"), |_, _| ());
    }
}
