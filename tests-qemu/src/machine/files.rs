//! The files of a run in its log directory, and a command that cannot outlive this process.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::command::which;

/// Log file of the guest's console.
pub const CONSOLE: &str = "console.log";
/// Log file of the debug port.
pub const DEBUG: &str = "debug.log";
/// Log file of the emulator's own complaints.
pub const ERRORS: &str = "emulator.err";
/// The image that the machine boots from. It is large, and removed when the run ends as expected.
pub const BOOT_ISO: &str = "boot.iso";

/// `program` with an empty standard input. It is killed when this process ends, in whatever way.
pub fn supervised(program: &Path) -> Command {
    let mut command = match which("setpriv") {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        }
        None => Command::new(program),
    };
    command.stdin(Stdio::null());
    command
}
