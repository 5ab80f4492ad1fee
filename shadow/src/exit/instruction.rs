//! VM-exit instruction information (SDM 28.2.5 "Information for VM Exits Due to Instruction Execution", Tables 28-8 to
//! 28-15).
//!
//! All layouts put the same part at the same place, so one type serves them all. The [`InsnLayout`](super::InsnLayout)
//! of an exit reason says which parts are defined:
//!
//! | part | StringIo | MemoryAndRegister | DescriptorTable | SegmentTable | SizedRegister | Memory | ReadWrite | Registers |
//! |---|---|---|---|---|---|---|---|---|
//! | scale, index, base | | yes | yes | if memory | | yes | if memory | |
//! | reg1 | | | | if register | yes | | if register | yes |
//! | reg2 | | yes | | | | | yes | yes |
//! | address size | yes | yes | yes | if memory | | yes | if memory | |
//! | memory or register | | | | yes | | | yes | |
//! | operand size | | | yes | | yes | | | |
//! | segment | OUTS | yes | yes | if memory | | yes | if memory | |
//! | which instruction | | | yes | yes | | | | |

/// Number of a general-purpose register: 0 RAX, 1 RCX, 2 RDX, 3 RBX, 4 RSP, 5 RBP, 6 RSI, 7 RDI, then R8 to R15.
pub type Gpr = usize;

/// The VM-exit instruction-information field.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(transparent)]
pub struct InsnInfo(pub u32);

/// Size of an instruction's addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AddressSize {
    /// 16 bits.
    Bits16,
    /// 32 bits.
    Bits32,
    /// 64 bits.
    Bits64,
    /// A number that the SDM does not define.
    Other(u8),
}

/// Size of an instruction's operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OperandSize {
    /// 16 bits.
    Bits16,
    /// 32 bits.
    Bits32,
    /// 64 bits.
    Bits64,
    /// A number that the SDM does not define.
    Other(u8),
}

/// The instruction of an access to GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the instructions' names")]
pub enum DescriptorTableInsn {
    Sgdt,
    Sidt,
    Lgdt,
    Lidt,
}

/// The instruction of an access to LDTR or TR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the instructions' names")]
pub enum SegmentTableInsn {
    Sldt,
    Str,
    Lldt,
    Ltr,
}

impl InsnInfo {
    const INDEX_INVALID: u32 = 1 << 22;
    const BASE_INVALID: u32 = 1 << 27;

    /// Scaling: what the index register is multiplied by.
    pub const fn scale(self) -> u64 {
        1 << (self.0 & 3)
    }

    /// Reg1: the operand of a register form.
    pub const fn reg1(self) -> Gpr {
        (self.0 >> 3 & 0xf) as Gpr
    }

    /// Reg2: the register operand of instructions that have a second operand, in memory or in Reg1.
    pub const fn reg2(self) -> Gpr {
        (self.0 >> 28 & 0xf) as Gpr
    }

    /// Address size.
    pub const fn address_size(self) -> AddressSize {
        match (self.0 >> 7 & 7) as u8 {
            0 => AddressSize::Bits16,
            1 => AddressSize::Bits32,
            2 => AddressSize::Bits64,
            other => AddressSize::Other(other),
        }
    }

    /// Mem/Reg: the operand that may be memory is a register.
    pub const fn is_register(self) -> bool {
        self.0 >> 10 & 1 != 0
    }

    /// Operand size of RDRAND, RDSEED, TPAUSE and UMWAIT.
    pub const fn operand_size(self) -> OperandSize {
        match (self.0 >> 11 & 3) as u8 {
            0 => OperandSize::Bits16,
            1 => OperandSize::Bits32,
            2 => OperandSize::Bits64,
            other => OperandSize::Other(other),
        }
    }

    /// Operand size of LGDT and LIDT outside 64-bit mode, which bit 11 alone holds.
    pub const fn table_operand_size(self) -> OperandSize {
        if self.0 >> 11 & 1 != 0 { OperandSize::Bits32 } else { OperandSize::Bits16 }
    }

    /// Segment register: 0 ES, 1 CS, 2 SS, 3 DS, 4 FS, 5 GS.
    pub const fn segment(self) -> usize {
        (self.0 >> 15 & 7) as usize
    }

    /// Index register, if there is one.
    pub const fn index(self) -> Option<Gpr> {
        if self.0 & Self::INDEX_INVALID == 0 { Some((self.0 >> 18 & 0xf) as Gpr) } else { None }
    }

    /// Base register, if there is one.
    pub const fn base(self) -> Option<Gpr> {
        if self.0 & Self::BASE_INVALID == 0 { Some((self.0 >> 23 & 0xf) as Gpr) } else { None }
    }

    /// Which instruction accessed GDTR or IDTR.
    pub const fn descriptor_table_insn(self) -> DescriptorTableInsn {
        match self.0 >> 28 & 3 {
            0 => DescriptorTableInsn::Sgdt,
            1 => DescriptorTableInsn::Sidt,
            2 => DescriptorTableInsn::Lgdt,
            _ => DescriptorTableInsn::Lidt,
        }
    }

    /// Which instruction accessed LDTR or TR.
    pub const fn segment_table_insn(self) -> SegmentTableInsn {
        match self.0 >> 28 & 3 {
            0 => SegmentTableInsn::Sldt,
            1 => SegmentTableInsn::Str,
            2 => SegmentTableInsn::Lldt,
            _ => SegmentTableInsn::Ltr,
        }
    }

    /// The bits of an effective address that the address size keeps.
    const fn address_mask(self) -> u64 {
        match self.address_size() {
            AddressSize::Bits16 => 0xffff,
            AddressSize::Bits32 => 0xffff_ffff,
            AddressSize::Bits64 | AddressSize::Other(_) => u64::MAX,
        }
    }

    /// Base + index * scale + displacement, cut to the address size.
    pub fn effective_address(self, displacement: u64, register: impl Fn(Gpr) -> u64) -> u64 {
        let base = self.base().map_or(0, &register);
        let index = self.index().map_or(0, &register);
        displacement.wrapping_add(base).wrapping_add(index.wrapping_mul(self.scale())) & self.address_mask()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn descriptor_and_segment_table_instructions_are_told_apart() {
        let lgdt = InsnInfo(2 << 28 | 1 << 11 | 3 << 15);
        assert_eq!(
            (lgdt.descriptor_table_insn(), lgdt.table_operand_size()),
            (DescriptorTableInsn::Lgdt, OperandSize::Bits32)
        );
        let str_cx = InsnInfo(1 << 28 | 1 << 10 | 1 << 3);
        assert_eq!(
            (str_cx.segment_table_insn(), str_cx.is_register(), str_cx.reg1()),
            (SegmentTableInsn::Str, true, 1)
        );
    }

    #[test]
    fn a_sized_register_comes_apart() {
        let rdrand_r10 = InsnInfo(2 << 11 | 10 << 3);
        assert_eq!((rdrand_r10.operand_size(), rdrand_r10.reg1()), (OperandSize::Bits64, 10));
        assert_eq!(InsnInfo(3 << 11).operand_size(), OperandSize::Other(3));
    }

    proptest! {
        #[test]
        fn any_word_has_an_effective_address_within_its_size(word: u32, displacement: u64, register: u64) {
            let info = InsnInfo(word);
            let address = info.effective_address(displacement, |number| register.rotate_left(number as u32));
            match info.address_size() {
                AddressSize::Bits16 => prop_assert!(address >> 16 == 0),
                AddressSize::Bits32 => prop_assert!(address >> 32 == 0),
                AddressSize::Bits64 | AddressSize::Other(_) => (),
            }
            prop_assert!(info.reg1() < 16 && info.reg2() < 16 && info.segment() < 8 && info.scale() <= 8);
        }
    }
}
