//! Debian's Xen as guest hypervisor, with a Linux as its first domain that makes others.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::build::GuestPrograms;
use crate::guest;
use crate::layout::Layout;
use crate::machine::{Boot, Module};
use crate::provision::{Kernel, Provisioned, Xen};

const INIT: &str = include_str!("../guests/xen-init.sh");

/// Applets of busybox that the init calls.
const APPLETS: &[&str] = &["sh", "mount", "mkdir", "cat", "echo", "grep", "insmod", "ln", "poweroff", "sleep", "uname"];

/// Programs of Xen's, in its own directory.
const PROGRAMS: &[&str] = &["xl", "xenstored", "xenconsoled", "xen-init-dom0"];

/// Modules of the first domain's kernel.
const MODULES: &[&str] = &["xen-evtchn", "xen-gntdev", "xen-privcmd", "xenfs"];

const ARGUMENTS: &str = "com1=115200,8n1 console=com1 dom0_mem=1024M,max:1024M noreboot guest_loglvl=all";
const GUEST_ARGUMENTS: &str = "panic=-1 mitigations=off quiet";
const FIRST_DOMAIN_ARGUMENTS: &str = "console=hvc0 panic=-1 mitigations=off quiet";

/// The program that gives an HVM guest its devices, and what it and the firmware loader read.
const DEVICE_MODEL: &str = "usr/libexec/xen-qemu-system-i386";
const DEVICE_MODEL_DATA: &[&str] = &["usr/share/qemu/keymaps/en-us", "usr/share/seabios/bios-256k.bin"];

/// A guest that the first domain makes.
#[derive(Debug, Clone, Copy)]
pub struct XenGuest {
    /// Its name.
    pub name: &'static str,
    /// Its kind.
    pub kind: XenGuestKind,
    /// Its processors.
    pub cpus: u32,
}

/// The kind of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XenGuestKind {
    /// Linux, without emulated devices and without firmware.
    Pvh,
    /// A PC, with SeaBIOS, and devices of QEMU's: a disk, whose boot sector prints what the BIOS tells of memory.
    Hvm,
}

impl XenGuest {
    fn configuration(self) -> String {
        let Self { name, kind, cpus } = self;
        let kind = match kind {
            XenGuestKind::Pvh => format!(
                "type = \"pvh\"\nkernel = \"/guests/bzImage\"\nramdisk = \"/guests/initrd\"\n\
                 extra = \"console=hvc0 {GUEST_ARGUMENTS}\"\n"
            ),
            XenGuestKind::Hvm => format!(
                "type = \"hvm\"\ndevice_model_version = \"qemu-xen\"\ndevice_model_override = \"/{DEVICE_MODEL}\"\n\
                 vga = \"none\"\nnographic = 1\nvnc = 0\nusb = 0\nserial = \"file:/var/log/xen/guest-{name}.log\"\n\
                 device_model_args = [\"-hda\", \"/guests/sector.img\"]\nboot = \"c\"\n"
            ),
        };
        format!(
            "name = \"{name}\"\n{kind}memory = 256\nvcpus = {cpus}\non_reboot = \"destroy\"\non_crash = \"destroy\"\n"
        )
    }
}

/// Xen and what it loads, as the boot loader gets them.
#[derive(Debug, Clone)]
pub struct XenHypervisor {
    image: Module,
    modules: Vec<Module>,
}

impl XenHypervisor {
    /// Writes the first domain's root file system. Its guests run `kernel`.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn prepare(
        layout: &Layout,
        provisioned: &Provisioned,
        (xen, kernel): (&Xen, &Kernel),
        programs: &GuestPrograms,
        guests: &[XenGuest],
    ) -> Result<Self> {
        let mut initrd = guest::base(&provisioned.busybox, INIT, APPLETS)?;
        initrd.directory("sys");
        initrd.file("etc/xen/xl.conf", 0o644, b"");
        guest::add_modules(&mut initrd, &xen.kernel, MODULES)?;
        for program in PROGRAMS {
            let file = xen.root.join("usr/lib/xen-4.17/bin").join(program);
            initrd.program(&file, &xen.root, &xen.libraries())?;
        }
        // Threads load it when they end.
        initrd.program(&xen.root.join("lib/x86_64-linux-gnu/libgcc_s.so.1"), &xen.root, &xen.libraries())?;
        initrd.copy("usr/lib/xen-4.17/boot/hvmloader", 0o644, &xen.root.join("usr/lib/xen-4.17/boot/hvmloader"))?;
        initrd.program(&xen.root.join(DEVICE_MODEL), &xen.root, &xen.libraries())?;
        for file in DEVICE_MODEL_DATA {
            let unpacked = xen.root.join(file);
            let source = if unpacked.is_file() { unpacked } else { Path::new("/").join(file) };
            initrd.copy(file, 0o644, &source)?;
        }
        for guest in guests {
            initrd.file(&format!("guests/{}.cfg", guest.name), 0o644, guest.configuration().as_bytes());
        }
        let dir = layout.root().join("initrds");
        fs::create_dir_all(&dir)?;
        initrd.copy("guests/bzImage", 0o644, &kernel.image)?;
        let file_system = guest::nested_linux(&provisioned.busybox)?.finish();
        initrd.file("guests/initrd", 0o644, &file_system);
        initrd.copy("guests/sector.img", 0o644, &programs.sector_disk)?;
        let file = dir.join("xen");
        guest::write_atomically(&file, &initrd.finish())?;
        Ok(Self {
            image: Module::with_args(&xen.hypervisor, ARGUMENTS).named(),
            modules: vec![
                Module::with_args(&xen.kernel.image, FIRST_DOMAIN_ARGUMENTS).named(),
                Module::new(file).named(),
            ],
        })
    }

    /// Boots Xen on the machine itself.
    pub fn on_bare_machine(self) -> Boot {
        Boot::Multiboot { kernel: self.image, modules: self.modules }
    }

    /// Boots Xen under l1hv.
    pub fn under(self, host: Module) -> Boot {
        Boot::L1hv { host, guest: std::iter::once(self.image).chain(self.modules).collect() }
    }
}
