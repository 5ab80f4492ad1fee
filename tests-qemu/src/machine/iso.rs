//! Boot images: GRUB on an ISO 9660 file system.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::files::BOOT_ISO;
use super::{Boot, Firmware, Machine, Module};
use crate::command::{self, quoted};

/// GRUB's script, where it looks for it.
const GRUB_CONFIG: &str = "boot/grub/grub.cfg";

/// GRUB prints its errors on the console that the runner follows.
const GRUB_PREAMBLE: &str = "serial --unit=0 --speed=115200\nterminal_output serial\n";

/// A menu appears on the screen, and on COM1 if the machine has it. The kernel gets the screen in text mode.
const MENU_PREAMBLE: &str = "if serial --unit=0 --speed=115200; then\n  terminal_input console serial\n  \
     terminal_output console serial\nfi\nset gfxpayload=text\n";

/// What GRUB is to run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Platform {
    Bios,
    Efi,
    /// Either, and the script finds out.
    Any,
}

impl Platform {
    const fn of(firmware: Firmware) -> Self {
        match firmware {
            Firmware::Bios => Self::Bios,
            Firmware::Uefi => Self::Efi,
        }
    }

    /// Lines that come first.
    const fn preamble(self) -> &'static str {
        match self {
            Self::Bios => "",
            Self::Efi => "insmod all_video\n",
            Self::Any => "if [ \"$grub_platform\" = efi ]; then\n  insmod all_video\n  version=2\nfi\n",
        }
    }

    /// The end of the names of the commands for multiboot images: EFI needs multiboot 2.
    const fn version(self) -> &'static str {
        match self {
            Self::Bios => "",
            Self::Efi => "2",
            Self::Any => "$version",
        }
    }

    /// The directory of GRUB's modules, if not all of them are wanted.
    const fn directory(self) -> Option<&'static str> {
        match self {
            Self::Bios => Some("/usr/lib/grub/i386-pc"),
            Self::Efi => Some("/usr/lib/grub/x86_64-efi"),
            Self::Any => None,
        }
    }
}

/// Makes [`BOOT_ISO`] below `dir`, which boots the image of `machine`.
pub fn make(machine: &Machine, dir: &Path, grub_mkrescue: &Path) -> Result<()> {
    let iso = dir.join(BOOT_ISO);
    if let Boot::Iso(file) = &machine.boot {
        fs::copy(file, iso).with_context(|| format!("cannot read {}", file.display()))?;
        return Ok(());
    }
    let tree = dir.join("iso");
    let mut files = Files::new(&tree, Platform::of(machine.firmware))?;
    let tables = acpi_table(machine, &mut files)?;
    let commands = commands(&machine.boot, &|host| machine.host_arguments(host), &mut files)?;
    let platform = files.platform.preamble();
    pack(files, &[GRUB_PREAMBLE, platform, &tables, &commands, "boot\n"].concat(), &iso, grub_mkrescue)
}

/// Several images to choose from.
#[derive(Debug)]
pub struct Menu {
    /// Waiting time before the first entry boots.
    pub seconds: u32,
    /// The entries.
    pub entries: Vec<Entry>,
}

/// A line of the menu.
#[derive(Debug)]
pub struct Entry {
    /// Its text.
    pub title: String,
    /// The image that it boots.
    pub boot: Boot,
}

impl Menu {
    /// Writes an ISO with this menu, which boots from USB too, by a BIOS or by EFI firmware, to `output`.
    ///
    /// # Errors
    /// When a file cannot be read or written, or GRUB's tools fail.
    pub fn make(&self, output: &Path, grub_mkrescue: &Path) -> Result<()> {
        let mut files = Files::new(&output.with_extension("tree"), Platform::Any)?;
        let config = self.config(&mut files)?;
        pack(files, &config, output, grub_mkrescue)
    }

    /// Writes an EFI application with this menu and all files to `output`.
    ///
    /// # Errors
    /// As for [`Self::make`].
    pub fn make_efi(&self, output: &Path, grub_mkstandalone: &Path) -> Result<()> {
        let mut files = Files::new(&output.with_extension("tree"), Platform::Efi)?;
        let config = self.config(&mut files)?;
        fs::write(files.tree.join(GRUB_CONFIG), config)?;
        let names = (0..files.added.len()).map(|number| format!("file{number}")).chain([GRUB_CONFIG.to_owned()]);
        command::output(
            Command::new(grub_mkstandalone)
                .args(["--format=x86_64-efi", "--output"])
                .arg(output)
                .args(files.platform.directory().map(|directory| format!("--directory={directory}")))
                .args(names.map(|name| format!("{name}={}", files.tree.join(&name).display()))),
        )
        .context("cannot make the EFI application")?;
        Ok(fs::remove_dir_all(files.tree)?)
    }

    fn config(&self, files: &mut Files) -> Result<String> {
        let mut text = format!("{MENU_PREAMBLE}{}set timeout={}\n", files.platform.preamble(), self.seconds);
        for Entry { title, boot } in &self.entries {
            let commands = commands(boot, &|host| host.args.clone(), files)?;
            write!(text, "menuentry {} {{\n{commands}}}\n", quoted(title))?;
        }
        Ok(text)
    }
}

/// Makes the image of all `files` and removes their tree.
fn pack(files: Files, config: &str, output: &Path, grub_mkrescue: &Path) -> Result<()> {
    fs::write(files.tree.join(GRUB_CONFIG), config)?;
    command::output(
        Command::new(grub_mkrescue)
            .args(files.platform.directory().map(|directory| format!("--directory={directory}")))
            .arg("--output")
            .arg(output)
            .arg(&files.tree),
    )
    .context("cannot make the boot image")?;
    Ok(fs::remove_dir_all(files.tree)?)
}

/// The ISO's tree. Files get short names, so that no host path needs quoting.
struct Files {
    platform: Platform,
    tree: PathBuf,
    added: Vec<PathBuf>,
}

impl Files {
    fn new(tree: &Path, platform: Platform) -> Result<Self> {
        let directory = tree.join("boot/grub");
        fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        Ok(Self { platform, tree: tree.to_owned(), added: Vec::new() })
    }

    /// Adds a file, unless it is there already. Returns its name.
    fn add(&mut self, file: &Path) -> Result<String> {
        if let Some(number) = self.added.iter().position(|added| added == file) {
            return Ok(format!("/file{number}"));
        }
        let name = format!("/file{}", self.added.len());
        fs::copy(file, self.tree.join(&name[1..])).with_context(|| format!("cannot read {}", file.display()))?;
        self.added.push(file.to_owned());
        Ok(name)
    }
}

/// The line that replaces the firmware's list of processors by the machine's own.
fn acpi_table(machine: &Machine, files: &mut Files) -> Result<String> {
    let Some(madt) = &machine.madt else { return Ok(String::new()) };
    let name = files.add(madt)?;
    Ok(format!("acpi --exclude=APIC {name}\n"))
}

/// The lines that load the images.
fn commands(boot: &Boot, host_arguments: &dyn Fn(&Module) -> String, files: &mut Files) -> Result<String> {
    let mut text = String::new();
    let version = files.platform.version();
    match boot {
        Boot::L1hv { host, guest } => {
            let [multiboot, load] = ["multiboot", "module"].map(|verb| format!("{verb}{version}"));
            let host = Module { args: host_arguments(host), ..host.clone() };
            line(&mut text, &multiboot, &host, files)?;
            for module in guest {
                line(&mut text, &load, module, files)?;
            }
        }
        Boot::Multiboot { kernel, modules } => {
            // Images for multiboot 1 are all that a bare machine boots.
            line(&mut text, "multiboot", kernel, files)?;
            for module in modules {
                line(&mut text, "module", module, files)?;
            }
        }
        Boot::Linux { kernel, initrds } => {
            line(&mut text, "linux", kernel, files)?;
            let names: Vec<String> = initrds.iter().map(|file| files.add(file)).collect::<Result<_>>()?;
            if !names.is_empty() {
                writeln!(text, "initrd {}", names.join(" "))?;
            }
        }
        Boot::Disk => bail!("a disk needs no ISO"),
        Boot::Iso(file) => bail!("{} cannot be loaded from another ISO", file.display()),
    }
    Ok(text)
}

fn line(text: &mut String, verb: &str, module: &Module, files: &mut Files) -> Result<()> {
    let name = files.add(&module.file)?;
    write!(text, "{verb} {name}")?;
    if module.named {
        let file =
            std::path::absolute(&module.file).with_context(|| format!("cannot name {}", module.file.display()))?;
        write!(text, " {}", quoted(&file.display().to_string()))?;
    }
    for word in module.args.split_whitespace() {
        write!(text, " {}", quoted(word))?;
    }
    text.push('\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::BOCHS;

    #[test]
    fn words_with_special_characters_reach_the_kernel_as_they_are() {
        assert_eq!(quoted("a=$b;c"), "'a=$b;c'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    #[test]
    fn l1hv_gets_the_guest_and_its_files_as_modules() {
        let tree = std::env::temp_dir().join(format!("l1hv-iso-{}", std::process::id()));
        let mut files = Files::new(&tree, Platform::Bios).unwrap();
        let source = tree.join("source");
        fs::write(&source, "content").unwrap();
        let other = tree.join("other");
        fs::write(&other, "content").unwrap();
        let boot = Boot::L1hv {
            host: Module::with_args(&source, "log=debug"),
            guest: vec![Module::with_args(&other, "quiet"), Module::new(&source)],
        };
        let machine = Machine::new("iso", BOCHS, boot.clone());
        let text = commands(&boot, &|host| machine.host_arguments(host), &mut files).unwrap();
        let expected = "multiboot /file0 'triple-fault=stop' 'log=debug'\nmodule /file1 'quiet'\nmodule /file0\n";
        assert_eq!(text, expected);
        files.platform = Platform::Any;
        let menu = Menu { seconds: 7, entries: vec![Entry { title: "it's".into(), boot }] };
        let text = menu.config(&mut files).unwrap();
        let entry = "set timeout=7\nmenuentry 'it'\\''s' {\nmultiboot$version /file0 'log=debug'\nmodule$version /file1 'quiet'\nmodule$version /file0\n}\n";
        assert!(text.ends_with(entry), "{text}");
        fs::remove_dir_all(tree).unwrap();
    }
}
