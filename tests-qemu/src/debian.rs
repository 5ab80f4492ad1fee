//! Debian on a disk, as it is installed: systemd, QEMU, and GRUB for a BIOS and for EFI firmware.
//!
//! ```text
//!   MBR, GRUB's core   0 .. 1 MiB
//!   partition 1        FAT: EFI/BOOT/BOOTX64.EFI, boot/grub/grub.cfg, l1hv
//!   partition 2        ext4: Debian
//! ```

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;
use crate::guest;
use crate::layout::Layout;
use crate::progress::Progress;
use crate::provision::{self, Provisioned};

const TEST: &str = include_str!("../guests/debian-test.sh");
const SERVICE: &str = include_str!("../guests/debian-test.service");

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
const FAT: std::ops::Range<u64> = MIB..65 * MIB;
const ROOT_START: u64 = FAT.end;
const ROOT_MIB: u64 = 1400;

/// The modules of GRUB's core.
const MODULES: &[&str] =
    &["part_msdos", "fat", "ext2", "normal", "configfile", "serial", "terminal", "linux", "boot", "echo", "test"];

/// What the disk's GRUB does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grub {
    /// It boots Debian.
    Debian,
    /// It boots l1hv with Debian as its guest, by this version of multiboot.
    L1hv {
        /// 1 or 2.
        multiboot: u32,
        /// Debian's arguments besides the usual ones.
        arguments: &'static str,
    },
}

impl Grub {
    fn script(self) -> String {
        const DEBIAN: &str =
            "root=/dev/sda2 rw console=ttyS0 panic=-1 reboot=t mitigations=off random.trust_cpu=on quiet";
        const DISK: &str = "(hd0,msdos2)";
        let boot = match self {
            Self::Debian => format!("linux {DISK}/vmlinuz {DEBIAN}\ninitrd {DISK}/initrd.img\n"),
            Self::L1hv { multiboot, arguments } => {
                let version = if multiboot == 1 { "" } else { "2" };
                format!(
                    "multiboot{version} (hd0,msdos1)/l1hv triple-fault=stop\n\
                     module{version} {DISK}/vmlinuz {DEBIAN} {arguments}\nmodule{version} {DISK}/initrd.img\n"
                )
            }
        };
        format!("serial --unit=0 --speed=115200\nterminal_output serial\n{boot}boot\n")
    }
}

/// Makes a disk, or finds it as it was made before, and gives it this script of GRUB's.
///
/// # Errors
/// When a program fails: making Debian needs root.
pub fn disk(
    layout: &Layout,
    provisioned: &Provisioned,
    l1hv: &Path,
    grub: Grub,
    progress: &Progress,
) -> Result<PathBuf> {
    let dir = layout.root().join("debian");
    fs::create_dir_all(&dir)?;
    let root = provision::debian(layout, progress)?;
    let step = progress.step("making a disk with Debian");
    configure(&root, provisioned)?;
    let disk = dir.join("disk.img");
    let image = File::create(&disk)?;
    image.set_len(ROOT_START + ROOT_MIB * MIB)?;
    command::output(
        Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-O", "^metadata_csum_seed,^orphan_file", "-d"])
            .arg(&root)
            .args(["-E", &format!("offset={ROOT_START}")])
            .arg(&disk)
            .arg(format!("{ROOT_MIB}M")),
    )?;
    write_boot_code(&disk, &dir)?;
    fill_fat(&disk, &dir, l1hv, grub)?;
    step.done();
    Ok(disk)
}

/// Adds the test, as a package would.
fn configure(root: &Path, provisioned: &Provisioned) -> Result<()> {
    let write = |path: &str, content: &[u8]| {
        fs::write(root.join(path), content).with_context(|| format!("cannot write {path} of the disk"))
    };
    write("etc/hostname", b"debian\n")?;
    write("etc/fstab", b"/dev/sda2 / ext4 defaults 0 1\n")?;
    write("usr/local/bin/debian-test", TEST.as_bytes())?;
    command::output(Command::new("chmod").arg("755").arg(root.join("usr/local/bin/debian-test")))?;
    write("etc/systemd/system/debian-test.service", SERVICE.as_bytes())?;
    let wanted = root.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wanted)?;
    let link = wanted.join("debian-test.service");
    if !link.is_symlink() {
        symlink("/etc/systemd/system/debian-test.service", link)?;
    }
    let initrd = guest::nested_linux(&provisioned.busybox)?.finish();
    write("nested-initrd", &initrd)
}

/// The MBR with its table of partitions, and GRUB's core behind it, where the MBR's code looks for it.
fn write_boot_code(disk: &Path, dir: &Path) -> Result<()> {
    const CODE_BYTES: usize = 440;
    const TABLE: usize = 446;
    let core = dir.join("core.img");
    make_core("i386-pc", &["biosdisk", "multiboot"], &core)?;
    let mut mbr = fs::read("/usr/lib/grub/i386-pc/boot.img").context("GRUB's boot.img is not here")?;
    mbr[CODE_BYTES..].fill(0);
    let partitions = [(0x80, 0xef, FAT), (0, 0x83, ROOT_START..ROOT_START + ROOT_MIB * MIB)];
    for (number, (flag, kind, range)) in partitions.into_iter().enumerate() {
        let [start, count] =
            [range.start, range.end - range.start].map(|bytes| ((bytes / SECTOR) as u32).to_le_bytes());
        let entry = [&[flag, 0xfe, 0xff, 0xff, kind, 0xfe, 0xff, 0xff][..], &start, &count].concat();
        mbr[TABLE + number * entry.len()..][..entry.len()].copy_from_slice(&entry);
    }
    mbr[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut file = fs::OpenOptions::new().write(true).open(disk)?;
    file.write_all(&mbr)?;
    file.seek(SeekFrom::Start(SECTOR))?;
    Ok(file.write_all(&fs::read(core)?)?)
}

fn fill_fat(disk: &Path, dir: &Path, l1hv: &Path, grub: Grub) -> Result<()> {
    let (application, script) = (dir.join("BOOTX64.EFI"), dir.join("grub.cfg"));
    make_core("x86_64-efi", &["multiboot2", "all_video"], &application)?;
    fs::write(&script, grub.script())?;
    let part = format!("{}@@{}", disk.display(), FAT.start);
    let tool = |program: &str, arguments: &[&Path]| {
        command::output(Command::new(program).arg("-i").arg(&part).args(arguments)).map(|_| ())
    };
    let sectors = ((FAT.end - FAT.start) / SECTOR).to_string();
    tool("mformat", &["-F", "-T", &sectors, "::"].map(Path::new))?;
    tool("mmd", &["::/EFI", "::/EFI/BOOT", "::/boot", "::/boot/grub"].map(Path::new))?;
    tool("mcopy", &[&application, Path::new("::/EFI/BOOT/BOOTX64.EFI")])?;
    tool("mcopy", &[&script, Path::new("::/boot/grub/grub.cfg")])?;
    tool("mcopy", &[l1hv, Path::new("::/l1hv")])
}

fn make_core(format: &str, modules: &[&str], output: &Path) -> Result<()> {
    command::output(
        Command::new("grub-mkimage")
            .args(["--format", format, "--prefix=(hd0,msdos1)/boot/grub", "--output"])
            .arg(output)
            .args(MODULES)
            .args(modules),
    )?;
    Ok(())
}
