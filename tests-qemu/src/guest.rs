//! The guest hypervisor: a Debian kernel, its KVM modules, and a root file system with the work to do.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::build::GuestPrograms;
use crate::initrd::Initrd;
use crate::layout::Layout;
use crate::linux;
use crate::machine::{Boot, ChosenEmulator, Module};
use crate::provision::{Kernel, Provisioned};

const INIT: &str = include_str!("../guests/init.sh");
const NESTED_INIT: &str = include_str!("../guests/nested-init.sh");

/// The module that the guest hypervisor loads, together with the modules that it depends on.
pub const KVM_MODULE: &str = "kvm-intel";

/// Applets of busybox that the init scripts of guests call.
const APPLETS: &[&str] =
    &["sh", "mount", "cat", "grep", "insmod", "poweroff", "reboot", "uname", "sleep", "tail", "tee"];

/// Arguments of the nested guest's kernel: no hardware but the console, the clock and the reset port.
const NESTED_ARGUMENTS: &str = "console=ttyS0 reboot=p panic=-1 pci=off i8042.noaux i8042.nokbd \
     no_timer_check tsc=reliable mitigations=off nopti random.trust_cpu=on 8250.nr_uarts=1 quiet";

/// With one processor the 8259s suffice. With several, ACPI tables describe the local APICs and the I/O APIC.
const ONE_PROCESSOR: &str = " acpi=off noapic";

/// Memory of a nested Linux.
const NESTED_MEMORY_MIB: u32 = 256;

/// Memory of a guest hypervisor that runs under KVM.
const GUEST_HYPERVISOR_MEMORY_MIB: u32 = 768;

/// A Linux that the guest hypervisor boots.
struct NestedLinux {
    initrd: Vec<u8>,
    arguments: String,
    memory_mib: u32,
}

/// The work of the guest hypervisor before it switches the machine off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// Nothing.
    BootOnly,
    /// Runs the bare-metal payload.
    Payload,
    /// Boots Linux as nested guest.
    Linux,
    /// Runs the payload, then boots Linux.
    Demo,
    /// Boots a guest hypervisor of the same kernel, which does the work of `demo`: KVM is then the nesting hypervisor.
    Nest,
    /// Boots a guest hypervisor of the same kernel, which does the work of `payload`.
    NestPayload,
    /// Takes processors offline and online again while a nested Linux runs.
    Hotplug,
    /// Boots Linux while it is busy itself.
    Clocks,
    /// Boots Linux, then resets the machine as the kernel's `reboot=` says; the second boot does nothing.
    Reboot,
    /// Runs the minimal guest hypervisor with its nested guest: KVM is the nesting hypervisor.
    Minimal,
}

impl Work {
    /// Its name on the runner's command line and on the guest hypervisor's.
    fn name(self) -> String {
        self.to_possible_value().expect("no work is hidden from the command line").get_name().to_owned()
    }

    fn nests_linux(self) -> bool {
        matches!(self, Self::Linux | Self::Demo | Self::Hotplug | Self::Clocks | Self::Reboot)
            || self.of_nested_hypervisor().is_some()
    }

    /// The work of the nested Linux if it is a guest hypervisor itself.
    fn of_nested_hypervisor(self) -> Option<Self> {
        match self {
            Self::Nest => Some(Self::Demo),
            Self::NestPayload => Some(Self::Payload),
            Self::BootOnly
            | Self::Payload
            | Self::Linux
            | Self::Demo
            | Self::Hotplug
            | Self::Clocks
            | Self::Reboot
            | Self::Minimal => None,
        }
    }
}

/// Whether KVM uses EPT for its guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmEpt {
    /// `ept=1`.
    On,
    /// `ept=0`: shadow page tables.
    Off,
}

impl fmt::Display for KvmEpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::On => "ept=1",
            Self::Off => "ept=0",
        })
    }
}

/// Kernel and initrd of the guest hypervisor, as the boot loader gets them.
#[derive(Debug, Clone)]
pub struct GuestHypervisor {
    /// The kernel with its command line.
    pub kernel: Module,
    /// Its root file system.
    pub initrd: PathBuf,
}

impl GuestHypervisor {
    /// Boots the guest hypervisor on the machine itself.
    pub fn on_bare_machine(self) -> Boot {
        Boot::Linux { kernel: self.kernel, initrds: vec![self.initrd] }
    }

    /// Boots the guest hypervisor under l1hv.
    pub fn under(self, host: Module) -> Boot {
        Boot::L1hv { host, guest: vec![self.kernel, Module::new(self.initrd)] }
    }
}

/// The plan of a guest hypervisor; see [`Plan::new`].
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// Its work.
    pub work: Work,
    /// With or without EPT. If KVM is the nesting hypervisor, that KVM uses EPT, and this setting is the guest
    /// hypervisor's.
    pub ept: KvmEpt,
    /// Other parameters of kvm-intel, `NAME=VALUE`.
    pub parameters: &'a [&'a str],
    /// Processors of a nested Linux. With several, it and the guest hypervisor run the parallel workload.
    pub nested_cpus: u32,
    /// How often each of them runs the workload.
    pub parallel_times: u32,
    /// Whether the payload repeats all operations with the emulator's marks.
    pub counted: bool,
    /// How the payload's results are shown, besides the lines for the runner.
    pub shown: Option<Shown<'a>>,
}

/// The payload's results on screen and serial port.
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a> {
    /// The system that the results belong to: a word.
    pub system: &'a str,
    /// How long the guest hypervisor stays before it switches the machine off.
    pub linger_seconds: u32,
}

impl<'a> Plan<'a> {
    /// A plan with KVM's defaults and nested guests of one processor.
    pub const fn new(kernel: &'a Kernel, work: Work, ept: KvmEpt) -> Self {
        Self { kernel, work, ept, parameters: &[], nested_cpus: 1, parallel_times: 1, counted: false, shown: None }
    }

    /// Writes the root file system and composes the command line.
    pub fn prepare(
        &self,
        layout: &Layout,
        provisioned: &Provisioned,
        programs: &GuestPrograms,
        emulator: ChosenEmulator,
        ips: u64,
    ) -> Result<GuestHypervisor> {
        self.prepare_with(layout, provisioned, programs, &linux::default_args(emulator, ips))
    }

    /// As [`Self::prepare`], with these kernel arguments before those of the init.
    pub fn prepare_with(
        &self,
        layout: &Layout,
        provisioned: &Provisioned,
        programs: &GuestPrograms,
        arguments: &str,
    ) -> Result<GuestHypervisor> {
        let dir = layout.root().join("initrds");
        fs::create_dir_all(&dir)?;
        let Self { nested_cpus, parallel_times, .. } = self;
        let initrd = dir.join(format!("{}-{}-{nested_cpus}-{parallel_times}", self.kernel.series, self.work.name()));
        write_atomically(&initrd, &self.file_system(provisioned, programs)?)?;
        let ept = if self.work.of_nested_hypervisor().is_some() { KvmEpt::On } else { self.ept };
        let mut args = format!("{arguments} quiet l1hv.run={} l1hv.{ept}", self.work.name());
        for parameter in self.parameters {
            args += &format!(" l1hv.kvm={parameter}");
        }
        args += self.counted_argument();
        if let Some(Shown { system, linger_seconds }) = self.shown {
            args += &format!(" l1hv.show={system} l1hv.linger={linger_seconds}");
        }
        Ok(GuestHypervisor { kernel: Module::with_args(&self.kernel.image, args), initrd })
    }

    fn file_system(&self, provisioned: &Provisioned, programs: &GuestPrograms) -> Result<Vec<u8>> {
        let mut initrd = base(&provisioned.busybox, INIT, APPLETS)?;
        initrd.directory("sys");
        initrd.copy("bin/vmm", 0o755, &programs.vmm)?;
        initrd.copy("payload", 0o644, &programs.payload)?;
        self.add_parallel(&mut initrd, programs)?;
        add_modules(&mut initrd, self.kernel, &[KVM_MODULE])?;
        if self.work == Work::Minimal {
            initrd.copy("minimal", 0o644, &programs.conformance)?;
        }
        if self.work.nests_linux() {
            let nested = self.nested(provisioned, programs)?;
            initrd.copy("nested/bzImage", 0o644, &self.kernel.image)?;
            initrd.file("nested/initrd", 0o644, &nested.initrd);
            initrd.file("nested/arguments", 0o644, nested.arguments.as_bytes());
            initrd.file("nested/memory", 0o644, nested.memory_mib.to_string().as_bytes());
            initrd.file("nested/cpus", 0o644, self.nested_cpus.to_string().as_bytes());
        }
        Ok(initrd.finish())
    }

    fn add_parallel(&self, initrd: &mut Initrd, programs: &GuestPrograms) -> Result<()> {
        if self.nested_cpus > 1 {
            initrd.copy("bin/parallel", 0o755, &programs.parallel)?;
            initrd.file("times", 0o644, self.parallel_times.to_string().as_bytes());
        }
        Ok(())
    }

    fn counted_argument(&self) -> &'static str {
        if self.counted { " l1hv.counted" } else { "" }
    }

    fn nested(&self, provisioned: &Provisioned, programs: &GuestPrograms) -> Result<NestedLinux> {
        let one_processor = if self.nested_cpus == 1 { ONE_PROCESSOR } else { "" };
        let arguments = format!("{NESTED_ARGUMENTS}{one_processor}");
        let Some(work) = self.work.of_nested_hypervisor() else {
            let mut initrd = nested_linux(&provisioned.busybox)?;
            self.add_parallel(&mut initrd, programs)?;
            return Ok(NestedLinux { initrd: initrd.finish(), arguments, memory_mib: NESTED_MEMORY_MIB });
        };
        let inner = Plan { work, parameters: &[], nested_cpus: 1, ..*self };
        Ok(NestedLinux {
            initrd: inner.file_system(provisioned, programs)?,
            arguments: format!(
                "{arguments} l1hv.run={} l1hv.{} l1hv.end=reset{}",
                inner.work.name(),
                self.ept,
                self.counted_argument()
            ),
            memory_mib: GUEST_HYPERVISOR_MEMORY_MIB,
        })
    }
}

/// The root file system of a nested Linux, which greets and resets its machine.
pub fn nested_linux(busybox: &Path) -> Result<Initrd> {
    base(busybox, NESTED_INIT, APPLETS)
}

/// A root file system with busybox and some of its applets, a console and `init`.
pub fn base(busybox: &Path, init: &str, applets: &[&str]) -> Result<Initrd> {
    let mut initrd = Initrd::default();
    initrd.character_device("dev/console", 5, 1);
    initrd.directory("proc");
    initrd.copy("bin/busybox", 0o755, busybox)?;
    for applet in applets {
        initrd.symlink(&format!("bin/{applet}"), "busybox");
    }
    initrd.file("init", 0o755, init.as_bytes());
    Ok(initrd)
}

/// Writes a file at once: tests make the same file side by side, and no reader may see a part of it.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let temporary = path.with_extension(format!("{:?}", std::thread::current().id()));
    fs::write(&temporary, content).with_context(|| format!("cannot write {}", temporary.display()))?;
    Ok(fs::rename(temporary, path)?)
}

/// A kernel module, decompressed.
#[derive(Debug)]
struct KernelModule {
    name: String,
    content: Vec<u8>,
}

/// Adds modules of `kernel` and those that they depend on. The shell lists them in the order of their names:
/// dependencies first.
pub fn add_modules(initrd: &mut Initrd, kernel: &Kernel, names: &[&str]) -> Result<()> {
    for (index, module) in modules(kernel, names)?.iter().enumerate() {
        initrd.file(&format!("modules/{index:02}-{}.ko", module.name), 0o644, &module.content);
    }
    Ok(())
}

/// Modules of `kernel`, each after those that it depends on.
fn modules(kernel: &Kernel, names: &[&str]) -> Result<Vec<KernelModule>> {
    let mut ordered = Vec::new();
    for name in names {
        add_module(kernel, name, &mut ordered)?;
    }
    Ok(ordered)
}

fn add_module(kernel: &Kernel, name: &str, ordered: &mut Vec<KernelModule>) -> Result<()> {
    if ordered.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let file =
        find(&kernel.modules, name).with_context(|| format!("kernel {} has no module {name}", kernel.release))?;
    let content = read_module(&file)?;
    for dependency in dependencies(&content) {
        add_module(kernel, &dependency, ordered)?;
    }
    ordered.push(KernelModule { name: name.to_owned(), content });
    Ok(())
}

/// Finds a module's file; `-` and `_` are the same in module names.
fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    let canonical = |name: &str| name.replace('_', "-");
    let mut entries: Vec<PathBuf> = fs::read_dir(dir).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    entries.sort();
    entries.into_iter().find_map(|path| {
        if path.is_dir() && !path.is_symlink() {
            return find(&path, name);
        }
        let file = path.file_name()?.to_string_lossy().into_owned();
        let (stem, extension) = file.split_once('.')?;
        (extension.starts_with("ko") && canonical(stem) == canonical(name)).then_some(path)
    })
}

fn read_module(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz").arg("-dc").arg(file).output().context("cannot start xz")?;
        anyhow::ensure!(output.status.success(), "xz cannot unpack {}", file.display());
        return Ok(output.stdout);
    }
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// The names in the `depends=` entry of a module's `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_init_scripts_say_the_words_that_the_runner_reads() {
        assert!(INIT.contains(guest_abi::RESULT_PREFIX) && INIT.contains(guest_abi::NESTED_INIT));
        assert!(NESTED_INIT.contains(guest_abi::NESTED_INIT));
    }

    #[test]
    fn a_modules_dependencies_are_read_from_its_modinfo() {
        let module = b"license=GPL\0depends=kvm,irqbypass\0retpoline=Y\0";
        assert_eq!(dependencies(module), ["kvm", "irqbypass"]);
        assert!(dependencies(b"license=GPL\0depends=\0").is_empty());
    }
}
