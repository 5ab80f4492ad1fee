//! Task switches by hardware of the guest hypervisor (SDM Volume 3A, 8.3 "Task Switching"). Each exits, after the
//! processor has checked privileges, the task gate and the new TSS's descriptor (SDM 26.4.2 "Treatment of Task
//! Switches"); the host does the rest.
//!
//! ```text
//!   leave   registers -> old TSS, back link and busy flags       a fault is the old task's: nothing has changed
//!   enter   new TSS -> registers, then descriptors of segments   a fault is the new task's
//! ```

use super::control_registers::set_cr3;
use super::machine::{Machine, VmcsPair};
use super::vcpu::{Action, Vcpu};
use crate::descriptor::Descriptor;
use crate::event::{BLOCKING_BY_NMI, privilege_level, while_delivering};
use crate::exit::{InterruptionInfo, TaskSwitch, TaskSwitchSource, interruption_type};
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::linear::{AccessMode, Paging};
use crate::msr::Access;
use crate::operand::Segment;
use crate::outcome::Fault;
use crate::registers::*;

/// Bytes of the larger TSS that a switch accesses.
const MOST_BYTES: usize = TSS_32.bytes;
/// Number of general-purpose registers in a TSS.
const REGISTERS: usize = 8;
/// The bit of a selector whose descriptor is in the LDT.
const IN_LDT: u16 = 1 << 2;

/// Where a TSS has its task's registers (SDM Volume 3A, figures 8-2 "32-Bit Task-State Segment (TSS)" and 8-10 "16-Bit
/// TSS Format"): EIP, EFLAGS, general-purpose registers, segment registers, LDTR, one behind the other.
#[derive(Debug)]
struct Layout {
    /// Bytes that the TSS of a new task has at least.
    bytes: usize,
    /// Offset of EIP.
    first: usize,
    /// Bytes from one register to the next.
    width: usize,
    /// Segment registers.
    segments: usize,
    /// Offset of CR3.
    cr3: Option<usize>,
    /// Offset of the debug trap flag.
    trap: Option<usize>,
}

const TSS_32: Layout = Layout { bytes: 0x68, first: 0x20, width: 4, segments: 6, cr3: Some(0x1c), trap: Some(0x64) };
const TSS_16: Layout = Layout { bytes: 0x2c, first: 0x0e, width: 2, segments: 4, cr3: None, trap: None };

const EIP: usize = 0;
const EFLAGS: usize = 1;
const FIRST_REGISTER: usize = 2;
const FIRST_SEGMENT: usize = FIRST_REGISTER + REGISTERS;

impl Layout {
    /// The layout of a TSS whose segment has this type.
    const fn of(kind: u8) -> Option<&'static Self> {
        match kind {
            1 | 3 => Some(&TSS_16),
            9 | 11 => Some(&TSS_32),
            _ => None,
        }
    }

    /// The end of the registers that a switch saves.
    const fn end_of_saved(&self) -> usize {
        self.first + (FIRST_SEGMENT + self.segments) * self.width
    }
}

/// A TSS.
struct Tss {
    layout: &'static Layout,
    bytes: [u8; MOST_BYTES],
}

impl Tss {
    fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    fn long(&self, offset: usize) -> u32 {
        u32::from(self.word(offset + 2)) << 16 | u32::from(self.word(offset))
    }

    const fn offset(&self, index: usize) -> usize {
        self.layout.first + index * self.layout.width
    }

    /// EIP or EFLAGS.
    fn register(&self, index: usize) -> u32 {
        let offset = self.offset(index);
        if self.layout.width == 4 { self.long(offset) } else { self.word(offset).into() }
    }

    /// A general-purpose register. The upper half of one from a 16-bit TSS is all ones.
    fn general(&self, number: usize) -> u32 {
        let upper = if self.layout.width == 4 { 0 } else { 0xffff_0000 };
        upper | self.register(FIRST_REGISTER + number)
    }

    /// A segment selector, or LDTR's behind the last; null where the TSS has none.
    fn selector(&self, number: usize) -> u16 {
        if number < self.layout.segments { self.word(self.offset(FIRST_SEGMENT + number)) } else { 0 }
    }

    fn ldt(&self) -> u16 {
        self.word(self.offset(FIRST_SEGMENT + self.layout.segments))
    }

    fn set_register(&mut self, index: usize, value: u32) {
        let (offset, width) = (self.offset(index), self.layout.width);
        self.bytes[offset..offset + width].copy_from_slice(&value.to_le_bytes()[..width]);
    }

    fn set_selector(&mut self, number: usize, selector: u16) {
        let offset = self.offset(FIRST_SEGMENT + number);
        self.bytes[offset..offset + 2].copy_from_slice(&selector.to_le_bytes());
    }
}

/// Why a task switch ends the guest hypervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Impossible {
    /// A double fault met another fault on its way to a task.
    TripleFault,
    /// DEVIATION: the host does not switch between tasks with shadow stacks, which no hypervisor is known to do.
    ShadowStacks,
}

/// Carries a task switch out.
///
/// # Errors
///
/// The guest hypervisor cannot go on.
pub fn handle<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<Action, Impossible> {
    if uses_shadow_stacks(vcpu) {
        return Err(Impossible::ShadowStacks);
    }
    let vmcs01 = vcpu.vmcs.vmcs01();
    let switch = TaskSwitch(vmcs01.read(EXIT_QUALIFICATION));
    let event = Vectoring::of(vmcs01, switch.source());
    // No access of a task switch is an explicit one of its program, which EFLAGS.AC would let access user-mode pages.
    let paging = Paging { rflags: 0, ..vcpu.paging() };
    let mut switching = Switching { vcpu, paging, event };
    match switching.carry_out(switch) {
        Ok(()) => Ok(Action::Resume),
        Err(fault) => {
            if let Fault::Page { address, .. } = fault {
                // A double fault leaves it, too.
                vcpu.machine.set_cr2(address);
            }
            while_delivering(event.info, fault).map(Action::Inject).ok_or(Impossible::TripleFault)
        }
    }
}

/// Whether shadow stacks are enabled at some privilege level.
fn uses_shadow_stacks<M: Machine>(vcpu: &mut Vcpu<M>) -> bool {
    const IA32_U_CET: u32 = 0x6a0;
    const SHADOW_STACK_ENABLE: u64 = 1 << 0;
    if vcpu.vmcs.vmcs01().read(GUEST_CR4) & CR4_CET == 0 {
        return false;
    }
    let supervisor = vcpu.machine.read_msr(crate::msr::IA32_S_CET);
    let user = vcpu.machine.read_msr(IA32_U_CET);
    [supervisor, user].into_iter().flatten().any(|cet| cet & SHADOW_STACK_ENABLE != 0)
}

/// The event whose delivery met the task gate, if an event began the switch.
#[derive(Clone, Copy)]
struct Vectoring {
    info: InterruptionInfo,
    error_code: Option<u32>,
}

impl Vectoring {
    fn of(vmcs01: &impl VmcsAccess, source: TaskSwitchSource) -> Self {
        let info = match source {
            TaskSwitchSource::TaskGate => InterruptionInfo(vmcs01.read(IDT_VECTORING_INFO)),
            _ => InterruptionInfo(0),
        };
        let has_error_code = info.is_valid() && info.has_error_code();
        Self { info, error_code: has_error_code.then(|| vmcs01.read(IDT_VECTORING_ERROR_CODE)) }
    }

    /// Whether the saved EIP is that of the next instruction.
    fn is_after_instruction(self) -> bool {
        !self.info.is_valid() || self.info.needs_instruction_length()
    }

    /// The EXT flag of the error codes of faults that the delivery meets (SDM Volume 3A, 6.13 "Error Code").
    fn external(self) -> u16 {
        u16::from(!self.is_after_instruction())
    }
}

/// The task to which a processor switches.
struct Task {
    tss: Tss,
    selector: u16,
    segment: Segment,
    source: TaskSwitchSource,
}

/// Whether the new task returns to the old one.
const fn is_nesting(source: TaskSwitchSource) -> bool {
    matches!(source, TaskSwitchSource::Call | TaskSwitchSource::TaskGate)
}

struct Switching<'a, M: Machine> {
    vcpu: &'a mut Vcpu<M>,
    paging: Paging,
    event: Vectoring,
}

impl<M: Machine> Switching<'_, M> {
    fn invalid_tss(&self, selector: u16) -> Fault {
        Fault::InvalidTss(self.code(selector))
    }

    /// A selector error code.
    fn code(&self, selector: u16) -> u16 {
        selector & 0xfffc | self.event.external()
    }

    fn read_bytes(&self, linear: u64, to: &mut [u8]) -> Result<(), Fault> {
        self.paging.read(&self.vcpu.memory, linear & 0xffff_ffff, to)
    }

    fn write_bytes(&self, linear: u64, from: &[u8]) -> Result<(), Fault> {
        self.paging.write(&self.vcpu.memory, linear & 0xffff_ffff, from)
    }

    fn translate_for_write(&self, linear: u64) -> Result<(), Fault> {
        self.paging.translate(&self.vcpu.memory, linear & 0xffff_ffff, Access::Write).map(|_| ())
    }

    /// Changes flags in the access byte of the descriptor at an address.
    fn change_access_byte(&self, descriptor_at: u64, change: impl FnOnce(u8) -> u8) -> Result<(), Fault> {
        let at = descriptor_at + Descriptor::ACCESS_BYTE;
        let mut byte = [0];
        self.read_bytes(at, &mut byte)?;
        self.write_bytes(at, &[change(byte[0])])
    }

    /// The linear address of a selector's descriptor, which the table may not contain.
    fn descriptor_address(&mut self, selector: u16) -> Option<u64> {
        let vmcs01 = self.vcpu.vmcs.vmcs01();
        let (base, limit) = if selector & IN_LDT == 0 {
            (vmcs01.read(GUEST_GDTR_BASE), vmcs01.read(GUEST_GDTR_LIMIT))
        } else if vmcs01.read(GUEST_LDTR.access_rights) & access_rights::UNUSABLE == 0 {
            (vmcs01.read(GUEST_LDTR.base), vmcs01.read(GUEST_LDTR.limit))
        } else {
            return None;
        };
        let offset = selector & !7;
        (u32::from(offset) + 7 <= limit).then(|| base + u64::from(offset))
    }

    /// A selector's descriptor and its address.
    fn descriptor(&mut self, selector: u16) -> Result<(Descriptor, u64), Fault> {
        let at = self.descriptor_address(selector).ok_or(self.invalid_tss(selector))?;
        let mut bytes = [0; 8];
        self.read_bytes(at, &mut bytes)?;
        Ok((Descriptor(u64::from_le_bytes(bytes)), at))
    }

    fn carry_out(&mut self, switch: TaskSwitch) -> Result<(), Fault> {
        let task = self.leave(switch)?;
        self.enter(&task);
        self.qualify(&task.tss)?;
        if task.tss.layout.trap.is_some_and(|offset| task.tss.word(offset) & 1 != 0) {
            self.vcpu.trap_after_task_switch();
        }
        Ok(())
    }

    /// Saves the old task, and reads the new one. All memory is accessed once before the first change.
    fn leave(&mut self, switch: TaskSwitch) -> Result<Task, Fault> {
        let (source, selector) = (switch.source(), switch.selector());
        // The processor has checked the descriptor, and other processors may have changed it since.
        let (descriptor, descriptor_at) = self.descriptor(selector)?;
        let segment = descriptor.segment();
        let layout = Layout::of(descriptor.kind())
            .filter(|layout| descriptor.is_system() && segment.limit as usize >= layout.bytes - 1)
            .ok_or(self.invalid_tss(selector))?;
        let old_selector = self.vcpu.vmcs.vmcs01().read(GUEST_TR.selector);
        let mut tss = Tss { layout, bytes: [0; MOST_BYTES] };
        self.read_bytes(segment.base, &mut tss.bytes[..layout.bytes])?;
        if is_nesting(source) {
            self.translate_for_write(segment.base)?;
        }
        self.save(old_selector, source)?;
        if is_nesting(source) {
            self.write_bytes(segment.base, &old_selector.to_le_bytes())?;
        }
        // A task that switches to itself has just been saved.
        self.read_bytes(segment.base, &mut tss.bytes[..layout.bytes])?;
        if !is_nesting(source) {
            let old_at = self.descriptor_address(old_selector).ok_or(self.invalid_tss(old_selector))?;
            self.change_access_byte(old_at, |byte| byte & !Descriptor::BUSY)?;
        }
        if source != TaskSwitchSource::Iret {
            self.change_access_byte(descriptor_at, |byte| byte | Descriptor::BUSY)?;
        }
        Ok(Task { tss, selector, segment, source })
    }

    /// Saves the registers in the old task's TSS.
    fn save(&mut self, old_selector: u16, source: TaskSwitchSource) -> Result<(), Fault> {
        let vmcs01 = self.vcpu.vmcs.vmcs01();
        let (base, limit) = (vmcs01.read(GUEST_TR.base), vmcs01.read(GUEST_TR.limit));
        let kind = vmcs01.read(GUEST_TR.access_rights) & access_rights::TYPE;
        let is_returning = source == TaskSwitchSource::Iret;
        let length = if self.event.is_after_instruction() { vmcs01.read(EXIT_INSTRUCTION_LENGTH) } else { 0 };
        let eip = (vmcs01.read(GUEST_RIP) as u32).wrapping_add(length);
        let mut flags = vmcs01.read(GUEST_RFLAGS) & if is_returning { !RFLAGS_NT } else { u64::MAX };
        if self.event.is_after_instruction() {
            flags &= !RFLAGS_RF;
        }
        let selectors = GUEST_SEGMENTS.map(|segment| vmcs01.read(segment.selector));
        let layout = Layout::of(kind as u8)
            .filter(|layout| limit as usize >= layout.end_of_saved() - 1)
            .ok_or(self.invalid_tss(old_selector))?;
        let mut tss = Tss { layout, bytes: [0; MOST_BYTES] };
        let saved = layout.first..layout.end_of_saved();
        let at = base + saved.start as u64;
        self.read_bytes(at, &mut tss.bytes[saved.clone()])?;
        tss.set_register(EIP, eip);
        tss.set_register(EFLAGS, flags as u32);
        for number in 0..REGISTERS {
            tss.set_register(FIRST_REGISTER + number, self.vcpu.gpr(number) as u32);
        }
        for (number, selector) in selectors.into_iter().enumerate().take(layout.segments) {
            tss.set_selector(number, selector);
        }
        self.write_bytes(at, &tss.bytes[saved])
    }

    /// Loads everything that cannot fault. The segment registers get their selectors; until their descriptors are
    /// loaded, they are unusable, and the privilege level is 3, so that a fault changes stacks.
    fn enter(&mut self, task: &Task) {
        const DEFINED: u32 = 0x003f_7fd5;
        const ONE: u32 = 1 << 1;
        const LOCAL_BREAKPOINTS: u64 = 0x155;
        let tss = &task.tss;
        let nested = if is_nesting(task.source) { RFLAGS_NT } else { 0 };
        let flags = u64::from(tss.register(EFLAGS) & DEFINED | ONE) | nested;
        for number in 0..REGISTERS {
            self.vcpu.set_gpr(number, tss.general(number).into());
        }
        let vmcs01 = self.vcpu.vmcs.vmcs01();
        vmcs01.write(GUEST_RIP, tss.register(EIP).into());
        vmcs01.write(GUEST_RFLAGS, flags);
        vmcs01.write(GUEST_CR0, vmcs01.read(GUEST_CR0) | CR0_TS);
        vmcs01.write(GUEST_DR7, vmcs01.read(GUEST_DR7) & !LOCAL_BREAKPOINTS);
        vmcs01.write(GUEST_PENDING_DEBUG, 0);
        vmcs01.write(GUEST_ACTIVITY_STATE, 0);
        // An NMI blocks others, and IRET unblocks them.
        let nmis = match task.source {
            TaskSwitchSource::Iret => 0,
            _ if self.event.info.is_nmi() => BLOCKING_BY_NMI,
            _ => vmcs01.read(GUEST_INTERRUPTIBILITY) & BLOCKING_BY_NMI,
        };
        vmcs01.write(GUEST_INTERRUPTIBILITY, nmis);
        let busy = task.segment.access_rights | u32::from(Descriptor::BUSY);
        Segment { access_rights: busy, ..task.segment }.load(vmcs01, &GUEST_TR, task.selector);
        UNUSABLE.load(vmcs01, &GUEST_LDTR, tss.ldt());
        for (number, register) in GUEST_SEGMENTS.iter().enumerate() {
            let selector = tss.selector(number);
            let segment = match number {
                _ if flags & RFLAGS_VM != 0 => virtual_8086(selector),
                // VM entry does not accept an unusable CS.
                CS => Segment { base: 0, limit: 0xffff_ffff, access_rights: access_rights::CODE_32 | USER },
                _ => UNUSABLE,
            };
            segment.load(vmcs01, register, selector);
        }
        self.vcpu.nested.kept.forget();
    }

    /// Loads CR3 and the descriptors of the segment registers, and gives the new task its error code.
    fn qualify(&mut self, tss: &Tss) -> Result<(), Fault> {
        if let Some(offset) = tss.layout.cr3 {
            self.load_cr3(tss.long(offset).into())?;
        }
        self.load_ldtr(tss.ldt())?;
        let vmcs01 = self.vcpu.vmcs.vmcs01();
        if vmcs01.read(GUEST_RFLAGS) & RFLAGS_VM == 0 {
            let cpl = (tss.selector(CS) & 3) as u8;
            self.load_stack_segment(tss.selector(SS), cpl)?;
            for number in (0..GUEST_SEGMENTS.len()).filter(|&number| number != CS && number != SS) {
                self.load_data_segment(number, tss.selector(number), cpl)?;
            }
            self.load_code_segment(tss.selector(CS), cpl)?;
        }
        if let Some(code) = self.event.error_code {
            self.push(code, tss.layout.width)?;
        }
        let vmcs01 = self.vcpu.vmcs.vmcs01();
        let is_in_segment = vmcs01.read(GUEST_RIP) <= vmcs01.read(GUEST_SEGMENTS[CS].limit).into();
        if is_in_segment { Ok(()) } else { Err(Fault::GeneralProtection) }
    }

    /// DEVIATION: the SDM does not say what a CR3 does whose PDPTEs have reserved bits; here CR3 stays as it is.
    fn load_cr3(&mut self, cr3: u64) -> Result<(), Fault> {
        let vmcs01 = self.vcpu.vmcs.vmcs01();
        if vmcs01.read(GUEST_CR0) & CR0_PG != 0 && vmcs01.read(GUEST_CR3) != cr3 {
            set_cr3(self.vcpu, cr3).map_err(|_| self.invalid_tss(0))?;
            self.paging.cr3 = cr3;
        }
        Ok(())
    }

    fn load_ldtr(&mut self, selector: u16) -> Result<(), Fault> {
        const LDT: u8 = 2;
        let fault = self.invalid_tss(selector);
        if selector & IN_LDT != 0 {
            return Err(fault);
        }
        if selector & !3 == 0 {
            return Ok(());
        }
        let (descriptor, _) = self.descriptor(selector)?;
        if !descriptor.is_system() || descriptor.kind() != LDT || !descriptor.is_present() {
            return Err(fault);
        }
        descriptor.segment().load(self.vcpu.vmcs.vmcs01(), &GUEST_LDTR, selector);
        Ok(())
    }

    fn load_stack_segment(&mut self, selector: u16, cpl: u8) -> Result<(), Fault> {
        let fault = self.invalid_tss(selector);
        if selector & !3 == 0 {
            return Err(fault);
        }
        let (descriptor, at) = self.descriptor(selector)?;
        if !descriptor.is_writable() {
            return Err(fault);
        }
        if !descriptor.is_present() {
            return Err(Fault::Stack(self.code(selector)));
        }
        if descriptor.dpl() != cpl || (selector & 3) as u8 != cpl {
            return Err(fault);
        }
        self.load(SS, selector, descriptor, at)?;
        // CS, which is loaded last, has the privilege level of SS: VM entry wants it for a fault in between.
        let vmcs01 = self.vcpu.vmcs.vmcs01();
        vmcs01.write(GUEST_SEGMENTS[CS].access_rights, access_rights::CODE_32 | u32::from(cpl) << 5);
        Ok(())
    }

    fn load_data_segment(&mut self, number: usize, selector: u16, cpl: u8) -> Result<(), Fault> {
        if selector & !3 == 0 {
            return Ok(());
        }
        let fault = self.invalid_tss(selector);
        let (descriptor, at) = self.descriptor(selector)?;
        let is_protected = !descriptor.is_conforming_code();
        let privilege = cpl.max((selector & 3) as u8);
        if !descriptor.is_readable() || is_protected && privilege > descriptor.dpl() {
            return Err(fault);
        }
        if !descriptor.is_present() {
            return Err(Fault::NotPresent(self.code(selector)));
        }
        self.load(number, selector, descriptor, at)
    }

    fn load_code_segment(&mut self, selector: u16, cpl: u8) -> Result<(), Fault> {
        let fault = self.invalid_tss(selector);
        if selector & !3 == 0 {
            return Err(fault);
        }
        let (descriptor, at) = self.descriptor(selector)?;
        let has_privilege =
            if descriptor.is_conforming_code() { descriptor.dpl() <= cpl } else { descriptor.dpl() == cpl };
        if !descriptor.is_code() || !has_privilege {
            return Err(fault);
        }
        if !descriptor.is_present() {
            return Err(Fault::NotPresent(self.code(selector)));
        }
        self.load(CS, selector, descriptor, at)
    }

    /// Loads a segment register, and sets the accessed flag of its descriptor.
    fn load(&mut self, number: usize, selector: u16, descriptor: Descriptor, at: u64) -> Result<(), Fault> {
        if descriptor.kind() & Descriptor::ACCESSED == 0 {
            self.change_access_byte(at, |byte| byte | Descriptor::ACCESSED)?;
        }
        let mut segment = descriptor.segment();
        segment.access_rights |= u32::from(Descriptor::ACCESSED);
        segment.load(self.vcpu.vmcs.vmcs01(), &GUEST_SEGMENTS[number], selector);
        Ok(())
    }

    /// Pushes an error code onto the new task's stack, as an access of the new task.
    fn push(&mut self, error_code: u32, bytes: usize) -> Result<(), Fault> {
        let vmcs01 = self.vcpu.vmcs.vmcs01();
        let stack = Segment::read(vmcs01, &GUEST_SEGMENTS[SS]);
        let is_user = privilege_level(stack.access_rights) == 3;
        let esp = vmcs01.read(GUEST_RSP) as u32;
        let mask = stack.stack_pointer_mask();
        let pointer = esp.wrapping_sub(bytes as u32) & mask;
        let at = stack.linear(pointer.into(), bytes as u64, Access::Write).ok_or(Fault::StackSegment)?;
        let mode = if is_user { AccessMode::User } else { AccessMode::Supervisor };
        let paging = Paging { mode, ..self.vcpu.paging() };
        paging.write(&self.vcpu.memory, at, &error_code.to_le_bytes()[..bytes])?;
        self.vcpu.vmcs.vmcs01().write(GUEST_RSP, u64::from(esp & !mask | pointer));
        Ok(())
    }
}

/// DPL 3 in access rights.
const USER: u32 = 3 << 5;

/// A segment register with a selector whose descriptor is not loaded. SS without a descriptor gives privilege level 3.
const UNUSABLE: Segment = Segment { base: 0, limit: 0, access_rights: access_rights::UNUSABLE | USER };

/// A segment register in virtual-8086 mode (SDM 27.3.1.2 "Checks on Guest Segment Registers").
const fn virtual_8086(selector: u16) -> Segment {
    Segment { base: (selector as u64) << 4, limit: 0xffff, access_rights: 0xf3 }
}

impl<M: Machine> Vcpu<M> {
    /// The new task begins with #DB, as the debug trap flag of its TSS says.
    fn trap_after_task_switch(&mut self) {
        const DB: u8 = 1;
        self.machine.note_task_switch_trap();
        let debug = InterruptionInfo::new(interruption_type::HARDWARE_EXCEPTION, DB);
        self.vmcs.vmcs01().write(ENTRY_INTERRUPTION_INFO, debug.0);
    }
}
