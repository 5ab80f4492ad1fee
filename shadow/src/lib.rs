//! Nested VMX as logic: the VMCS fields, the checks, the merge of VMCS12 into VMCS02, and the decision who handles an
//! exit.
//!
//! ```text
//!   guest hypervisor  --VMWRITE-->  vmcs12 --check--> --merge--> vmcs02 --VM entry--> nested guest
//!                     <--VMREAD---  vmcs12 <------- sync ------- vmcs02 <--VM exit--
//! ```
//!
//! Nothing here executes a privileged instruction: the processor is behind [`nested::Machine`], its VMCSs behind
//! [`hw::VmcsAccess`], and the guest hypervisor's memory behind [`hw::GuestMemory`]. So everything runs and is tested
//! on the host.
//!
//! Invariants:
//! * One table, [`fields`], holds everything that is known of a VMCS field. No other list of fields exists.
//! * A value that the guest hypervisor supplies is read once: the checked value is the one that is used.
//! * Everything that can fail happens before the first write to vmcs02 or to guest state.
//!
//! Where to look:
//!
//! | to | go to |
//! |---|---|
//! | name, encode or look up a VMCS field | [`fields`], [`encoding`], [`index`] |
//! | know the processor's capabilities, and those that a guest hypervisor is offered | [`caps`] |
//! | answer CPUID | [`cpuid`] |
//! | compute a control word, and check words against each other | [`VmxCaps::choose`], [`controls::ControlWords::check_dependencies`] |
//! | take a VM exit apart | [`exit::ExitReason::info`], [`exit::Qualification`], [`exit::InsnInfo`], [`exit::InterruptionInfo`] |
//! | inject an event, or inject an interrupted one again | [`injection`], [`event`] |
//! | keep CR0, CR4 and IA32_EFER of a guest in order | [`registers`] |
//! | make the checks of VM entry | [`check`] |
//! | emulate a VMX instruction | [`insn`], [`operand`], [`linear`], [`outcome`] |
//! | run a nested guest | [`nested`]; its parts are [`vmcs12`], [`merge`], [`sync`], [`host_load`], [`policy`] |
//! | test a hypervisor that uses this crate | `fake`, with the feature of that name |
//! | skip, on an exit, state that cannot have changed | [`write_trap`] |
//! | hand over registers that the host has no use for | [`passing`] |
//! | grant fields for VMCS shadowing, field by field | [`permission`] |
//!
//! Steps of Linux KVM's `nested.c`, and the code that takes them here:
//!
//! | there | here |
//! |---|---|
//! | `handle_vmxon`, `handle_vmptrld`, `handle_vmclear`, `handle_vmread`, `handle_vmwrite` | [`insn::VmxOperation`], and `nested::instructions` for operands |
//! | `nested_vmx_setup_ctls_msrs` | [`VmxCaps::offered`] |
//! | `nested_vmx_run`, `nested_vmx_enter_non_root_mode` | `nested::entry` |
//! | `nested_vmx_check_controls`, `_check_host_state`, `_check_guest_state` | [`check::controls`], [`check::host_state`], [`check::guest_state`] |
//! | `prepare_vmcs02`, with `dirty_vmcs12` for what is rare | [`merge::prepare`], which goes by the dirty fields of VMCS12 |
//! | `nested_vmx_prepare_msr_bitmap` | `nested::msr_bitmap`, merged once and watched for writes |
//! | `nested_vmx_load_msr`, `nested_vmx_store_msr` | [`merge::copy_in`], [`merge::store`] |
//! | `nested_vmx_reflect_vmexit`: `_l0_wants_exit`, `_l1_wants_exit` | [`policy::route`] |
//! | `nested_vmx_vmexit`, `nested_vmx_fail` | `nested::reflect`, [`outcome`] |
//! | `sync_vmcs02_to_vmcs12`, `prepare_vmcs12` | [`sync`]; fields that are live in vmcs02 are read when they are needed |
//! | `vmcs12_save_pending_event` | [`event`], [`injection`] |
//! | `load_vmcs12_host_state` | [`host_load::load_host_state`] |
//! | `copy_shadow_to_vmcs12`, `copy_vmcs12_to_shadow` | none: vmcs02 itself is the shadow VMCS |
//! | `nested_ept_init_mmu_context`, the shadow MMU | [`ept::nested::NestedPaging`] |
//!
//! Operations of Apple's Hypervisor framework that exist here:
//!
//! | there | here |
//! |---|---|
//! | `hv_vmx_vcpu_read_vmcs`, `hv_vmx_vcpu_write_vmcs` | [`hw::VmcsAccess::read`], [`hw::VmcsAccess::write`] |
//! | `hv_vmx_get_cap_write_vmcs` (allowed-0 and allowed-1 masks) | [`caps::CapabilityWord::allowed`]; [`VmxCaps::choose`] applies them |
//! | `hv_vmx_read_capability` | [`VmxCaps::msr`] |
//! | `hv_vmx_get_msr_info` | [`msr::host_owns`] |
//! | `hv_vmx_vcpu_read_shadow_vmcs`, `hv_vmx_vcpu_write_shadow_vmcs` | [`Vmcs12::get`], [`Vmcs12::set`]; a live field is in vmcs02 |
//! | `hv_vmx_vcpu_set_shadow_access` with `HV_SHADOW_VMCS_NONE`, `_READ`, `_WRITE` | [`permission::Permissions::set`] with [`permission::Access`]; a grant that would change results is refused |
//! | `hv_vmx_vcpu_set_apic_address` | [`hw::VmcsAccess::write`] of [`fields::APIC_ACCESS_ADDRESS`] |
//! | `VMX_REASON_*`, `IRQ_INFO_*` | [`exit::ExitReason`], [`exit::InterruptionInfo`] |
//!
//! ```
//! use shadow::encoding::Encoding;
//! use shadow::index::lookup;
//!
//! let field = lookup(Encoding(0x6c00)).unwrap();
//! assert_eq!((format!("{field:?}"), format!("{:?}", field.encoding())), ("HOST_CR0".into(), "0x6c00 (Host Nat 0)".into()));
//! assert_eq!(lookup(Encoding(0x7ffe)), None);
//! ```
//!
//! A complete round trip, with the fakes of the feature `fake`: a guest hypervisor builds a VMCS, enters its guest, and
//! gets the exit.
//!
//! ```
//! use shadow::controls::{EntryControls, ExitControls, Pin, Primary, Secondary};
//! use shadow::exit::ExitReason;
//! use shadow::fake::{FakeMachine, Ram, Variant, hypervisor_registers};
//! use shadow::fields::*;
//! use shadow::hw::VmcsAccess;
//! use shadow::nested::{Running, VmcsPair};
//!
//! // VMXON has been executed. VMPTRLD, VMWRITE and the others arrive as exits of vmcs01.
//! let mut machine =
//!     FakeMachine::new(&hypervisor_registers(), Ram::with_paging(), Variant { shadowing: false, ..Variant::default() });
//! machine.vmptrld(0x5000)?;
//! let caps = machine.vcpu.offered.clone();
//! let exit = ExitControls::HOST_ADDRESS_SPACE_SIZE;
//! for (id, value) in [
//!     (PIN_CONTROLS.id(), caps.choose(Pin::empty(), Pin::empty())?.bits().into()),
//!     (PRIMARY_CONTROLS.id(), caps.choose(Primary::HLT_EXITING, Primary::empty())?.bits().into()),
//!     (EXIT_CONTROLS.id(), caps.choose(exit, ExitControls::empty())?.bits().into()),
//!     (ENTRY_CONTROLS.id(), caps.choose(EntryControls::IA32E_MODE_GUEST, EntryControls::empty())?.bits().into()),
//!     (VMCS_LINK_POINTER.id(), u64::MAX),
//!     (HOST_CR0.id(), 0x8000_0021),
//!     (HOST_CR3.id(), Ram::PML4),
//!     (HOST_CR4.id(), 0x2020),
//!     (HOST_CS_SELECTOR.id(), 0x10),
//!     (HOST_TR_SELECTOR.id(), 0x40),
//!     (HOST_RIP.id(), 0xffff_8000_0000_1000),
//!     (GUEST_CR0.id(), 0x8000_0021),
//!     (GUEST_CR4.id(), 0x2020),
//!     (GUEST_RIP.id(), 0x10_0000),
//! ] {
//!     machine.vmwrite(id, value)?;
//! }
//!
//! // VMLAUNCH: the checks, and the merge into vmcs02, which the processor would enter now.
//! machine.exit(ExitReason::VMLAUNCH, 0)?;
//! assert_eq!(machine.vcpu.running, Running::Entering);
//! let vmcs02 = machine.vcpu.vmcs.vmcs02();
//! assert_eq!(vmcs02.read(GUEST_RIP), 0x10_0000);
//! assert!(vmcs02.read(SECONDARY_CONTROLS).contains(Secondary::ENABLE_EPT), "the host's own");
//!
//! // The nested guest executes CPUID: its hypervisor continues at its host RIP and reads the exit reason.
//! machine.nested_exit(ExitReason::CPUID, 0);
//! assert_eq!(machine.vcpu.running, Running::GuestHypervisor);
//! assert_eq!(machine.vcpu.vmcs.vmcs01().read(GUEST_RIP), 0xffff_8000_0000_1000);
//! assert_eq!(machine.vmread(EXIT_REASON.id())?, u64::from(ExitReason::CPUID.0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! SDM references are to the Intel 64 and IA-32 Architectures Software Developer's Manual, Volume 3C, edition 085
//! (October 2024).
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::missing_errors_doc, clippy::missing_panics_doc)]

#[cfg(any(test, feature = "fake"))]
extern crate std;

pub mod caps;
pub mod check;
pub mod controls;
pub mod cpuid;
pub mod descriptor;
pub mod encoding;
pub mod event;
pub mod exit;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod fields;
pub mod host_load;
pub mod hw;
pub mod index;
pub mod injection;
pub mod insn;
pub mod linear;
pub mod merge;
pub mod mitigations;
pub mod msr;
pub mod mtrr;
pub mod nested;
pub mod operand;
pub mod outcome;
pub mod passing;
pub mod permission;
pub mod policy;
pub mod registers;
pub mod sync;
pub mod vmcs12;
pub mod watch;
pub mod write_trap;

pub use caps::VmxCaps;
pub use fields::{Field, FieldId};
pub use index::FieldSet;
pub use outcome::{Fault, InsnError, VmFail};
pub use vmcs12::Vmcs12;
