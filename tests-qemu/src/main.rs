//! The runner's program; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    tests_qemu::commands::main()
}
