//! What the compiler's companions say of the code: formatting, lints and documentation, for this host and for the bare machine. A warning is an
//! error.

use tests_qemu::build::BARE_TARGET;
use tests_qemu::command;
use tests_qemu::layout::Layout;
use tests_qemu::progress::Progress;
use tests_qemu::provision;

/// The crates that run without an operating system.
const BARE: [&str; 4] = ["l1hv", "payload", "multiboot-guest", "conformance-guest"];

/// Runs cargo in a target directory that no other test builds in.
fn cargo(args: &[&str]) {
    let layout = Layout::find().expect("the workspace is where it was built");
    let output = command::cargo()
        .args(args)
        .current_dir(layout.workspace())
        .env("CARGO_TARGET_DIR", layout.root().join("habits"))
        .env("RUSTDOCFLAGS", "-Dwarnings")
        .output()
        .expect("cargo starts");
    assert!(
        output.status.success(),
        "cargo {}\n{}{}",
        args.join(" "),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// `first`, the bare crates, `last`.
fn cargo_bare(first: &str, last: &[&str]) {
    let layout = Layout::find().expect("the workspace is where it was built");
    provision::provision(&layout, &Progress::silent()).expect("the target is there");
    let packages = BARE.iter().flat_map(|package| ["--package", package]);
    let args: Vec<&str> =
        [first, "--quiet", "--target", BARE_TARGET].into_iter().chain(packages).chain(last.iter().copied()).collect();
    cargo(&args);
}

#[test]
fn the_code_is_formatted() {
    cargo(&["fmt", "--all", "--check"]);
}

#[test]
fn no_lint_warns() {
    cargo(&["clippy", "--quiet", "--all-targets", "--", "-Dwarnings"]);
    cargo_bare("clippy", &["--", "-Dwarnings"]);
}

#[test]
fn the_documentation_has_no_dead_link() {
    cargo(&["doc", "--quiet", "--no-deps"]);
    cargo_bare("doc", &["--no-deps"]);
}
