//! `cargo l1hv profile`.

use anyhow::Result;

use crate::bench::{Bench, MEMORY_MIB};
use crate::build;
use crate::guest::KvmEpt;
use crate::layout::Layout;
use crate::machine::{BOCHS, MachineOptions};
use crate::profile;
use crate::progress::Progress;
use crate::provision;

/// Arguments of `profile`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Debian kernel series of the guest hypervisor.
    #[arg(long, default_value = "6.1")]
    series: String,
    /// KVM without EPT.
    #[arg(long)]
    no_ept: bool,
}

/// Prints the profile, the proposal and its effect.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let provisioned = provision::provision(layout, progress)?;
    let programs = build::guest_programs(layout, progress)?;
    let ept = if args.no_ept { KvmEpt::Off } else { KvmEpt::On };
    let (provisioned, programs, series) = (&provisioned, &programs, args.series.as_str());
    let options = MachineOptions { memory_mib: MEMORY_MIB, ..MachineOptions::default() };
    let profile = profile::run(
        &Bench { layout, progress, provisioned, programs, series, emulator: BOCHS, options: &options },
        ept,
    )?;
    println!("\nAccesses to VMCS fields, from power-on to the end of the payload; exits: as l1hv grants by default.\n");
    print!("{}", profile.fields());
    println!("\nProposal for l1hv's command line:\n\n  shadow={}\n", profile.proposal);
    println!("The payload with nothing granted (before) and with the proposal (after), medians of 1,000:\n");
    print!("{}", profile.worth()?);
    Ok(0)
}
