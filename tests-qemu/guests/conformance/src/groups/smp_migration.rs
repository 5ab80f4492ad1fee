//! A VMCS that moves between processors, and one EPT12, one VPID12 and one set of bitmaps that several processors use
//! (SDM 25.1 "Overview": VMCLEAR ends a VMCS's use on one processor before VMPTRLD begins it on another; 29.4 "Caching
//! Translation Information").

mod together;
mod traveller;

use crate::output::Suite;
use crate::smp::Processors;

/// Runs all cases.
pub fn run(suite: &mut Suite, processors: &Processors) {
    traveller::run(suite, processors);
    together::run(suite, processors);
}
