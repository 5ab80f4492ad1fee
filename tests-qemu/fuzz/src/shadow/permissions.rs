//! Permissions of VMCS shadowing: as text, and one by one as a hypercall sets them.

use shadow::FieldId;
use shadow::encoding::Encoding;
use shadow::index::lookup;
use shadow::permission::{Access, BITMAP_BYTES, Permissions};

use super::machine::PROCESSORS;
use crate::{Input, is_one_line};

const WORDS: [&str; 20] = [
    "GUEST_",
    "HOST_",
    "RIP",
    "*",
    ":",
    "none",
    "r",
    "w",
    "rw",
    ",",
    "GUEST_RIP:rw",
    "EXIT_REASON:r",
    "EXIT_*:w",
    "VPID",
    "CR0_READ_SHADOW:w",
    "GUEST_*:none",
    "TSC_OFFSET",
    "_",
    "EPT_POINTER:r",
    "*:rw",
];

/// Lists of permissions, and single ones.
///
/// The input: the processor, encodings with accesses, and then text: characters, and from 80H on words of lists.
pub fn permissions(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let style = input.byte();
    let offered = &PROCESSORS[usize::from(style & 1)].offered;
    let mut permissions = match style & 2 {
        0 => Permissions::widest(offered),
        _ => Permissions::without_shadowing(&offered.fields()),
    };
    for _ in 0..style >> 2 & 3 {
        set_one(&mut permissions, Encoding(input.neighbour(0x681e) as u32), Access::from_bits_retain(input.byte() & 3));
    }
    let text: String = input
        .take(usize::MAX)
        .iter()
        .flat_map(|&byte| match byte {
            ..0x80 => vec![char::from(byte)],
            _ => WORDS[usize::from(byte) % WORDS.len()].chars().collect(),
        })
        .collect();
    let before = permissions;
    if let Err(error) = permissions.apply(&text) {
        is_one_line(format!("{error}").replace('\n', " "));
        assert_eq!(permissions, before, "a list that fails changes nothing");
    }
    check(&permissions);
}

fn set_one(permissions: &mut Permissions, encoding: Encoding, wanted: Access) {
    let Some(id) = lookup(encoding) else { return };
    let (before, most) = (permissions.get(id), permissions.most(id));
    match permissions.set(id, wanted) {
        Ok(()) => assert!(permissions.get(id) == wanted && most.contains(wanted)),
        Err(error) => {
            is_one_line(error);
            assert_eq!(permissions.get(id), before);
        }
    }
}

/// Nothing is granted that is not to be, and the bitmaps let through just what is granted.
fn check(permissions: &Permissions) {
    let (mut vmread, mut vmwrite) = ([0; BITMAP_BYTES], [0; BITMAP_BYTES]);
    permissions.fill_bitmaps(&mut vmread, &mut vmwrite);
    let (mut reads, mut writes) = (0, 0);
    for id in FieldId::all() {
        let granted = permissions.get(id);
        assert!(permissions.most(id).contains(granted), "{id:?}");
        let encoding = id.encoding();
        let passes = |bitmap: &[u8]| bitmap[encoding.0 as usize / 8] >> (encoding.0 % 8) & 1 == 0;
        assert_eq!(
            (passes(&vmread), passes(&vmwrite)),
            (granted.contains(Access::READ), granted.contains(Access::WRITE))
        );
        let halves = if matches!(encoding.width(), shadow::encoding::Width::W64) { 2 } else { 1 };
        reads += halves * u32::from(granted.contains(Access::READ));
        writes += halves * u32::from(granted.contains(Access::WRITE));
    }
    let zeros = |bitmap: &[u8]| {
        let words = bitmap.as_chunks::<8>().0.iter().map(|&word| u64::from_le_bytes(word));
        words.map(u64::count_zeros).sum::<u32>()
    };
    assert_eq!((zeros(&vmread), zeros(&vmwrite)), (reads, writes), "bits of encodings without a field");
}
