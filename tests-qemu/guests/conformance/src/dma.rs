//! With the argument `dma`, on a QEMU with `-machine q35 -device intel-iommu -device edu`: what a device reaches that
//! moves memory as its driver tells it (QEMU, docs/specs/edu). First its driver's own memory, then a host's, and the
//! registers of the unit that keeps it from there.

use core::arch::x86_64::__cpuid_count;
use core::ops::Range;

use guest_abi::port::{inl, outl};
use protocol::statistics;
use shadow::fields::EPT_POINTER;

use crate::arguments::reserved_memory;
use crate::memory::{FAR_FROM_THE_IMAGE, peek, poke};
use crate::minimal::enter_vmx_operation;
use crate::output::{power_off, print};
use crate::vm::Vm;
use crate::{attempt, code, nested_paging};

/// The argument.
pub const WORD: &str = "dma";

/// Where QEMU's chipset has the registers of its unit.
const UNIT: u64 = 0xfed9_0000;
/// Its global command register. 0 switches translation off.
const UNIT_COMMAND: u64 = UNIT + 0x18;

/// Bytes of a transfer, a few words.
const BYTES: u64 = 64;

fn read(address: u64) -> u32 {
    // SAFETY: all memory below 4 GiB is mapped to itself, and what is read has no effect when it is.
    unsafe { core::ptr::with_exposed_provenance::<u32>(address as usize).read_volatile() }
}

fn write(address: u64, value: u32) {
    // SAFETY: as for `read`; callers name registers of devices.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(address as usize).write_volatile(value) }
}

/// The device, by the address of its registers.
struct Edu(u64);

impl Edu {
    const ID: u32 = 0x11e8_1234;
    const BUFFER: u64 = 0x4_0000;

    /// Finds it on bus 0, and permits it to access memory.
    fn find() -> Option<Self> {
        const COMMAND: u32 = 4;
        const MEMORY_AND_MASTER: u32 = 0b110;
        const BASE: u32 = 0x10;
        let device = (0..32).find(|&device| configuration(device, 0) == Self::ID)?;
        let command = configuration(device, COMMAND);
        outl(0xcfc, command & 0xffff | MEMORY_AND_MASTER);
        print(format_args!("{WORD}: device 00:{device:02x}.0"));
        Some(Self(u64::from(configuration(device, BASE) & !0xf)))
    }

    /// Moves [`BYTES`] between memory and the device's buffer.
    fn transfer(&self, address: u64, to_memory: bool) {
        const SOURCE: u64 = 0x80;
        const DESTINATION: u64 = 0x88;
        const COUNT: u64 = 0x90;
        const COMMAND: u64 = 0x98;
        const START: u32 = 1;
        const TO_MEMORY: u32 = 2;
        let (from, to) = if to_memory { (Self::BUFFER, address) } else { (address, Self::BUFFER) };
        write(self.0 + SOURCE, from as u32);
        write(self.0 + DESTINATION, to as u32);
        write(self.0 + COUNT, BYTES as u32);
        write(self.0 + COMMAND, if to_memory { START | TO_MEMORY } else { START });
        while read(self.0 + COMMAND) & START != 0 {
            core::hint::spin_loop();
        }
        // Where there is a host, it looks for blocked transfers.
        let _ = __cpuid_count(statistics::LEAF, statistics::SUBLEAF);
    }

    /// Fills the device's buffer with a word.
    fn fill(&self, word: u64) {
        words(FAR_FROM_THE_IMAGE).for_each(|at| poke(at, word));
        self.transfer(FAR_FROM_THE_IMAGE, false);
    }

    /// The words that the device finds at an address.
    fn words_at(&self, address: u64) -> [u64; (BYTES / 8) as usize] {
        const COPY: u64 = FAR_FROM_THE_IMAGE + 0x1000;
        self.transfer(address, false);
        self.transfer(COPY, true);
        core::array::from_fn(|number| peek(COPY + 8 * number as u64))
    }
}

/// Dword `register` of a device's configuration, which also selects it for a write.
fn configuration(device: u32, register: u32) -> u32 {
    outl(0xcf8, 1 << 31 | device << 11 | register);
    inl(0xcfc)
}

fn words(at: u64) -> impl Iterator<Item = u64> {
    (at..at + BYTES).step_by(8)
}

/// Tries, and switches the machine off.
pub fn run() -> ! {
    const PATTERN: u64 = 0x5a5a_1234_5678_a5a5;
    let Some(edu) = Edu::find() else {
        print(format_args!("{WORD}: no device"));
        power_off()
    };
    firmware_table();
    let is_hidden = read(UNIT) == u32::MAX;
    print(format_args!("{WORD}: the unit's registers are hidden: {is_hidden}"));
    edu.fill(PATTERN);
    let own = edu.words_at(FAR_FROM_THE_IMAGE);
    print(format_args!("{WORD}: own memory moves: {}", own == [PATTERN; (BYTES / 8) as usize]));

    let Some(Range { start, end }) = reserved_memory() else {
        print(format_args!("{WORD}: no host"));
        power_off()
    };
    // Each way to switch the unit off comes before the transfers that it must block. A unit that is there would do what
    // it is told.
    if is_hidden {
        edu.fill(0);
        edu.transfer(UNIT_COMMAND & !0x3f, true);
        write(UNIT_COMMAND, 0);
        print(format_args!("{WORD}: VMXON: {}", enter_vmx_operation()));
        print(format_args!("{WORD}: VMPTRST to the unit: {}", attempt!("vmptrst [rcx]"; in("rcx") UNIT_COMMAND)));
        // The unit's version would be an entry that is not present; ones are a misconfigured one.
        let mut vm = Vm::new(code!("nop"));
        vm.set(EPT_POINTER, nested_paging::eptp() & 0xfff | UNIT);
        print(format_args!("{WORD}: EPT12 at the unit: {}", vm.run()));
    }
    let code = edu.words_at(start);
    let is_read = code.iter().any(|word| ![0, u64::MAX].contains(word));
    print(format_args!("{WORD}: the host's first bytes are read: {is_read}"));
    // A host with few tables does not use its last page.
    let last = end - 0x1000;
    edu.fill(PATTERN);
    edu.transfer(last, true);
    edu.fill(0);
    let is_written = edu.words_at(last).contains(&PATTERN);
    print(format_args!("{WORD}: the host's last bytes are written: {is_written}"));
    print(format_args!("{WORD}: done"));
    power_off()
}

/// Looks for the table that names the unit, as an operating system does.
fn firmware_table() {
    let is_root_pointer =
        |at: &u64| read(*at) == u32::from_le_bytes(*b"RSD ") && read(at + 4) == u32::from_le_bytes(*b"PTR ");
    let Some(pointer) = (0xe_0000..0x10_0000).step_by(16).find(is_root_pointer) else {
        return print(format_args!("{WORD}: no ACPI"));
    };
    let root = u64::from(read(pointer + 16));
    let length = u64::from(read(root + 4));
    let mut tables = (36..length).step_by(4).map(|at| read(u64::from(read(root + at))));
    let has_unit = tables.any(|signature| signature == u32::from_le_bytes(*b"DMAR"));
    let byte = |at: u64| (read(at & !3) >> (8 * (at % 4))) as u8;
    let sum = (root..root + length).fold(0_u8, |sum, at| sum.wrapping_add(byte(at)));
    print(format_args!("{WORD}: {} tables, one is the unit's: {has_unit}, sum {sum}", (length - 36) / 4));
}
