//! Each target on a fixed sequence of inputs: some without a pattern, most made of those before.

use fuzz::TARGETS;

/// The longest inputs.
const BYTES: usize = 200;
/// Inputs that others are made of.
const KEPT: usize = 32;

/// Marsaglia's xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn bytes(&mut self) -> Vec<u8> {
        let length = self.below(BYTES);
        (0..length).map(|_| self.next() as u8).collect()
    }

    /// One of the `kept` with a few changes.
    fn mutation(&mut self, kept: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = kept[self.below(kept.len())].clone();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            match self.below(5) {
                0 => bytes.insert(at, self.next() as u8),
                1 => bytes.truncate(at),
                2 => bytes.extend_from_slice(&kept[self.below(kept.len())]),
                _ if at < bytes.len() => bytes[at] = self.next() as u8,
                _ => bytes.push(self.next() as u8),
            }
        }
        bytes.truncate(BYTES);
        bytes
    }
}

/// Runs a target on so many inputs. Its name begins the sequence.
fn run(name: &str, inputs: usize) {
    let (_, target) = TARGETS.into_iter().find(|(known, _)| *known == name).expect("there is such a target");
    let mut random =
        Random(name.bytes().fold(0x9e37_79b9_7f4a_7c15, |seed, byte| seed.rotate_left(7) ^ u64::from(byte)));
    let mut kept = vec![Vec::new()];
    for number in 0..inputs {
        let input = match number {
            0 => Vec::new(),
            _ if random.below(4) == 0 => random.bytes(),
            _ => random.mutation(&kept),
        };
        if std::panic::catch_unwind(|| target(&input)).is_err() {
            panic!("{name} fails for {input:?}");
        }
        match kept.len() {
            KEPT => kept[random.below(KEPT)] = input,
            _ => kept.push(input),
        }
    }
}

macro_rules! targets {
    ($($name:ident $inputs:literal)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name), $inputs);
        })*

        /// The names of the tests.
        const TESTED: &[&str] = &[$(stringify!($name)),*];
    };
}

targets! {
    boot_acpi 500
    boot_command_line 4000
    boot_guest_image 4000
    boot_memory_map 2000
    boot_multiboot 4000
    ept_paging 500
    ept_walk 4000
    shadow_capabilities 4000
    shadow_cpuid 4000
    shadow_exits 4000
    shadow_injection 4000
    shadow_linear 4000
    shadow_msrs 4000
    shadow_permissions 4000
    shadow_vmcs_region 8000
    shadow_vmcs12 10_000
}

#[test]
fn every_target_has_a_test_and_a_binary_of_libfuzzers() {
    assert_eq!(TARGETS.map(|(name, _)| name), TESTED);
    let manifest = include_str!("../libfuzzer/Cargo.toml");
    let binaries: Vec<&str> = manifest.lines().filter_map(|line| line.strip_prefix("path = \"targets/")).collect();
    let expected = TARGETS.map(|(name, _)| format!("{name}.rs\""));
    assert_eq!(binaries, expected);
}
