//! Linux on a machine: which images it comes in, and the arguments that make it quick and repeatable.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};

use crate::machine::Emulator;

/// What kind of image a file holds, by its own header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageKind {
    /// A Linux bzImage.
    BzImage,
    /// An image with a multiboot 1 header.
    Multiboot,
    /// Neither.
    Unknown,
}

/// A multiboot header lies in this many bytes from the beginning.
const MULTIBOOT_SEARCH: u64 = 8192;
const MULTIBOOT_MAGIC: u32 = 0x1bad_b002;

impl ImageKind {
    /// Reads the beginning of the file at `path`.
    pub fn of(path: &Path) -> Result<Self> {
        let mut head = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MULTIBOOT_SEARCH).read_to_end(&mut head))
            .with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self::of_head(&head))
    }

    fn of_head(head: &[u8]) -> Self {
        if head.get(0x202..0x206) == Some(b"HdrS") {
            return Self::BzImage;
        }
        let is_magic = |word: &[u8]| word == MULTIBOOT_MAGIC.to_le_bytes();
        if head.chunks_exact(4).any(is_magic) { Self::Multiboot } else { Self::Unknown }
    }
}

/// Arguments for a Linux whose console is the machine's. Without the mitigations, boots are shorter and
/// instruction counts comparable with the published baseline.
pub fn default_args(emulator: &dyn Emulator, ips: u64) -> String {
    // A panic ends in a triple fault, which every machine reports at once.
    let args = "console=ttyS0 panic=-1 reboot=t idle=halt no_timer_check tsc=reliable mitigations=off nopti random.trust_cpu=on";
    // The calibration against emulated timers would find the same.
    emulator.tsc_khz(ips).map_or_else(|| args.to_owned(), |khz| format!("{args} tsc_early_khz={khz}"))
}

/// Arguments for a Linux on a machine of which nothing is known: its console is a screen, and COM1 where there is one. What they leave out of
/// Linux, [`default_args`] do too.
pub const PC_ARGUMENTS: &str =
    "console=tty0 console=ttyS0,115200 tsc=reliable mitigations=off nopti random.trust_cpu=on";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_told_apart_by_their_headers() {
        let mut linux = vec![0; 0x300];
        linux[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(ImageKind::of_head(&linux), ImageKind::BzImage);
        let mut multiboot = vec![0; 64];
        multiboot[16..20].copy_from_slice(&MULTIBOOT_MAGIC.to_le_bytes());
        assert_eq!(ImageKind::of_head(&multiboot), ImageKind::Multiboot);
        assert_eq!(ImageKind::of_head(&[0; 64]), ImageKind::Unknown);
    }
}
