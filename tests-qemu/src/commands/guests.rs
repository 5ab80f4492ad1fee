//! `cargo l1hv guests`.

use anyhow::Result;

use super::BadArgument;
use crate::build;
use crate::guests::{self, Context};
use crate::layout::Layout;
use crate::machine::Module;
use crate::progress::Progress;
use crate::provision;

/// Arguments of `guests`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Rows of the table [default: all].
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

/// Runs the guests; the exit status is 1 if any does not do what it should.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    if let Some(name) = args.names.iter().find(|name| !guests::names().any(|known| known == name.as_str())) {
        let known: Vec<&str> = guests::names().collect();
        return Err(BadArgument(format!("{name}: there are {}", known.join(", "))).into());
    }
    let provisioned = provision::provision(layout, progress)?;
    let programs = build::guest_programs(layout, progress)?;
    let l1hv = Module::new(build::l1hv(layout, progress)?);
    let context = Context { layout, progress, provisioned: &provisioned, programs: &programs, l1hv };
    Ok(u8::from(!guests::run(&context, &args.names)))
}
