//! Debian's Xen as guest hypervisor, with a Linux as its first domain that makes others.

use std::fs;

use anyhow::Result;

use crate::guest;
use crate::initrd::Initrd;
use crate::layout::Layout;
use crate::machine::{Boot, Module};
use crate::provision::{Kernel, Provisioned, Xen};

const INIT: &str = include_str!("../guests/xen-init.sh");
const GUEST_INIT: &str = include_str!("../guests/nested-init.sh");

/// Applets of busybox that both inits call.
const APPLETS: &[&str] =
    &["sh", "mount", "mkdir", "cat", "echo", "grep", "insmod", "ln", "poweroff", "reboot", "sleep", "uname"];

/// Programs of Xen's, in its own directory.
const PROGRAMS: &[&str] = &["xl", "xenstored", "xenconsoled", "xen-init-dom0"];

/// Modules of the first domain's kernel.
const MODULES: &[&str] = &["xen-evtchn", "xen-gntdev", "xen-privcmd", "xenfs"];

const ARGUMENTS: &str = "com1=115200,8n1 console=com1 dom0_mem=1024M,max:1024M noreboot";
const FIRST_DOMAIN_ARGUMENTS: &str = "console=hvc0 panic=-1 mitigations=off quiet";

/// A guest that the first domain makes.
#[derive(Debug, Clone, Copy)]
pub struct XenGuest {
    /// Its name.
    pub name: &'static str,
    /// Its processors.
    pub cpus: u32,
}

impl XenGuest {
    fn configuration(self) -> String {
        let Self { name, cpus } = self;
        format!(
            "name = \"{name}\"\ntype = \"pvh\"\nmemory = 256\nvcpus = {cpus}\nkernel = \"/guests/bzImage\"\n\
             ramdisk = \"/guests/initrd\"\nextra = \"console=hvc0 panic=-1 mitigations=off quiet\"\n\
             on_reboot = \"destroy\"\non_crash = \"destroy\"\n"
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
        xen: &Xen,
        kernel: &Kernel,
        guests: &[XenGuest],
    ) -> Result<Self> {
        let mut initrd = guest::base(&provisioned.busybox, INIT, APPLETS)?;
        initrd.directory("sys");
        guest::add_modules(&mut initrd, &xen.kernel, MODULES)?;
        for program in PROGRAMS {
            let file = xen.root.join("usr/lib/xen-4.17/bin").join(program);
            initrd.program(&file, &xen.root, &xen.libraries())?;
        }
        // Threads load it when they end.
        initrd.program(&xen.root.join("lib/x86_64-linux-gnu/libgcc_s.so.1"), &xen.root, &xen.libraries())?;
        for guest in guests {
            initrd.file(&format!("guests/{}.cfg", guest.name), 0o644, guest.configuration().as_bytes());
        }
        initrd.copy("guests/bzImage", 0o644, &kernel.image)?;
        initrd.file("guests/initrd", 0o644, &guest_file_system(provisioned)?.finish());
        let file = layout.root().join("initrds").join("xen");
        fs::create_dir_all(layout.root().join("initrds"))?;
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

fn guest_file_system(provisioned: &Provisioned) -> Result<Initrd> {
    guest::base(&provisioned.busybox, GUEST_INIT, APPLETS)
}
