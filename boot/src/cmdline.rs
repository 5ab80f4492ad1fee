//! The host's command line: words separated by spaces, `name` or `name=value`.

use core::fmt;

use log::LevelFilter;

/// The options of the command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options<'a> {
    /// The least important messages that are logged: `log=error|warn|info|debug|trace`.
    pub log: LevelFilter,
    /// Whether a guest may have exit statistics printed: `stats`.
    pub stats: bool,
    /// Whether VMCS shadowing is used, if the processor has it: `vmcs-shadowing=on|off`.
    pub vmcs_shadowing: bool,
    /// Memory kept for the host instead of the computed default, in MiB: `host-memory=MIB`.
    pub host_memory_mib: Option<u32>,
    /// The most tables that the EPTs of the machine and of all nested guests may have, instead of as many as memory
    /// allows: `ept-tables=COUNT`.
    pub ept_tables: Option<u32>,
    /// Changes to the fields that the guest hypervisor accesses in its VMCS without an exit: `shadow=FIELD:ACCESS,...`.
    pub shadow: &'a str,
    /// Whether accesses to VMCS fields are counted, which makes all of them exit: `profile`.
    pub profile: bool,
    /// The effect of a triple fault of the guest hypervisor: `triple-fault=reset|stop`.
    pub triple_fault: TripleFault,
    /// Whether the guest's kernel may make hypercalls: `hypercalls`.
    pub hypercalls: bool,
    /// Whether nested guests and their hypervisors are kept apart in the processor's speculation too, as far as the
    /// processor needs it: `mitigations=auto|off`.
    pub mitigations: bool,
    /// Whether devices are kept from the host's memory: `iommu=auto|on|off`.
    pub iommu: Iommu,
    /// The disk that the guest is started from, instead of a module: `boot=disk|0x80..0xff`.
    pub disk: Option<Disk>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            log: LevelFilter::Info,
            stats: false,
            vmcs_shadowing: true,
            host_memory_mib: None,
            ept_tables: None,
            shadow: "",
            profile: false,
            triple_fault: TripleFault::Reset,
            hypercalls: false,
            mitigations: true,
            iommu: Iommu::Auto,
            disk: None,
        }
    }
}

/// A disk with a boot sector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disk {
    /// The BIOS' first disk, or the second if the first is the one that l1hv comes from.
    Next,
    /// The disk with this number of the BIOS'.
    Number(u8),
}

impl Disk {
    /// The BIOS' number of the disk. `own` is that of the disk that l1hv comes from, if the loader tells it.
    pub const fn number(self, own: Option<u8>) -> u8 {
        const FIRST: u8 = 0x80;
        match (self, own) {
            (Self::Number(number), _) => number,
            (Self::Next, Some(FIRST)) => FIRST + 1,
            (Self::Next, _) => FIRST,
        }
    }
}

/// The use of the units that remap the devices' memory accesses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Iommu {
    /// The host uses them if it can. If not, it says so and goes on.
    Auto,
    /// The host uses them, or stops.
    On,
    /// The host leaves them to the guest.
    Off,
}

/// The effect of a triple fault of the guest hypervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TripleFault {
    /// It resets the machine, as on a PC: guests use it to restart.
    Reset,
    /// It stops the machine with a message that says where it happened.
    Stop,
}

/// The smallest and the largest `host-memory`.
pub const HOST_MEMORY_MIB: core::ops::RangeInclusive<u32> = 8..=1024;

/// The smallest and the largest `ept-tables`.
pub const EPT_TABLES: core::ops::RangeInclusive<u32> = 16..=262_144;

/// How an option is recognised and applied.
enum Apply {
    Flag(for<'a> fn(&mut Options<'a>)),
    /// The function says whether it accepted the value; the text lists the values.
    Value(for<'a> fn(&mut Options<'a>, &'a str) -> bool, &'static str),
}

/// All options, one row each, for the parser and the error messages.
const TABLE: [(&str, Apply); 12] = [
    ("log", Apply::Value(set_log, "error, warn, info, debug or trace")),
    ("stats", Apply::Flag(|options| options.stats = true)),
    ("vmcs-shadowing", Apply::Value(set_vmcs_shadowing, "on or off")),
    ("host-memory", Apply::Value(set_host_memory, "a number of MiB from 8 to 1024")),
    ("ept-tables", Apply::Value(set_ept_tables, "a number from 16 to 262144")),
    ("shadow", Apply::Value(set_shadow, "FIELD:ACCESS,... with access none, r, w or rw")),
    ("profile", Apply::Flag(|options| options.profile = true)),
    ("triple-fault", Apply::Value(set_triple_fault, "reset or stop")),
    ("hypercalls", Apply::Flag(|options| options.hypercalls = true)),
    ("mitigations", Apply::Value(set_mitigations, "auto or off")),
    ("iommu", Apply::Value(set_iommu, "auto, on or off")),
    ("boot", Apply::Value(set_disk, "disk or a BIOS drive from 0x80 to 0xff")),
];

fn set_log(options: &mut Options<'_>, value: &str) -> bool {
    const LEVELS: [(&str, LevelFilter); 5] = [
        ("error", LevelFilter::Error),
        ("warn", LevelFilter::Warn),
        ("info", LevelFilter::Info),
        ("debug", LevelFilter::Debug),
        ("trace", LevelFilter::Trace),
    ];
    let level = LEVELS.iter().find(|(name, _)| *name == value);
    if let Some((_, level)) = level {
        options.log = *level;
    }
    level.is_some()
}

fn set_vmcs_shadowing(options: &mut Options<'_>, value: &str) -> bool {
    options.vmcs_shadowing = value == "on";
    matches!(value, "on" | "off")
}

fn set_triple_fault(options: &mut Options<'_>, value: &str) -> bool {
    options.triple_fault = if value == "stop" { TripleFault::Stop } else { TripleFault::Reset };
    matches!(value, "reset" | "stop")
}

fn set_mitigations(options: &mut Options<'_>, value: &str) -> bool {
    options.mitigations = value == "auto";
    matches!(value, "auto" | "off")
}

fn set_iommu(options: &mut Options<'_>, value: &str) -> bool {
    const USES: [(&str, Iommu); 3] = [("auto", Iommu::Auto), ("on", Iommu::On), ("off", Iommu::Off)];
    let chosen = USES.iter().find(|(name, _)| *name == value);
    if let Some((_, chosen)) = chosen {
        options.iommu = *chosen;
    }
    chosen.is_some()
}

fn set_disk(options: &mut Options<'_>, value: &str) -> bool {
    let number = || u8::from_str_radix(value.strip_prefix("0x")?, 16).ok().filter(|number| *number >= 0x80);
    options.disk = if value == "disk" { Some(Disk::Next) } else { number().map(Disk::Number) };
    options.disk.is_some()
}

fn set_host_memory(options: &mut Options<'_>, value: &str) -> bool {
    options.host_memory_mib = value.parse().ok().filter(|mib| HOST_MEMORY_MIB.contains(mib));
    options.host_memory_mib.is_some()
}

fn set_ept_tables(options: &mut Options<'_>, value: &str) -> bool {
    options.ept_tables = value.parse().ok().filter(|count| EPT_TABLES.contains(count));
    options.ept_tables.is_some()
}

/// Accepts any list: the code that knows the fields checks it later.
fn set_shadow<'a>(options: &mut Options<'a>, value: &'a str) -> bool {
    options.shadow = value;
    !value.is_empty()
}

/// Why the command line cannot be parsed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OptionError<'a> {
    /// No such option.
    Unknown(&'a str),
    /// A flag was given a value.
    UnwantedValue(&'a str),
    /// The option has no value but needs one, or has one that it does not accept.
    BadValue {
        /// The word as given.
        word: &'a str,
        /// The values that the option accepts.
        expected: &'static str,
    },
}

impl fmt::Display for OptionError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(word) => {
                write!(f, "unknown option \"{word}\": the options are")?;
                for (i, (name, apply)) in TABLE.iter().enumerate() {
                    let value = if matches!(apply, Apply::Value(..)) { "=" } else { "" };
                    write!(f, "{} {name}{value}", if i == 0 { "" } else { "," })?;
                }
                Ok(())
            }
            Self::UnwantedValue(word) => write!(f, "option \"{word}\" takes no value: remove it"),
            Self::BadValue { word, expected } => write!(f, "bad value in option \"{word}\": use {expected}"),
        }
    }
}

impl core::error::Error for OptionError<'_> {}

impl<'a> Options<'a> {
    /// Reads the words of `line`; a later word overrides an earlier one.
    ///
    /// # Errors
    ///
    /// The first word that is not an option, or whose value is not one of the option's.
    pub fn parse(line: &'a str) -> Result<Self, OptionError<'a>> {
        let mut options = Self::default();
        for word in line.split_ascii_whitespace() {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (word, None),
            };
            let (_, apply) = TABLE.iter().find(|(known, _)| *known == name).ok_or(OptionError::Unknown(word))?;
            match (apply, value) {
                (Apply::Flag(set), None) => set(&mut options),
                (Apply::Flag(_), Some(_)) => return Err(OptionError::UnwantedValue(word)),
                (Apply::Value(set, _), Some(value)) if set(&mut options, value) => {}
                (Apply::Value(_, expected), _) => return Err(OptionError::BadValue { word, expected }),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    #[test]
    fn an_empty_line_gives_the_defaults() {
        assert_eq!(Options::parse(" \t "), Ok(Options::default()));
    }

    #[test]
    fn every_option_is_read_and_the_last_word_wins() {
        assert_eq!(
            Options::parse(
                "log=trace  stats vmcs-shadowing=off host-memory=64 ept-tables=99 shadow=A:r,B*:none profile triple-fault=stop hypercalls mitigations=off iommu=off iommu=on boot=disk boot=0x81 log=warn"
            ),
            Ok(Options {
                log: LevelFilter::Warn,
                stats: true,
                vmcs_shadowing: false,
                host_memory_mib: Some(64),
                ept_tables: Some(99),
                shadow: "A:r,B*:none",
                profile: true,
                triple_fault: TripleFault::Stop,
                hypercalls: true,
                mitigations: false,
                iommu: Iommu::On,
                disk: Some(Disk::Number(0x81)),
            })
        );
    }

    #[test]
    fn the_next_disk_is_the_first_one_that_l1hv_does_not_come_from() {
        assert_eq!(Disk::Next.number(None), 0x80);
        assert_eq!(Disk::Next.number(Some(0x80)), 0x81);
        assert_eq!(Disk::Next.number(Some(0xe0)), 0x80);
        assert_eq!(Disk::Number(0x80).number(Some(0x80)), 0x80);
    }

    #[test]
    fn an_unknown_option_is_named_with_those_that_exist() {
        let error = Options::parse("stats frobnicate=1 log=info").unwrap_err();
        assert_eq!(error, OptionError::Unknown("frobnicate=1"));
        assert_eq!(
            error.to_string(),
            "unknown option \"frobnicate=1\": the options are log=, stats, vmcs-shadowing=, host-memory=, ept-tables=, \
             shadow=, profile, triple-fault=, hypercalls, mitigations=, iommu=, boot="
        );
    }

    #[test]
    fn a_bad_value_is_named_with_those_that_exist() {
        for word in [
            "log",
            "log=",
            "log=loud",
            "host-memory",
            "host-memory=7",
            "host-memory=1025",
            "boot=cd",
            "boot=0x7f",
            "boot=0x100",
            "host-memory=-1",
            "ept-tables=15",
            "shadow=",
            "triple-fault=halt",
            "mitigations=on",
            "iommu=yes",
        ] {
            let error = Options::parse(word).unwrap_err();
            assert!(matches!(error, OptionError::BadValue { word: named, .. } if named == word), "{word}: {error:?}");
            assert!(error.to_string().contains(word));
        }
        assert_eq!(Options::parse("stats=yes"), Err(OptionError::UnwantedValue("stats=yes")));
    }

    proptest! {
        #[test]
        fn no_line_panics(line in ".*") {
            if let Err(error) = Options::parse(&line) {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}
