//! The VMX instructions, and the record of which VMCS is current.

use core::arch::asm;
use core::marker::PhantomData;

use ept::Hpa;
use shadow::encoding::{Area, Encoding};
use shadow::fields::{Field, FieldValue};
use shadow::hw::VmcsAccess;
use shadow::nested::{Invept, Invvpid, VmcsPair};
use shadow::vmcs12::SHADOW_INDICATOR;
use shadow::{FieldId, FieldSet, VmxCaps};

use crate::mem::HostPages;
use crate::stop::stop_internal;

/// A VMX instruction whose operand is the address of a region, and whose failure is a defect of the host.
macro_rules! instruction_on_region {
    ($instruction:literal, $region:expr) => {{
        let region: Hpa = $region;
        asm!(
            concat!($instruction, " [{}]"),
            "jbe {}",
            in(reg) &raw const region.0,
            label { instruction_failed($instruction, region) },
            options(nostack)
        )
    }};
}

/// INVEPT or INVVPID with operands that are valid by construction.
macro_rules! invalidate {
    ($instruction:literal, $kind:expr, $descriptor:expr) => {{
        let (kind, descriptor): (u64, [u64; 2]) = ($kind, $descriptor);
        asm!(
            concat!($instruction, " {}, [{}]"),
            "jbe {}",
            in(reg) kind,
            in(reg) descriptor.as_ptr(),
            label { invalidation_failed($instruction, kind) },
            options(nostack)
        )
    }};
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Which {
    Vmcs01,
    Vmcs02,
    /// Either, or none: the next access loads the VMCS that it needs.
    Unknown,
}

/// The VMCSs of a logical processor and which of them is current. Nothing else on this processor executes VMPTRLD or
/// VMCLEAR.
///
/// With VMCS shadowing, vmcs02 changes form: an ordinary VMCS while the nested guest runs, a shadow VMCS, linked to
/// vmcs01, while the guest hypervisor runs. So the guest hypervisor reads and writes vmcs02 itself, and nothing is
/// copied.
#[derive(Debug)]
pub struct Vmcss {
    access: CurrentVmcs,
    regions: [Hpa; 2],
    revision: u32,
    current: Which,
    launched: [bool; 2],
    /// vmcs02 becomes a shadow VMCS whenever vmcs01 becomes current.
    vmcs02_shadows: bool,
    /// vmcs02 is a shadow VMCS now.
    is_shadow: bool,
    /// The shadow VMCS that vmcs02 can be linked to; only [`VmcsPair::access_shadow02`] makes it current.
    shadow02: Option<Hpa>,
}

/// Access to the current VMCS. [`Vmcss`] lends it out, so that no code can switch to another VMCS meanwhile. Only
/// [`Self::set_host_state`] writes to the host-state area, which decides where a VM exit continues.
#[derive(Debug)]
pub struct CurrentVmcs {
    // Not `Send`: the VMCS is current on this processor only.
    _not_send: PhantomData<*const ()>,
}

/// Access to the current VMCS if it is shadow02. Its host-state area is mere data, as no VM entry uses a shadow VMCS.
#[derive(Debug)]
pub struct ShadowVmcs(CurrentVmcs);

impl CurrentVmcs {
    const fn new() -> Self {
        Self { _not_send: PhantomData }
    }

    /// Writes a field of the host-state area.
    ///
    /// # Safety
    ///
    /// A VM exit to this host state is sound.
    pub unsafe fn set_host_state<T: FieldValue>(&mut self, field: Field<T>, value: T) {
        debug_assert!(field.id().encoding().area() == Area::Host);
        // SAFETY: a VMCS is current; the rest is the caller's promise.
        unsafe { vmwrite(field.id(), field.id().encoding(), value.into_word()) };
    }
}

impl Vmcss {
    /// Takes over two regions of zeros and puts the revision identifier into them.
    ///
    /// # Safety
    ///
    /// The processor is in VMX operation, and the regions are pages that nothing else uses.
    pub unsafe fn new(vmcs01: Hpa, vmcs02: Hpa, revision: u32) -> Self {
        for region in [vmcs01, vmcs02] {
            let word = super::phys::phys_to_virt(region).cast::<u32>();
            // SAFETY: the caller's promise; the page is mapped, in the direct map.
            unsafe { word.write_volatile(revision) };
            // SAFETY: as above.
            unsafe { instruction_on_region!("vmclear", region) };
        }
        let regions = [vmcs01, vmcs02];
        Self {
            access: CurrentVmcs::new(),
            regions,
            revision,
            current: Which::Unknown,
            launched: [false; 2],
            vmcs02_shadows: false,
            is_shadow: false,
            shadow02: None,
        }
    }

    /// To be called before the guest hypervisor runs.
    #[inline(always)]
    pub fn make_vmcs01_current(&mut self) {
        self.vmcs01();
    }

    /// To be called before the nested guest runs.
    #[inline(always)]
    pub fn make_vmcs02_current(&mut self) {
        self.vmcs02();
    }

    /// The VMCS of the guest that has just run.
    #[inline(always)]
    pub fn current(&mut self) -> &mut CurrentVmcs {
        debug_assert!(self.current != Which::Unknown);
        &mut self.access
    }

    /// Takes over a page of zeros as the shadow VMCS that vmcs02 can be linked to. Returns its address, for vmcs02's
    /// VMCS link pointer.
    pub fn add_shadow02(&mut self, page: HostPages) -> Hpa {
        let region = page.phys();
        // SAFETY: no other code has the page; it is mapped, in the direct map.
        unsafe { page.as_mut_ptr().cast::<u32>().write_volatile(self.revision | SHADOW_INDICATOR) };
        // SAFETY: as above.
        unsafe { instruction_on_region!("vmclear", region) };
        self.shadow02 = Some(region);
        region
    }

    fn visit<T>(&mut self, region: Hpa, access: impl FnOnce(&mut CurrentVmcs) -> T) -> T {
        // SAFETY: the region was initialised by `new` or `add_shadow02`; a shadow VMCS is loaded like any other.
        unsafe { instruction_on_region!("vmptrld", region) };
        let result = access(&mut self.access);
        if let Some(&region) = self.regions.get(self.current as usize) {
            // SAFETY: as above.
            unsafe { instruction_on_region!("vmptrld", region) };
        }
        result
    }

    #[inline]
    fn load(&mut self, which: Which, vmcs02_is_shadow: bool) {
        if vmcs02_is_shadow != self.is_shadow {
            self.change_form(vmcs02_is_shadow);
        }
        // SAFETY: the region was initialised by `new`.
        unsafe { instruction_on_region!("vmptrld", self.regions[which as usize]) };
        self.current = which;
    }

    /// Turns vmcs02 into a shadow VMCS or back. VMCLEAR comes first, as the processor may keep parts of an active VMCS
    /// on the chip.
    #[inline]
    fn change_form(&mut self, shadow: bool) {
        let region = self.regions[1];
        // SAFETY: the region was initialised by `new`.
        unsafe { instruction_on_region!("vmclear", region) };
        let indicator = if shadow { SHADOW_INDICATOR } else { 0 };
        // SAFETY: after VMCLEAR the region's first word is software's to write; the page is mapped, in the direct map.
        unsafe { super::phys::phys_to_virt(region).cast::<u32>().write_volatile(self.revision | indicator) };
        self.is_shadow = shadow;
        self.launched[1] = false;
    }

    /// Whether the current VMCS is launched.
    #[inline]
    pub fn is_launched(&self) -> bool {
        self.launched.get(self.current as usize).is_some_and(|&launched| launched)
    }

    /// Notes that vmcs01 was entered, so it is launched.
    #[inline]
    pub fn note_entry_of_vmcs01(&mut self) {
        self.launched[Which::Vmcs01 as usize] = true;
    }
}

impl VmcsPair for Vmcss {
    type Current = CurrentVmcs;
    type Shadow = ShadowVmcs;

    #[inline(always)]
    fn vmcs01(&mut self) -> &mut CurrentVmcs {
        if self.current != Which::Vmcs01 {
            self.load(Which::Vmcs01, self.vmcs02_shadows);
        }
        &mut self.access
    }

    #[inline(always)]
    fn vmcs02(&mut self) -> &mut CurrentVmcs {
        if self.current != Which::Vmcs02 {
            self.load(Which::Vmcs02, false);
        }
        &mut self.access
    }

    fn access_vmcs02<T>(&mut self, access: impl FnOnce(&mut CurrentVmcs) -> T) -> T {
        self.visit(self.regions[1], access)
    }

    /// VMCLEAR comes last: the written fields must be in the region when a VM entry uses it as a linked VMCS.
    fn access_shadow02<T>(&mut self, access: impl FnOnce(&mut ShadowVmcs) -> T) -> T {
        let Some(region) = self.shadow02 else { stop_internal!("there is no shadow VMCS for vmcs02") };
        let result = self.visit(region, |_| access(&mut ShadowVmcs(CurrentVmcs::new())));
        // SAFETY: the region was initialised by `add_shadow02`.
        unsafe { instruction_on_region!("vmclear", region) };
        result
    }

    /// Takes effect the next time that vmcs01 becomes current.
    fn set_vmcs02_shadows(&mut self, shadows: bool) {
        self.vmcs02_shadows = shadows;
        self.current = Which::Unknown;
    }

    fn vmcs02_address(&self) -> Hpa {
        self.regions[1]
    }

    #[inline]
    fn note_entry_of_vmcs02(&mut self) {
        self.launched[Which::Vmcs02 as usize] = true;
    }
}

#[cold]
fn instruction_failed(instruction: &str, region: Hpa) -> ! {
    stop_internal!("{instruction} of {region} failed")
}

#[cold]
fn field_failed(instruction: &str, id: FieldId) -> ! {
    stop_internal!("{instruction} of {id:?} failed")
}

/// VMWRITE of a field, by one of its encodings.
///
/// # Safety
///
/// A VMCS is current. If the encoding is one of the host-state area, a VM exit to the written state is sound.
#[inline(always)]
unsafe fn vmwrite(id: FieldId, encoding: Encoding, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "vmwrite {encoding}, {value}",
            "jbe {failed}",
            encoding = in(reg) u64::from(encoding.0),
            value = in(reg) value,
            failed = label { field_failed("VMWRITE", id) },
            options(nomem, nostack)
        );
    }
}

/// A failed VMREAD jumps here: in Rust, inline assembly with outputs cannot jump to a label.
#[cold]
extern "sysv64" fn vmread_failed(encoding: u64) -> ! {
    stop_internal!("VMREAD of {encoding:#x} failed")
}

impl CurrentVmcs {
    /// Whether the processor has a field of this encoding. Only the processor itself knows: it may have fields that are
    /// not in the field table.
    pub fn has_encoding(&self, encoding: Encoding) -> bool {
        let failed: u8;
        // SAFETY: a VMCS is current. VMREAD writes nothing but its operand, which is not used.
        unsafe {
            asm!(
                "vmread {value}, {encoding}",
                "setbe {failed}",
                value = lateout(reg) _,
                failed = lateout(reg_byte) failed,
                encoding = in(reg) u64::from(encoding.0),
                options(nomem, nostack)
            );
        }
        failed == 0
    }
}

impl VmcsAccess for CurrentVmcs {
    #[inline(always)]
    fn read_raw(&self, id: FieldId) -> u64 {
        let value: u64;
        // SAFETY: a VMCS is current. VMREAD writes nothing but its operand; after a failure execution does not return
        // here.
        unsafe {
            asm!(
                "vmread {value}, {encoding}",
                "jbe 2f",
                ".pushsection .text.unlikely, \"ax\", @progbits",
                "2: mov rdi, {encoding}",
                "and rsp, -16",
                "call {failed}",
                ".popsection",
                value = lateout(reg) value,
                encoding = in(reg) u64::from(id.encoding().0),
                failed = sym vmread_failed,
                options(nomem)
            );
        }
        value
    }

    #[inline(always)]
    fn write_raw(&mut self, id: FieldId, value: u64) {
        // SAFETY: a VMCS is current, and the write leaves the host-state area alone. The code that enters a guest
        // answers for the fields that affect the guest.
        unsafe { vmwrite(id, id.encoding_but_host_state(), value) };
    }

    #[inline(always)]
    fn write_from<const INDEX: usize, const LENGTH: usize>(&mut self, id: FieldId, words: &[u64; LENGTH]) {
        const { assert!(INDEX < LENGTH) };
        // SAFETY: as above; the word is inside the block.
        unsafe {
            asm!(
                "vmwrite {encoding}, [{words} + {offset}]",
                "jbe {failed}",
                encoding = in(reg) u64::from(id.encoding_but_host_state().0),
                words = in(reg) words.as_ptr(),
                offset = const INDEX * size_of::<u64>(),
                failed = label { field_failed("VMWRITE", id) },
                options(readonly, nostack)
            );
        }
    }
}

impl VmcsAccess for ShadowVmcs {
    fn read_raw(&self, id: FieldId) -> u64 {
        self.0.read_raw(id)
    }

    fn write_raw(&mut self, id: FieldId, value: u64) {
        // SAFETY: a shadow VMCS is current.
        unsafe { vmwrite(id, id.encoding(), value) };
    }
}

/// Enters VMX operation. Sets the bits of CR0 and CR4 that VMX operation fixes to 1.
///
/// # Safety
///
/// The processor has VMX, IA32_FEATURE_CONTROL allows it, and the region is a page that nothing else uses.
pub unsafe fn vmxon(region: Hpa, revision: u32, cr0_fixed0: u64, cr4_fixed0: u64) {
    use x86_64::registers::control::{Cr0, Cr4, Cr4Flags};
    let word = super::phys::phys_to_virt(region).cast::<u32>();
    // SAFETY: the processor demands the fixed bits (NE, PE, PG; VMXE), and the host works with all of them set.
    unsafe {
        word.write_volatile(revision);
        Cr0::write_raw(Cr0::read_raw() | cr0_fixed0);
        Cr4::write_raw(Cr4::read_raw() | cr4_fixed0 | Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits());
        instruction_on_region!("vmxon", region);
    }
}

/// The fields that VMREAD knows, tried one by one in VMX operation that is entered and left for this.
///
/// # Safety
///
/// As for [`vmxon`]; the processor is not in VMX operation, and `vmcs` is another such page.
pub unsafe fn known_fields(region: Hpa, vmcs: Hpa, caps: &VmxCaps) -> FieldSet {
    let revision = caps.basic as u32 & 0x7fff_ffff;
    // SAFETY: the caller's promise.
    unsafe { vmxon(region, revision, caps.cr0_fixed0, caps.cr4_fixed0) };
    // SAFETY: the page is mapped, in the direct map.
    unsafe { super::phys::phys_to_virt(vmcs).cast::<u32>().write_volatile(revision) };
    // SAFETY: the processor is in VMX operation, and the region has its revision identifier.
    unsafe {
        instruction_on_region!("vmclear", vmcs);
        instruction_on_region!("vmptrld", vmcs);
    }
    let current = CurrentVmcs::new();
    let known = FieldId::all().filter(|id| current.has_encoding(id.encoding())).fold(FieldSet::EMPTY, FieldSet::with);
    // SAFETY: no code uses the VMCS or VMX operation any more.
    unsafe {
        instruction_on_region!("vmclear", vmcs);
        asm!("vmxoff", options(nostack));
    }
    known
}

/// INVEPT.
pub fn invept(what: Invept) {
    let (kind, eptp) = match what {
        Invept::Single(eptp) => (1, eptp.bits()),
        Invept::Global => (2, 0),
    };
    // SAFETY: dropping cached translations is always sound.
    unsafe { invalidate!("invept", kind, [eptp, 0]) };
}

/// INVVPID.
pub fn invvpid(what: Invvpid) {
    let (kind, descriptor) = match what {
        Invvpid::Address { vpid, linear } => (0, [u64::from(vpid), linear]),
        Invvpid::Single(vpid) => (1, [u64::from(vpid), 0]),
        Invvpid::AllContexts => (2, [0; 2]),
        Invvpid::RetainingGlobals(vpid) => (3, [u64::from(vpid), 0]),
    };
    // SAFETY: dropping cached translations is always sound.
    unsafe { invalidate!("invvpid", kind, descriptor) };
}

#[cold]
fn invalidation_failed(instruction: &str, kind: u64) -> ! {
    stop_internal!("{instruction} of type {kind} failed")
}
