//! Hands the linker script and its options to the linker.

fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo:rerun-if-changed=l1hv.ld");
    println!("cargo:rerun-if-changed=build.rs");
    for argument in [
        format!("-T{directory}/l1hv.ld").as_str(),
        // The target's default is a position-independent executable; the boot code is linked for one address.
        "--no-pie",
        "-znorelro",
        // Packs file offsets as tightly as pages in memory, so that the multiboot header is within the file's first 8
        // KiB.
        "-zmax-page-size=4096",
        "--build-id=none",
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
