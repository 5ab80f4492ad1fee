//! From the boot loader's 32-bit protected mode to long mode, and from real mode for the other processors.
//!
//! `_start` checks for 64-bit mode, builds early page tables and calls the function `l1hv_main` that the binary
//! defines: `extern "C" fn(magic: u32, info: u32) -> !`. The early address space:
//!
//! ```text
//!   0 ..                        4 GiB   identity, only until the jump to l1hv_main
//!   0xFFFF_8000_0000_0000 + physical    the direct map, low 4 GiB
//!   0xFFFF_FFFF_8000_0000 + physical    the image (linked there, loaded at 1 MiB), low 1 GiB
//! ```

#![allow(unsafe_code, reason = "the first instructions are assembly")]

use core::arch::global_asm;

use crate::stop::StopKind;

global_asm!(
    include_str!("start.S"),
    no_long_mode_status = const StopKind::NoLongMode.status(),
    debug_port = const protocol::DEBUG_PORT,
    exit_port = const protocol::EXIT_PORT,
    shutdown_port = const protocol::SHUTDOWN_PORT,
    shutdown_text = sym SHUTDOWN_TEXT,
    shutdown_length = const protocol::SHUTDOWN_TEXT.len(),
    options(att_syntax)
);

static SHUTDOWN_TEXT: [u8; 8] = *protocol::SHUTDOWN_TEXT;

global_asm!(include_str!("trampoline.S"), options(att_syntax));

global_asm!(include_str!("bios.S"), options(att_syntax));

global_asm!(include_str!("roll_call.S"), most = const ROLL_CALL_MOST, options(att_syntax));

/// The most processors that a roll call can list; it counts more.
pub const ROLL_CALL_MOST: usize = 512;

unsafe extern "C" {
    static roll_call_start: u8;
    static roll_call_list: u8;
    static roll_call_end: u8;
}

unsafe extern "C" {
    static bios_services_start: u8;
    static bios_services_data: u8;
}

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_parameters: u8;
    static trampoline_end: u8;
}

/// The parameters of a processor on its way from real mode into the image: the end of the [`trampoline`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TrampolineParameters {
    /// RSP.
    pub stack: u64,
    /// An `extern "sysv64" fn() -> !` of the image.
    pub entry: u64,
    /// CR0 with PE and PG.
    pub cr0: u32,
    /// Page tables that map the trampoline's page to itself, and the image and the stack.
    pub cr3: u32,
    /// CR4 with PAE.
    pub cr4: u32,
    /// IA32_EFER with LME.
    pub efer: u32,
}

impl TrampolineParameters {
    /// The parameters as bytes, as the trampoline reads them.
    pub fn to_bytes(&self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        let (wide, narrow) = bytes.split_at_mut(16);
        for (place, value) in wide.as_chunks_mut().0.iter_mut().zip([self.stack, self.entry]) {
            *place = value.to_le_bytes();
        }
        for (place, value) in narrow.as_chunks_mut().0.iter_mut().zip([self.cr0, self.cr3, self.cr4, self.efer]) {
            *place = value.to_le_bytes();
        }
        bytes
    }
}

/// The code that a SIPI starts, for any page below 1 MiB, followed by the parameters, which are zero here.
pub fn trampoline() -> &'static [u8] {
    let (start, end) = (&raw const trampoline_start, &raw const trampoline_end);
    let parameters = (&raw const trampoline_parameters).addr();
    debug_assert_eq!(end.addr() - parameters, size_of::<TrampolineParameters>());
    // SAFETY: the symbols enclose constant bytes of the image.
    unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// What the processors of a roll call write.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RollCallList {
    /// How many have come.
    pub come: u32,
    /// How many of them have entered their id.
    pub entered: u32,
    /// APIC ids, in the order of coming.
    pub ids: [u32; ROLL_CALL_MOST],
}

/// The code that a SIPI starts to count processors, for any page below 1 MiB, with an empty [`RollCallList`] at its
/// end, and the offset of that.
pub fn roll_call() -> (&'static [u8], usize) {
    let (start, end) = (&raw const roll_call_start, &raw const roll_call_end);
    let list = (&raw const roll_call_list).addr() - start.addr();
    debug_assert_eq!(end.addr() - start.addr() - list, size_of::<RollCallList>());
    // SAFETY: the symbols enclose constant bytes of the image.
    (unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) }, list)
}

/// The code of [`crate::bios`], for any place below 1 MiB that begins with a segment.
pub fn bios_services() -> &'static [u8] {
    let (start, end) = (&raw const bios_services_start, &raw const bios_services_data);
    // SAFETY: the symbols enclose constant bytes of the image.
    unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) }
}
