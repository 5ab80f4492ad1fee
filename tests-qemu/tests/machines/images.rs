//! Images that start and end as the multiboot 1 test images of other projects do: the same with and without l1hv.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use tests_qemu::machine::{Boot, Machine, Module, Outcome};

use crate::context::{Context, Finished, Test};

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "a_test_image_finds_under_l1hv_what_it_finds_on_the_bare_machine", run: same_findings },
        Test { name: "a_test_images_code_is_the_outcome_of_the_run", run: verdict },
        Test { name: "a_test_image_that_ends_by_triple_fault_ends_so_under_l1hv_too", run: triple_fault },
    ]
}

/// Writes the image as a 32-bit ELF file, which most loaders need, next to the 64-bit original.
fn as_elf_32(context: &Context) -> Result<PathBuf> {
    let converted = context.layout.root().join("test-image.elf32");
    let original = fs::read(&context.programs.test_image)?;
    fs::write(&converted, elf_32_of(&original).context("the test image is not what the linker makes")?)?;
    Ok(converted)
}

/// A 64-bit ELF file preceded by 32-bit headers: an ELF header and program headers, as a loader needs them and as
/// `objcopy --output-target elf32-i386` makes them.
fn elf_32_of(elf_64: &[u8]) -> Option<Vec<u8>> {
    const HEADER_BYTES: usize = 52;
    const PROGRAM_HEADER_BYTES: usize = 32;
    const PAGE: usize = 4096;
    let quad = |at: usize| Some(u64::from_le_bytes(elf_64.get(at..at + 8)?.try_into().ok()?));
    let half = |at: usize| Some(u16::from_le_bytes(elf_64.get(at..at + 2)?.try_into().ok()?));
    let (table, size, count) = (quad(32)? as usize, usize::from(half(54)?), usize::from(half(56)?));

    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0\x01\0\0\0".to_vec();
    let words = [quad(24)? as u32, HEADER_BYTES as u32, 0, 0];
    file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    let halves = [HEADER_BYTES, PROGRAM_HEADER_BYTES, count, 0, 0, 0];
    file.extend(halves.iter().flat_map(|&half| (half as u16).to_le_bytes()));
    for header in (0..count).map(|index| table + index * size) {
        let [kind, flags] = [0, 4].map(|at| quad(header + at).map(|quad| quad as u32));
        let [offset, virt, phys, in_file, in_memory, align] =
            [8, 16, 24, 32, 40, 48].map(|at| quad(header + at).map(|quad| quad as u32));
        let offset = offset? + PAGE as u32;
        let words = [kind?, offset, virt?, phys?, in_file?, in_memory?, flags?, align?];
        file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    }
    (file.len() <= PAGE).then(|| file.resize(PAGE, 0))?;
    // The multiboot header is still within the first 8 KiB.
    file.extend(elf_64);
    Some(file)
}

/// Runs the image with these arguments and modules, on the bare machine and under l1hv.
fn both(context: &Context, name: &str, arguments: &str, modules: &[Module]) -> Result<[Finished; 2]> {
    let kernel = Module::with_args(as_elf_32(context)?, arguments).named();
    let bare = Boot::Multiboot { kernel: kernel.clone(), modules: modules.to_vec() };
    let under =
        Boot::L1hv { host: context.host(""), guest: std::iter::once(kernel).chain(modules.iter().cloned()).collect() };
    let run = |name: String, boot| context.run(&Machine { ..context.bochs(&name, boot) });
    Ok([run(format!("{name}-bare"), bare)?, run(name.to_owned(), under)?])
}

fn same_findings(context: &Context, name: &str) -> Result<()> {
    let environment = context.layout.root().join("environment.txt");
    fs::write(&environment, "NR_CPUS=1\nMEMSIZE=512\n")?;
    let modules = [Module::with_args(&environment, "environment")];
    let [bare, under] = both(context, name, "vmx", &modules)?;
    for finished in [&bare, &under] {
        finished.must_shut_down()?;
        for text in [
            "loader: true",
            "named by its file: true",
            "arguments: vmx",
            "environment: NR_CPUS=1",
            "environment: MEMSIZE=512",
            "processors: 1",
            "at least 256 MiB: true",
            "memory: true",
            "map covers it: true",
            "x2APIC ID: 0",
            "vmxon [rdx]: true",
            "vmclear [rdx]: true",
            "vmptrld [rdx]: true",
            "vmxoff: true",
        ] {
            finished.console_must_say(&format!("test image: {text}"))?;
        }
    }
    ensure!(bare.console == under.console, "bare: {:#?}\nunder l1hv: {:#?}", bare.console, under.console);
    Ok(())
}

fn verdict(context: &Context, name: &str) -> Result<()> {
    for finished in both(context, name, "fail", &[])? {
        ensure!(finished.outcome == Outcome::GuestFailure(3), "{}", finished.outcome);
    }
    Ok(())
}

fn triple_fault(context: &Context, name: &str) -> Result<()> {
    for finished in both(context, name, "triple-fault", &[])? {
        finished.console_must_say("test image: triple fault: now")?;
        ensure!(finished.outcome.status() == 4, "{}", finished.outcome);
    }
    Ok(())
}
