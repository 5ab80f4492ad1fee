//! How the machine is put to sleep: the registers of the FADT (ACPI 6.5, 5.2.9 "Fixed ACPI Description Table") and the
//! value in them that switches it off, which the object \_S5 names (7.4.2.6 "\_S5 (System \_S5 State)").
//!
//! From other sleeping states the firmware resumes at an address of the guest's, outside the host, with all memory as it
//! was.

use arrayvec::ArrayVec;

use super::tables::{TABLE_HEADER_BYTES, each, table_length};
use crate::phys::{OutOfRange, PhysMemory};

/// The most control registers: PM1a and PM1b, in their old and new places, and the one of reduced hardware.
pub const MOST_REGISTERS: usize = 5;

/// In the byte of a control register: enter the sleeping state.
const SLP_EN: u8 = 1 << 5;
/// In the byte of a status register: the machine has woken up.
const WAK_STS: u8 = 1 << 7;

/// The bytes of a control register and of its status register that matter, as ports. Both bytes have their bits in the
/// same places in the registers of old hardware, in their upper halves, and in those of reduced hardware.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SleepRegister {
    /// With SLP_TYP and SLP_EN.
    pub control: u16,
    /// With WAK_STS, if there is one.
    pub status: Option<u16>,
    /// The SLP_TYP that switches the machine off, if that is known.
    pub off: Option<u8>,
}

/// All of them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SleepControl {
    registers: ArrayVec<SleepRegister, MOST_REGISTERS>,
}

/// What is made of a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written {
    /// What goes to the port.
    pub value: u32,
    /// The sleeping state that was asked for and that this withholds, as SLP_TYP.
    pub denied: Option<u8>,
    /// It says that the guest has seen WAK_STS.
    pub clears_wake_status: bool,
}

impl SleepControl {
    /// What the machine at this root pointer has. Empty if it has none of these registers as ports.
    ///
    /// # Errors
    ///
    /// A table lies where there is no memory.
    pub fn find(memory: &impl PhysMemory, rsdp: u64) -> Result<Self, OutOfRange> {
        let (mut fadt, mut off) = (None, None);
        each(memory, rsdp, |signature, table| {
            match &signature {
                b"FACP" => fadt = Some(table),
                b"SSDT" if off.is_none() => off = soft_off(memory, table)?,
                _ => (),
            }
            Ok(())
        })?;
        let Some(fadt) = fadt else { return Ok(Self::default()) };
        if let Some(of_dsdt) = dsdt(memory, fadt)? {
            off = soft_off(memory, of_dsdt)?.or(off);
        }
        Ok(Self { registers: registers(memory, fadt, off)? })
    }

    /// The ports whose accesses matter.
    pub fn ports(&self) -> impl Iterator<Item = u16> + '_ {
        self.registers.iter().flat_map(|register| [Some(register.control), register.status]).flatten()
    }

    /// Whether anything switches the machine off.
    pub fn knows_off(&self) -> bool {
        self.registers.iter().any(|register| register.off.is_some())
    }

    /// A guest writes the lowest `bytes` of `value` to `port`.
    pub fn write(&self, port: u16, bytes: u8, value: u32) -> Written {
        let mut written = Written { value, denied: None, clears_wake_status: false };
        for number in 0..u16::from(bytes) {
            let shift = 8 * u32::from(number);
            let (at, byte) = (port.wrapping_add(number), (value >> shift) as u8);
            for register in &self.registers {
                let kind = byte >> 2 & 7;
                if register.control == at && byte & SLP_EN != 0 && register.off != Some(kind) {
                    written.denied = Some(kind);
                    written.value &= !(u32::from(SLP_EN) << shift);
                }
                written.clears_wake_status |= register.status == Some(at) && byte & WAK_STS != 0;
            }
        }
        written
    }

    /// What a guest reads that reads `bytes` at `port`, where the machine has `value`, after a sleep that was denied.
    pub fn read_after_denial(&self, port: u16, bytes: u8, value: u32) -> u32 {
        (0..u16::from(bytes)).fold(value, |value, number| {
            let at = port.wrapping_add(number);
            let is_status = self.registers.iter().any(|register| register.status == Some(at));
            if is_status { value | u32::from(WAK_STS) << (8 * number) } else { value }
        })
    }
}

/// Offsets of fields of the FADT.
mod fadt {
    pub const DSDT: u64 = 40;
    /// PM1a and PM1b: event blocks, whose first half is the status register, and control blocks.
    pub const EVENTS: [u64; 2] = [56, 60];
    pub const CONTROLS: [u64; 2] = [64, 68];
    pub const X_DSDT: u64 = 140;
    /// The same as generic addresses.
    pub const X_EVENTS: [u64; 2] = [148, 160];
    pub const X_CONTROLS: [u64; 2] = [172, 184];
    /// Of reduced hardware.
    pub const SLEEP_CONTROL: u64 = 244;
    pub const SLEEP_STATUS: u64 = 256;
}

fn dsdt(memory: &impl PhysMemory, fadt: u64) -> Result<Option<u64>, OutOfRange> {
    let is_long = u64::from(table_length(memory, fadt)?) >= fadt::X_DSDT + 8;
    let wide = if is_long { memory.read_u64(fadt + fadt::X_DSDT)? } else { 0 };
    let dsdt = if wide != 0 { wide } else { memory.read_u32(fadt + fadt::DSDT)?.into() };
    Ok((dsdt != 0).then_some(dsdt))
}

fn registers(
    memory: &impl PhysMemory,
    fadt: u64,
    off: Option<[u8; 2]>,
) -> Result<ArrayVec<SleepRegister, MOST_REGISTERS>, OutOfRange> {
    let length = u64::from(table_length(memory, fadt)?);
    let old = |offset| -> Result<Option<u16>, OutOfRange> {
        let port = if length >= offset + 4 { memory.read_u32(fadt + offset)? } else { 0 };
        Ok(u16::try_from(port).ok().filter(|&port| port != 0))
    };
    let generic = |offset| if length >= offset + 12 { generic_port(memory, fadt + offset) } else { Ok(None) };
    let mut found = ArrayVec::new();
    let mut add = |register: SleepRegister| {
        if found.iter().all(|other: &SleepRegister| other.control != register.control) {
            found.push(register);
        }
    };
    let upper = |port: u16| port.wrapping_add(1);
    for block in 0..2 {
        let off = off.map(|types| types[block]);
        let events = [old(fadt::EVENTS[block])?, generic(fadt::X_EVENTS[block])?];
        let controls = [old(fadt::CONTROLS[block])?, generic(fadt::X_CONTROLS[block])?];
        for (control, event) in controls.into_iter().zip(events) {
            let status = event.or(events[0]).or(events[1]).map(upper);
            if let Some(control) = control {
                add(SleepRegister { control: upper(control), status, off });
            }
        }
    }
    if let Some(control) = generic(fadt::SLEEP_CONTROL)? {
        let status = generic(fadt::SLEEP_STATUS)?;
        add(SleepRegister { control, status, off: off.map(|types| types[0]) });
    }
    Ok(found)
}

/// The port that a generic address names (ACPI 6.5, 5.2.3.2 "Generic Address Structure"), if it names one.
fn generic_port(memory: &impl PhysMemory, at: u64) -> Result<Option<u16>, OutOfRange> {
    const SYSTEM_IO: u32 = 1;
    let space = memory.read_u32(at)? & 0xff;
    let address = memory.read_u64(at + 4)?;
    Ok(u16::try_from(address).ok().filter(|&port| space == SYSTEM_IO && port != 0))
}

/// Both values of the object \_S5 in the definition block of a table, if that has one.
fn soft_off(memory: &impl PhysMemory, table: u64) -> Result<Option<[u8; 2]>, OutOfRange> {
    const CHUNK: u64 = 1024;
    /// The longest encoding of what is looked for.
    const OBJECT: u64 = 32;
    let end = table + u64::from(table_length(memory, table)?);
    let mut at = table + TABLE_HEADER_BYTES;
    while at < end {
        let mut bytes = [0; (CHUNK + OBJECT) as usize];
        let bytes = &mut bytes[..(end - at).min(CHUNK + OBJECT) as usize];
        memory.read(at, bytes)?;
        let starts = 0..bytes.len().min(CHUNK as usize);
        if let Some(found) = starts.into_iter().find_map(|start| soft_off_at(&bytes[start..])) {
            return Ok(Some(found));
        }
        at += CHUNK;
    }
    Ok(None)
}

/// The object at the start of a definition block's bytes: a name, and a package of at least two small numbers (ACPI 6.5,
/// 20.2 "AML Grammar Definition").
fn soft_off_at(bytes: &[u8]) -> Option<[u8; 2]> {
    const NAME_OP: u8 = 0x08;
    const PACKAGE_OP: u8 = 0x12;
    let after = bytes.strip_prefix(&[NAME_OP])?;
    let after = after.strip_prefix(b"\\").unwrap_or(after);
    let after = after.strip_prefix(b"_S5_")?.strip_prefix(&[PACKAGE_OP])?;
    let length_bytes = usize::from(after.first()? >> 6) + 1;
    let (&elements, after) = after.get(length_bytes..)?.split_first()?;
    let (first, after) = small_number(after)?;
    // What a package leaves out is 0.
    let second = if elements > 1 { small_number(after)?.0 } else { 0 };
    (elements > 0).then_some([first & 7, second & 7])
}

/// A number of at most a byte, and what comes after it.
fn small_number(bytes: &[u8]) -> Option<(u8, &[u8])> {
    const ONE_OP: u8 = 0x01;
    const BYTE_PREFIX: u8 = 0x0a;
    const WORD_PREFIX: u8 = 0x0b;
    const DWORD_PREFIX: u8 = 0x0c;
    let (&kind, after) = bytes.split_first()?;
    let bytes = match kind {
        0 | ONE_OP => return Some((kind, after)),
        BYTE_PREFIX => 1,
        WORD_PREFIX => 2,
        DWORD_PREFIX => 4,
        _ => return None,
    };
    Some((*after.first()?, after.get(bytes..)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::fixtures::{machine_with, table};
    use std::vec::Vec;

    const DSDT: u64 = 0x7000;

    /// A FADT of this length with registers in the old places.
    fn fadt(length: usize, fields: &[(u64, u64)]) -> Vec<u8> {
        let mut body = std::vec![0; length - 36];
        for &(offset, value) in fields {
            let at = offset as usize - 36;
            let bytes = value.to_le_bytes();
            let count = bytes.len().min(body.len() - at);
            body[at..at + count].copy_from_slice(&bytes[..count]);
        }
        table(b"FACP", 36, &body)
    }

    fn definitions(aml: &[u8]) -> Vec<u8> {
        table(b"DSDT", 36, aml)
    }

    const S5: &[u8] = b"junk_S5_\x08_S3_\x12\x06\x04\x01\x01\x00\x00\x08_S5_\x12\x08\x04\x0a\x07\x0a\x05\x00\x00";

    fn find(fadt: &[u8], aml: &[u8]) -> SleepControl {
        let memory = machine_with(&[(0x6000, fadt), (DSDT, &definitions(aml))], &[0x6000]);
        SleepControl::find(&memory, crate::acpi::fixtures::RSDP).unwrap()
    }

    /// PM1a at 1804H and PM1b at 1904H, with events at 1800H; an old table.
    fn old() -> Vec<u8> {
        fadt(116, &[(40, DSDT), (56, 0x1800), (64, 0x1804 | 0x1904 << 32)])
    }

    #[test]
    fn only_the_value_of_s5_goes_through() {
        let control = find(&old(), S5);
        let ports: Vec<u16> = control.ports().collect();
        assert_eq!(ports, [0x1805, 0x1801, 0x1905]);
        assert!(control.knows_off());
        let passes = |port, bytes, value| {
            let written = control.write(port, bytes, value);
            (written.value, written.denied)
        };
        let word = |kind: u32| kind << 10 | 1 << 13 | 1;
        assert_eq!(passes(0x1804, 2, word(7)), (word(7), None), "S5");
        assert_eq!(passes(0x1904, 2, word(5)), (word(5), None), "S5 of the other block");
        assert_eq!(passes(0x1804, 2, word(5)), (5 << 10 | 1, Some(5)));
        assert_eq!(passes(0x1804, 2, word(1)), (1 << 10 | 1, Some(1)));
        assert_eq!(passes(0x1805, 1, 1 << 2 | 1 << 5), (1 << 2, Some(1)));
        assert_eq!(passes(0x1802, 4, word(1) << 16), (1 << 26 | 1 << 16, Some(1)), "among other registers");
        assert_eq!(passes(0x1804, 2, 1 << 10), (1 << 10, None), "without SLP_EN");
        assert_eq!(passes(0x1804, 1, 1 << 5), (1 << 5, None), "the lower half is another matter");
        assert_eq!(passes(0xffff, 2, 0xffff), (0xffff, None));
    }

    #[test]
    fn after_a_denial_the_machine_seems_to_have_woken_up() {
        let control = find(&old(), S5);
        assert_eq!(control.read_after_denial(0x1800, 2, 1), 0x8001);
        assert_eq!(control.read_after_denial(0x1801, 1, 0), 0x80);
        assert_eq!(control.read_after_denial(0x1804, 2, 1), 1);
        assert!(control.write(0x1800, 2, 0x8000).clears_wake_status);
        assert!(!control.write(0x1800, 2, 0x7fff).clears_wake_status);
    }

    #[test]
    fn new_tables_have_generic_addresses_which_may_be_no_ports() {
        let io = |port: u64| (1 | 16 << 8, port);
        let mut fields = std::vec![(140, DSDT)];
        for (offset, (space, port)) in [(148, io(0x400)), (172, io(0x404)), (184, (0, 0x404)), (244, io(0x509))] {
            fields.extend([(offset, space), (offset + 4, port)]);
        }
        let control = find(&fadt(268, &fields), S5);
        let ports: Vec<u16> = control.ports().collect();
        assert_eq!(ports, [0x405, 0x401, 0x509]);
        assert_eq!(control.write(0x509, 1, 7 << 2 | 1 << 5).denied, None);
        assert_eq!(control.write(0x509, 1, 5 << 2 | 1 << 5).denied, Some(5));
    }

    #[test]
    fn a_machine_without_s5_never_sleeps_and_one_without_a_fadt_has_no_registers() {
        let control = find(&old(), b"\x08_S3_\x12\x06\x04\x01\x01\x00\x00");
        assert!(!control.knows_off());
        assert_eq!(control.write(0x1804, 2, 1 << 13).denied, Some(0));
        let memory = machine_with(&[(0x6000, &table(b"HPET", 36, &[]))], &[0x6000]);
        assert_eq!(SleepControl::find(&memory, crate::acpi::fixtures::RSDP), Ok(SleepControl::default()));
    }

    #[test]
    fn the_object_may_lie_across_chunks_or_end_the_table() {
        for before in 1000..1040 {
            let mut aml = std::vec![0xff; before];
            aml.extend(b"\x08\\_S5_\x12\x06\x02\x0b\x06\x00\x01");
            assert_eq!(find(&old(), &aml).write(0x1804, 2, 6 << 10 | 1 << 13).denied, None, "{before}");
            aml.pop();
            assert!(!find(&old(), &aml).knows_off());
        }
    }
}
