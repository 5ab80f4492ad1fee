//! Reading physical memory: the boot loader's and the firmware's structures.

use core::fmt;

/// A structure claims to lie where there is no memory to read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfRange {
    /// The first address.
    pub address: u64,
    /// The number of bytes.
    pub length: u64,
}

impl fmt::Display for OutOfRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at physical {:#x} cannot be read", self.length, self.address)
    }
}

impl core::error::Error for OutOfRange {}

/// Physical memory from which bytes can be copied.
pub trait PhysMemory {
    /// Fills `buffer` from physical `address`.
    ///
    /// # Errors
    ///
    /// The range is not all readable; `buffer`'s content is then unspecified.
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), OutOfRange>;

    /// Reads a little-endian 32-bit word.
    ///
    /// # Errors
    ///
    /// As for [`PhysMemory::read`].
    fn read_u32(&self, address: u64) -> Result<u32, OutOfRange> {
        let mut bytes = [0; 4];
        self.read(address, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Reads a little-endian 64-bit word.
    ///
    /// # Errors
    ///
    /// As for [`PhysMemory::read`].
    fn read_u64(&self, address: u64) -> Result<u64, OutOfRange> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// Memory for tests: `bytes` at physical `base`, and nothing elsewhere.
#[cfg(test)]
#[derive(Clone, Debug)]
pub(crate) struct FakePhys {
    pub base: u64,
    pub bytes: std::vec::Vec<u8>,
}

#[cfg(test)]
impl PhysMemory for FakePhys {
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), OutOfRange> {
        let error = OutOfRange { address, length: buffer.len() as u64 };
        let start = address.checked_sub(self.base).ok_or(error)? as usize;
        let end = start.checked_add(buffer.len()).ok_or(error)?;
        buffer.copy_from_slice(self.bytes.get(start..end).ok_or(error)?);
        Ok(())
    }
}
