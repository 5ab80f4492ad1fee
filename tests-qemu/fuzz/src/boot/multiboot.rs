//! The information that a multiboot loader leaves.

use std::sync::LazyLock;

use boot::multiboot::{BootInfo, LOADER_MAGIC, MAX_MODULES};

use super::Memory;
use crate::input::edit;
use crate::{Input, is_one_line};

/// All structures lie here.
const INFO: u32 = 0x1_0000;
const MODULES: usize = 0x80;
const MAP: usize = 0xc0;
const STRINGS: usize = 0x120;
const END: usize = 0x180;

/// A loader's structures: two modules, three regions, four strings.
static STRUCTURES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = vec![0; END];
    let mut put = |at: usize, word: u32| bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
    let address = |offset: usize| INFO + offset as u32;
    // Flags, command line, modules, memory map, loader's name.
    let fields = [
        (0, 0x24d),
        (16, address(STRINGS)),
        (20, 2),
        (24, address(MODULES)),
        (44, 3 * 24),
        (48, address(MAP)),
        (64, address(STRINGS + 0x10)),
    ];
    fields.into_iter().for_each(|(at, word)| put(at, word));
    for (number, (start, end, string)) in
        [(0x20_0000, 0x20_1234, 0x20), (0x30_0000, 0x30_0000, 0x38)].into_iter().enumerate()
    {
        let at = MODULES + 16 * number;
        [start, end, address(STRINGS + string)]
            .into_iter()
            .enumerate()
            .for_each(|(field, word)| put(at + 4 * field, word));
    }
    for (number, (start, length, kind)) in
        [(0, 0x9_f000, 1), (0xf_0000, 0x1_0000, 2), (0x10_0000, 0x7f0_0000, 1)].into_iter().enumerate()
    {
        let at = MAP + 24 * number;
        [20, start, 0, length, 0, kind].into_iter().enumerate().for_each(|(field, word)| put(at + 4 * field, word));
    }
    for (offset, string) in [(0, "/l1hv stats"), (0x10, "GRUB 2.06"), (0x20, "/vmlinuz quiet"), (0x38, "/initrd")] {
        bytes[STRINGS + offset..][..string.len()].copy_from_slice(string.as_bytes());
    }
    bytes
});

/// What a loader leaves.
///
/// The input: edits of its structures.
pub fn multiboot(bytes: &[u8]) {
    let mut structures = STRUCTURES.clone();
    edit(&mut Input::new(bytes), &mut structures);
    let memory = Memory(vec![(INFO.into(), structures)]);
    assert!(BootInfo::parse(&memory, !LOADER_MAGIC, INFO).is_err());
    let info = match BootInfo::parse(&memory, LOADER_MAGIC, INFO) {
        Ok(info) => info,
        Err(error) => return is_one_line(error),
    };
    assert!(info.modules.len() <= MAX_MODULES);
    for module in &info.modules {
        assert!(module.range.start % 4096 == 0 && module.range.start <= module.range.end);
        assert!(info.module_string(module).ends_with(info.module_arguments(module)));
    }
    for string in [info.command_line(), info.loader_name()] {
        assert!(!string.contains(&0));
    }
    let regions = info.memory_map.regions();
    assert!(regions.windows(2).all(|pair| pair[0].end <= pair[1].start), "{regions:x?}");
}
