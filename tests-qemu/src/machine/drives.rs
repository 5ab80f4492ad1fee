//! Disks and CDs of a machine, besides the CD that it boots an image from.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::Machine;

/// The most drives: an IDE controller has room for four, and one may hold the CD that the machine boots.
pub const MOST_DRIVES: usize = 3;

/// A drive with a medium.
#[derive(Debug, Clone)]
pub struct Drive {
    /// The image.
    pub file: PathBuf,
    /// Its kind.
    pub kind: DriveKind,
}

/// The kind of a drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriveKind {
    /// A disk, which the machine may write to.
    Disk,
    /// A CD.
    Cdrom,
}

/// The format of a disk's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// Sector after sector.
    Raw,
    /// QEMU's.
    Qcow2,
}

impl DiskFormat {
    /// The format of the image in `file`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn of(file: &Path) -> Result<Self> {
        const QCOW2: &[u8] = b"QFI\xfb";
        let mut head = Vec::new();
        File::open(file)
            .and_then(|image| image.take(QCOW2.len() as u64).read_to_end(&mut head))
            .with_context(|| format!("cannot read {}", file.display()))?;
        Ok(if head == QCOW2 { Self::Qcow2 } else { Self::Raw })
    }
}

impl Machine {
    /// Its drives.
    ///
    /// # Errors
    /// When there are too many.
    pub(super) fn checked_drives(&self) -> Result<&[Drive]> {
        if self.drives.len() > MOST_DRIVES {
            bail!("{} disks and CDs: a machine has room for {MOST_DRIVES}", self.drives.len());
        }
        Ok(&self.drives)
    }
}
