//! Hands the linker script and its options to the linker.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=image.ld");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
        println!("cargo::rustc-link-arg-bins=-T{directory}/image.ld");
        for argument in ["--no-pie", "-znorelro", "-zmax-page-size=4096", "--build-id=none"] {
            println!("cargo::rustc-link-arg-bins={argument}");
        }
    }
}
