//! The interface of a processor and its surroundings that the nested logic needs.

use core::fmt;
use core::ops::IndexMut;

use ept::map::OutOfTables;
use ept::table::TableMemory;
use ept::{Eptp01, Eptp02, Gpa, Hpa};

use crate::exit::{ExitReason, IoAccess};
use crate::host_load::VmxAbort;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::permission::Access;
use crate::watch::{MergedAs, ProcessorWritten, Watches};

/// The VMCSs of a logical processor: vmcs01, vmcs02, and the shadow VMCS that vmcs02 can be linked to ("shadow02").
///
/// Law: a call of [`Self::vmcs01`] or [`Self::vmcs02`] makes that VMCS current until the next call of the other one;
/// the `access_` methods return to the VMCS that was current before.
pub trait VmcsPair {
    /// Access to the current VMCS.
    type Current: VmcsAccess;
    /// Access to shadow02, including its host-state area, as no VM entry uses this VMCS.
    type Shadow: VmcsAccess;

    /// Makes vmcs01 current, if it is not.
    fn vmcs01(&mut self) -> &mut Self::Current;
    /// Makes vmcs02 current, if it is not.
    fn vmcs02(&mut self) -> &mut Self::Current;
    /// Accesses fields of vmcs02 while the guest hypervisor runs, whether vmcs02 is an ordinary or a shadow VMCS.
    fn access_vmcs02<T>(&mut self, access: impl FnOnce(&mut Self::Current) -> T) -> T;
    /// Accesses fields of shadow02.
    fn access_shadow02<T>(&mut self, access: impl FnOnce(&mut Self::Shadow) -> T) -> T;
    /// Sets whether vmcs02 is a shadow VMCS, linked to vmcs01, while vmcs01 is current.
    fn set_vmcs02_shadows(&mut self, shadows: bool);
    /// The address of vmcs02: vmcs01's VMCS link pointer while vmcs02 is a shadow VMCS.
    fn vmcs02_address(&self) -> Hpa;
    /// Notes that the processor has accepted an entry of vmcs02, which is launched from then on.
    fn note_entry_of_vmcs02(&mut self);
}

/// The guest hypervisor's memory as the nested logic uses it: with pages that are watched for writes.
pub trait WatchedMemory: GuestMemory {
    /// The pages that this processor has merged as one kind of bitmap.
    fn watches(&self, kind: MergedAs) -> &Watches;
    /// Lets every processor write to the page of an address again, because a write is about to happen. Does nothing to
    /// a page that is not watched.
    fn unwatch(&self, address: Gpa);
    /// The pages that vmcs02 gives this processor to write to.
    fn written(&self) -> &ProcessorWritten;
    /// Whether an address is the host's own.
    fn is_host(&self, address: Gpa) -> bool;

    /// The processor writes to these pages by itself from now on, until the next call: nobody watches them.
    fn leave_unwatched(&self, pages: [Gpa; ProcessorWritten::PAGES]) {
        self.written().set(pages);
        pages.into_iter().for_each(|page| self.unwatch(page));
    }
}

/// Which translations an INVEPT drops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invept {
    /// Translations derived from one EPTP.
    Single(Eptp02),
    /// All.
    Global,
}

/// Which translations an INVVPID drops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invvpid {
    /// Translations of one linear address.
    Address {
        /// The VPID.
        vpid: u16,
        /// The linear address.
        linear: u64,
    },
    /// All translations of a VPID.
    Single(u16),
    /// All translations of all VPIDs.
    AllContexts,
    /// Translations of a VPID that are not global.
    RetainingGlobals(u16),
}

/// The outcome of write-protecting a page in EPT01.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protection {
    /// The page stays writable.
    Impossible,
    /// The page was read-only already. No processor that has taken part in this flush has a writable translation of it.
    Already(u64),
    /// The page is read-only from now on. No processor that has taken part in this flush has a writable translation of
    /// it.
    New(u64),
}

/// Why the machine cannot go on.
#[derive(Clone, Copy, Debug)]
pub enum Stop {
    /// A VMX abort: the guest hypervisor's VMCS is at fault.
    VmxAbort(VmxAbort),
    /// The budget of tables has none left for an EPT02, and nothing can be dropped.
    NoTables,
}

/// A logical processor and its surroundings, as the nested logic uses them. A machine may hold more than the parts that
/// have types here.
///
/// No method fails, except as its documentation says.
pub trait Machine: Sized {
    /// General-purpose registers by number. The element of RSP, whose value is in the VMCS, holds all ones.
    type Registers: IndexMut<usize, Output = u64>;
    /// The VMCSs.
    type Vmcss: VmcsPair;
    /// The guest hypervisor's memory.
    type Memory: WatchedMemory;
    /// The tables of EPT01 and EPT02.
    type Tables: TableMemory;

    /// INVEPT.
    fn invept(&self, what: Invept);
    /// INVVPID.
    fn invvpid(&self, what: Invvpid);
    /// RDMSR on a guest's behalf; nothing if that is #GP.
    fn read_msr(&self, msr: u32) -> Option<u64>;
    /// WRMSR on a guest's behalf; `None` if it causes #GP. The caller does not pass MSRs that the host emulates.
    fn write_msr(&self, msr: u32, value: u64) -> Option<()>;
    /// IN or OUT of a guest's to a port that the host looks at: `value` is what the guest writes. Returns what it
    /// reads.
    fn access_port(&self, access: IoAccess, value: u32) -> u32;
    /// PKRU of the guest.
    fn pkru(&self) -> u32;
    /// Sets CR2 of the guest.
    fn set_cr2(&self, address: u64);
    /// Sets DR6.BT of the guest: a task switch causes #DB.
    fn note_task_switch_trap(&self);

    /// EPT01.
    fn ept01(&self) -> Eptp01;
    /// Maps the surroundings of an address in EPT01. Returns whether EPT01 did not map it before.
    ///
    /// # Errors
    ///
    /// `tables` is exhausted.
    fn map_beyond(&self, tables: &mut Self::Tables, address: Gpa) -> Result<bool, OutOfTables>;
    /// Maps an address that EPT01 does not map to a page of no consequence, without a new table.
    fn map_to_nothing(&self, address: Gpa);
    /// Assigns a slot of `watches` to a page and makes the page read-only in EPT01, if `wanted` and possible.
    fn protect(&self, tables: &mut Self::Tables, watches: &Watches, page: Gpa, wanted: bool) -> (usize, Protection);
    /// Whether all processors have taken part in a flush.
    fn all_have_flushed(&self, flush: u64) -> bool;
    /// Notes that this processor has taken part in a flush.
    fn note_flush(&self, flush: u64);

    /// Whether the INIT that made a guest exit is the host's own, which another processor sent to interrupt this one.
    fn take_kick(&self) -> bool;
    /// Requests a call of [`super::nmi::pass_on`] before the next VM entry.
    fn request_nmi(&self);
    /// Whether the guest hypervisor has not started this processor.
    fn waits_for_sipi(&self) -> bool;
    /// Sends this processor an INIT that was blocked, so that it arrives after the next VM entry. Returns whether it
    /// was sent.
    fn send_init_to_self(&self) -> bool;

    /// Counts an exit that the guest hypervisor gets.
    fn count_reflected(&self, reason: ExitReason);
    /// Counts a VMREAD or VMWRITE that exited, where these are counted.
    fn count_field_access(&self, encoding: u64, access: Access);
    /// Logs a warning of an event that a guest can repeat at will.
    fn warn(&self, line: fmt::Arguments<'_>);
    /// Stops the machine.
    fn stop(&self, why: Stop) -> !;
}
