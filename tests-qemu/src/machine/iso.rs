//! Boot images: GRUB on an ISO 9660 file system.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::files::BOOT_ISO;
use super::{Boot, Machine, Module};
use crate::command;

/// GRUB says what it cannot do on the console that the runner follows.
const GRUB_PREAMBLE: &str = "serial --unit=0 --speed=115200\nterminal_output serial\n";

/// Makes [`BOOT_ISO`] below `dir`, which boots what `machine` boots.
pub fn make(machine: &Machine, dir: &Path, grub_mkrescue: &Path) -> Result<()> {
    let tree = dir.join("iso");
    let grub = tree.join("boot/grub");
    fs::create_dir_all(&grub)?;
    let mut files = Files { tree: &tree, count: 0 };
    let tables = acpi_table(machine, &mut files)?;
    let config = [GRUB_PREAMBLE, &tables, &config(machine, &mut files)?].concat();
    fs::write(grub.join("grub.cfg"), config)?;
    let iso = dir.join(BOOT_ISO);
    command::output(
        Command::new(grub_mkrescue).args(["--directory=/usr/lib/grub/i386-pc", "--output"]).arg(iso).arg(&tree),
    )
    .context("cannot make the boot image")?;
    Ok(fs::remove_dir_all(tree)?)
}

/// The ISO's tree: files get short names, so that no host path needs quoting.
struct Files<'a> {
    tree: &'a Path,
    count: usize,
}

impl Files<'_> {
    fn add(&mut self, file: &Path) -> Result<String> {
        let name = format!("/file{}", self.count);
        self.count += 1;
        fs::copy(file, self.tree.join(&name[1..])).with_context(|| format!("cannot read {}", file.display()))?;
        Ok(name)
    }
}

/// The line that puts the machine's own list of processors in place of the firmware's.
fn acpi_table(machine: &Machine, files: &mut Files<'_>) -> Result<String> {
    let Some(madt) = &machine.madt else { return Ok(String::new()) };
    let name = files.add(madt)?;
    Ok(format!("acpi --exclude=APIC {name}\n"))
}

fn config(machine: &Machine, files: &mut Files<'_>) -> Result<String> {
    let mut text = String::new();
    match &machine.boot {
        Boot::L1hv { host, guest } => {
            let host = Module { args: machine.host_arguments(host), ..host.clone() };
            line(&mut text, "multiboot", &host, files)?;
            for module in guest {
                line(&mut text, "module", module, files)?;
            }
        }
        Boot::Multiboot { kernel, modules } => {
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
    }
    text.push_str("boot\n");
    Ok(text)
}

fn line(text: &mut String, verb: &str, module: &Module, files: &mut Files<'_>) -> Result<()> {
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

/// `word` as GRUB's script language reads it back: in single quotes nothing is special but the quote.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
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
        fs::create_dir_all(&tree).unwrap();
        let source = tree.join("source");
        fs::write(&source, "content").unwrap();
        let boot = Boot::L1hv {
            host: Module::with_args(&source, "log=debug"),
            guest: vec![Module::with_args(&source, "quiet"), Module::new(&source)],
        };
        let mut files = Files { tree: &tree, count: 0 };
        let text = config(&Machine::new("iso", BOCHS, boot), &mut files).unwrap();
        let expected = "multiboot /file0 'triple-fault=stop' 'log=debug'\nmodule /file1 'quiet'\nmodule /file2\nboot\n";
        assert_eq!(text, expected);
        fs::remove_dir_all(tree).unwrap();
    }
}
