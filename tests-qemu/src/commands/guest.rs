//! `cargo l1hv guest`: Debian's KVM as guest hypervisor, with work from the runner's own initrd.

use std::time::Duration;

use anyhow::Result;

use super::machine::MachineArgs;
use crate::build;
use crate::guest::{KvmEpt, Plan, Work};
use crate::layout::Layout;
use crate::machine::Module;
use crate::progress::Progress;
use crate::provision;

/// Arguments of `guest`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What the guest hypervisor does before it switches the machine off.
    #[arg(value_enum)]
    work: Work,
    /// Debian kernel series of the guest hypervisor.
    #[arg(long, default_value = "6.1")]
    series: String,
    /// KVM without EPT.
    #[arg(long)]
    no_ept: bool,
    /// Another parameter of kvm-intel; repeatable.
    #[arg(long, value_name = "NAME=VALUE")]
    kvm: Vec<String>,
    /// Processors of a nested Linux; with several, it and the guest hypervisor run a parallel workload.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    nested_cpus: u32,
    /// How often each does so.
    #[arg(long, value_name = "N", default_value_t = 1)]
    parallel_times: u32,
    /// On the machine itself, without l1hv.
    #[arg(long)]
    bare: bool,
    /// l1hv's command line.
    #[arg(long, value_name = "STRING", default_value = "stats")]
    hv_append: String,
    /// More kernel arguments of the guest hypervisor.
    #[arg(long, value_name = "STRING", default_value = "")]
    append: String,
    #[command(flatten)]
    options: MachineArgs,
    /// Limit on the run, in wall-clock seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
}

/// Runs the machine, and prints all its output.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let provisioned = provision::provision(layout, progress)?;
    let programs = build::guest_programs(layout, progress)?;
    let emulator = args.options.emulator()?;
    let ept = if args.no_ept { KvmEpt::Off } else { KvmEpt::On };
    let parameters: Vec<&str> = args.kvm.iter().map(String::as_str).collect();
    let plan = Plan {
        parameters: &parameters,
        nested_cpus: args.nested_cpus,
        parallel_times: args.parallel_times,
        ..Plan::new(provisioned.kernel(&args.series)?, args.work, ept)
    };
    let mut guest = plan.prepare(layout, &provisioned, &programs, emulator, args.options.ips)?;
    guest.kernel.args = format!("{} {}", guest.kernel.args, args.append);
    let boot = if args.bare {
        guest.on_bare_machine()
    } else {
        guest.under(Module::with_args(build::l1hv(layout, progress)?, &args.hv_append))
    };
    args.options.run("guest", boot, Vec::new(), Duration::from_secs(args.timeout), layout, &provisioned)
}
