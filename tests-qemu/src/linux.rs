//! The arguments that make Linux on a machine quick and repeatable.

use crate::machine::Emulator;

/// Arguments for a Linux whose console is the machine's. Without the mitigations, boots are shorter.
pub fn default_args(emulator: &dyn Emulator, ips: u64) -> String {
    // A panic ends in a triple fault, which every machine reports at once.
    let args = "console=ttyS0 panic=-1 reboot=t idle=halt no_timer_check tsc=reliable mitigations=off nopti random.trust_cpu=on";
    // A calibration against emulated timers would give the same frequency.
    emulator.tsc_khz(ips).map_or_else(|| args.to_owned(), |khz| format!("{args} tsc_early_khz={khz}"))
}

/// Arguments for a Linux on an unknown machine: its console is a screen, and COM1 if the machine has it. They disable
/// the same features of Linux as [`default_args`].
pub const PC_ARGUMENTS: &str =
    "console=tty0 console=ttyS0,115200 tsc=reliable mitigations=off nopti random.trust_cpu=on";
