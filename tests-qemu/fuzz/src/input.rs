//! Bytes as a source of values.

/// Values that are taken from bytes, from the first to the last. After the end all are 0, so that every input is
/// complete.
#[derive(Clone, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether all further values are 0.
    pub const fn is_at_end(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes, at most `most`.
    pub fn take(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// A word of 16 bits.
    pub fn half(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// A word of 32 bits.
    pub fn long(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// A word of 64 bits.
    pub fn quad(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// The lowest bit of a byte.
    pub fn flag(&mut self) -> bool {
        self.byte() & 1 != 0
    }

    /// A number below `bound`, which is at most 65,536.
    pub fn below(&mut self, bound: usize) -> usize {
        let number = if bound <= 256 { usize::from(self.byte()) } else { usize::from(self.half()) };
        number % bound
    }

    /// One of the values of a list.
    pub fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    /// A word near `old`, or near a border: one bit flipped, a small step away, a small number, a power of two, ones,
    /// or any word. Most are short in the input.
    pub fn neighbour(&mut self, old: u64) -> u64 {
        let kind = self.byte();
        let number = u32::from(kind & 0x3f);
        match kind >> 6 {
            0 => old ^ 1 << number,
            1 if number < 32 => old.wrapping_add(u64::from(number)).wrapping_sub(16),
            1 => u64::MAX >> (self.byte() & 0x3f),
            2 if number < 32 => u64::from(self.byte()) << number,
            2 => u64::from(self.half()) << (number & 0x1f),
            _ if number < 32 => self.long().into(),
            _ => self.quad(),
        }
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let taken = self.take(N);
        bytes[..taken.len()].copy_from_slice(taken);
        bytes
    }
}

/// Edits a structure until the input ends: each edit is an offset and one byte, or a neighbour of the word there.
pub fn edit(input: &mut Input<'_>, bytes: &mut [u8]) {
    while !input.is_at_end() && !bytes.is_empty() {
        let at = usize::from(input.half());
        let (offset, is_word) = ((at & 0x7fff) % bytes.len(), at & 0x8000 != 0);
        match bytes.get_mut(offset..).and_then(|rest| rest.first_chunk_mut::<4>()) {
            Some(word) if is_word => {
                let new = input.neighbour(u32::from_le_bytes(*word).into());
                *word = (new as u32).to_le_bytes();
            }
            _ => bytes[offset] = input.byte(),
        }
    }
}
