//! Guests that begin with a disk's boot sector, and what the BIOS tells them of memory.

use std::ops::Range;

use anyhow::{Context as _, Result, ensure};
use boot::memory_map::{MemoryMap, Region, RegionKind};
use tests_qemu::guest::{KvmEpt, Work};
use tests_qemu::machine::{Boot, Drive, DriveKind, Entry, Machine, Menu, Module};

use crate::context::{Context, Finished, Test};

const MIB: u64 = 1 << 20;

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "the_bios_tells_a_boot_sector_that_the_hosts_memory_is_reserved", run: memory },
        Test { name: "linux_on_a_disk_boots_by_its_own_grub_and_its_kvm_runs_a_payload", run: linux },
        Test { name: "a_disk_that_cannot_be_started_is_one_clear_line", run: stops },
    ]
}

fn disk(file: impl Into<std::path::PathBuf>) -> Vec<Drive> {
    vec![Drive { file: file.into(), kind: DriveKind::Disk }]
}

/// l1hv, and the first disk as its guest.
fn under(context: &Context, arguments: &str) -> Boot {
    Boot::L1hv { host: context.host(&format!("boot=disk {arguments}")), guest: Vec::new() }
}

/// What [`sector-guest`](../../guests/sector/src/main.rs) prints.
#[derive(Debug)]
struct Told {
    map: MemoryMap,
    base_kib: u64,
    /// AX of the call, then carry flag, AX, BX, CX and DX.
    calls: Vec<[u64; 6]>,
}

impl Told {
    fn of(finished: &Finished) -> Result<Self> {
        finished.must_shut_down()?;
        let lines = |prefix: &'static str| {
            let rows = finished.debug.iter().filter_map(move |line| line.strip_prefix(prefix));
            rows.map(|row| row.split_whitespace().map(|word| Ok(u64::from_str_radix(word, 16)?)).collect())
        };
        let base: Vec<Vec<u64>> = lines("sector: base:").collect::<Result<_>>()?;
        let calls: Vec<Vec<u64>> = lines("sector: call").collect::<Result<_>>()?;
        let map: Vec<Vec<u64>> = lines("sector: map:").collect::<Result<_>>()?;
        let regions = map.iter().map(|row| {
            ensure!(row.len() == 11 && row[0] >= 20, "an entry of {} words: {row:x?}", row.len());
            let number = |at: usize| row[at..at + 4].iter().rev().fold(0, |number, word| number << 16 | word);
            let kind = RegionKind((row[9] | row[10] << 16) as u32);
            Ok(Region { start: number(1), end: number(1) + number(5), kind })
        });
        Ok(Self {
            map: MemoryMap::sanitize(regions.collect::<Result<Vec<_>>>()?)?,
            base_kib: *base.first().and_then(|row| row.first()).context("no size of base memory")?,
            calls: calls.iter().map(|row| row[..].try_into().context("a call's line")).collect::<Result<_>>()?,
        })
    }

    /// Carry flag, AX, BX, CX and DX after a call.
    fn answer(&self, ax: u64) -> Result<[u64; 5]> {
        let row = self.calls.iter().find(|row| row[0] == ax).with_context(|| format!("no call {ax:x}"))?;
        let [_, carry, rest @ ..] = *row;
        Ok([carry & 1, rest[0], rest[1], rest[2], rest[3]])
    }
}

/// The host's memory, as the log names it.
fn host_memory(finished: &Finished) -> Result<Range<u64>> {
    let line = finished.debug.iter().find_map(|line| line.split_once("host memory: ")).context("no host memory")?.1;
    let (start, end) = line.split_once("..").context("no range")?;
    let number = |text: &str| u64::from_str_radix(text.trim().trim_start_matches("0x"), 16);
    Ok(number(start)?..number(end)?)
}

fn memory(context: &Context, name: &str) -> Result<()> {
    let run = |name: &str, boot, memory_mib| {
        let drives = disk(&context.programs.sector_disk);
        context.run(&Machine { drives, memory_mib, ..context.bochs(name, boot) })
    };
    for memory_mib in [48, 1024] {
        let bare = Told::of(&run(&format!("{name}-bare"), Boot::Disk, memory_mib)?)?;
        let finished = run(name, under(context, ""), memory_mib)?;
        let told = Told::of(&finished)?;
        // Everything is as before, but for the host's region and a page of low memory.
        let host = host_memory(&finished)?;
        let low = told.base_kib * 1024..told.base_kib * 1024 + 4096;
        ensure!(low.end <= bare.base_kib * 1024 && bare.base_kib - told.base_kib < 8, "{told:x?}\nbare: {bare:x?}");
        let expected = bare.map.with_reserved(host.clone())?.with_reserved(low)?;
        ensure!(told.map == expected, "{told:x?}\nbare: {bare:x?}\nhost: {host:x?}");
        let extended = told.map.usable_from(MIB);
        ensure!(extended < bare.map.usable_from(MIB) && MIB + extended <= host.start, "{told:x?}");
        let low_kib = extended.min(15 * MIB) / 1024;
        let high = (extended - low_kib * 1024) / 65536;
        ensure!(told.answer(0xe801)? == [0, low_kib, high, low_kib, high], "{told:x?}");
        ensure!(told.answer(0x8800)?[..2] == [0, extended.min(63 * MIB) / 1024], "{told:x?}");
        for call in [0xe881, 0xda88, 0x8a00, 0xc700] {
            ensure!(told.answer(call)?[0] == 1, "call {call:x} is answered: {told:x?}");
        }
        ensure!(told.answer(0xc000)?[..3] == bare.answer(0xc000)?[..3], "{told:x?}\nbare: {bare:x?}");
    }
    Ok(())
}

fn linux(context: &Context, name: &str) -> Result<()> {
    let guest = context.guest_hypervisor("6.1", Work::Payload, KvmEpt::On)?;
    let image = context.layout.root().join("linux-disk.img");
    let entries = vec![Entry { title: "Linux".to_owned(), boot: guest.on_bare_machine() }];
    Menu { seconds: 0, entries }.make(&image, &context.provisioned.grub_mkrescue)?;
    let machine = Machine { drives: disk(image), ..context.bochs(name, under(context, "")) };
    let finished = context.run(&machine)?;
    finished.must_have_done(&["payload"])?;
    let touched = finished.debug.iter().any(|line| line.contains("which is the host's"));
    ensure!(!touched, "a guest that knows its memory has come to the host's");
    Ok(())
}

fn stops(context: &Context, name: &str) -> Result<()> {
    let empty = context.layout.root().join("empty-disk.img");
    std::fs::write(&empty, vec![0; 10 << 20])?;
    let kernel = vec![Module::new(&context.programs.multiboot_guest)];
    let both = Boot::L1hv { host: context.host("boot=disk"), guest: kernel };
    for (boot, drives, kind, message) in [
        (under(context, ""), disk(&empty), "no-guest-image", "no boot sector on drive 0x80"),
        (under(context, ""), Vec::new(), "no-guest-image", "no boot sector on drive 0x80"),
        (under(context, "boot=0x81"), disk(&empty), "no-guest-image", "no boot sector on drive 0x81"),
        (both, Vec::new(), "bad-option", "leave one of them out"),
    ] {
        let finished = context.run(&Machine { drives, ..context.bochs(name, boot) })?;
        finished.must_stop(kind, message)?;
    }
    Ok(())
}
