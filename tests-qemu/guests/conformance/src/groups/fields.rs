//! Every encoding of 15 bits read and written (SDM 25.11.2, 31.3 "VMREAD", "VMWRITE").

use core::fmt;

use shadow::encoding::{Encoding, Width};

use crate::cpu::{vmread, vmwrite};
use crate::fault::Outcome;
use crate::memory::VMCS;
use crate::output::Suite;
use crate::vm::load_fresh;

const PATTERN: u64 = 0x0123_4567_89ab_cdef;

/// Runs one case for each encoding, then some beyond 15 bits.
pub fn run(suite: &mut Suite) {
    load_fresh(&VMCS);
    for encoding in 0..0x8000 {
        suite.case(format_args!("{encoding:#06x}"), Field(encoding));
    }
    for encoding in [0x8000, 0x1_681e, 0x4000_681e, 0x8000_681e, 0xffff_ffff, 1 << 32 | 0x681e, 1 << 63 | 0x681e] {
        suite.case(format_args!("{encoding:#x}"), Field(encoding));
    }
    for encoding in [0x4400, 0x4402, 0x6400, 0x640a, 0x2400, 0x2401] {
        suite.case(format_args!("read-only-{encoding:#x}"), vmwrite(encoding, 0));
    }
}

/// The results of reading and writing by an encoding. They leave the field 0.
struct Field(u64);

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let read = vmread(self.0).err().unwrap_or(Outcome::Success);
        let written = vmwrite(self.0, u64::MAX);
        write!(f, "r={read} w={written}")?;
        if read != Outcome::Success || written != Outcome::Success {
            return Ok(());
        }
        self.value(f)?;
        let _ = vmwrite(self.0, PATTERN);
        self.value(f)?;
        if Encoding(self.0 as u32).width() == Width::W64 {
            let other = self.0 ^ 1;
            write!(f, " other={:#x}", vmread(other).unwrap_or(0))?;
            let _ = vmwrite(other, PATTERN >> 8);
            self.value(f)?;
            let _ = vmwrite(other, 0);
        }
        let _ = vmwrite(self.0, 0);
        self.value(f)
    }
}

impl Field {
    fn value(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, " {:#x}", vmread(self.0).unwrap_or(u64::MAX))
    }
}
