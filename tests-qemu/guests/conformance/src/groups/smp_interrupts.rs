//! Interrupts between processors, each counted by its handler: none is lost, and none arrives twice (SDM 12 "Advanced
//! Programmable Interrupt Controller (APIC)", 26.2 "Other Causes of VM Exits", 27.6.1 "Vectored-Event Injection", 28.2
//! "Recording VM-Exit Information and Updating VM-entry Control Fields").

mod hypervisor;
mod nmi;
mod posted;
mod traffic;

use core::arch::global_asm;

use crate::apic::{self, Message};
use crate::fault::take_interrupt;
use crate::output::Suite;
use crate::smp::{self, Counters, Meeting, Processors, TAKEN};

use hypervisor::{Hypervisor, Level, Program, Way};
use traffic::Traffic;

global_asm!(include_str!("smp_interrupts/counting.S"), options(att_syntax));

unsafe extern "C" {
    static counting_handlers: u8;
    static end_injected: u8;
    static end_delivered: u8;
    static end_virtual: u8;
}

/// The interrupts that the nested guests have counted.
#[unsafe(link_section = ".shared")]
static HANDLED: Counters = Counters::new();

/// Where the processors meet when all are ready to receive, and when all have sent everything.
#[unsafe(link_section = ".shared")]
static READY: Meeting = Meeting::new();
#[unsafe(link_section = ".shared")]
static SENT: Meeting = Meeting::new();

/// One way to receive.
struct Case {
    name: &'static str,
    level: Level,
    way: Option<(Way, Program)>,
}

const CASES: &[Case] = &[
    Case { name: "host-without-guest", level: Level::Host, way: None },
    Case { name: "host-later", level: Level::Host, way: Some((Way::Waits, Program::Busy)) },
    Case { name: "host-exits", level: Level::Host, way: Some((Way::Exits, Program::Busy)) },
    Case { name: "host-exits-halted", level: Level::Host, way: Some((Way::Exits, Program::Halts)) },
    Case { name: "host-acknowledged", level: Level::Host, way: Some((Way::ExitsAcknowledged, Program::Busy)) },
    Case { name: "nested-delivered", level: Level::NestedGuest, way: Some((Way::Delivered, Program::Busy)) },
    Case { name: "nested-delivered-halted", level: Level::NestedGuest, way: Some((Way::Delivered, Program::Halts)) },
    Case { name: "nested-injected", level: Level::NestedGuest, way: Some((Way::Exits, Program::Busy)) },
    Case { name: "nested-injected-halted", level: Level::NestedGuest, way: Some((Way::Exits, Program::Halts)) },
    Case { name: "nested-acknowledged", level: Level::NestedGuest, way: Some((Way::ExitsAcknowledged, Program::Busy)) },
    Case {
        name: "nested-acknowledged-halted",
        level: Level::NestedGuest,
        way: Some((Way::ExitsAcknowledged, Program::Halts)),
    },
];

impl Case {
    /// The counters of this case's interrupts.
    fn counters(&self) -> &'static Counters {
        match self.level {
            Level::Host => &TAKEN,
            Level::NestedGuest => &HANDLED,
        }
    }
}

/// Runs all cases.
pub fn run(suite: &mut Suite, processors: &Processors) {
    let all = |_: &str| true;
    interrupts(suite, processors, all);
    nmi::run(suite, processors, all);
}

/// Runs all cases of posted interrupts: a group of their own, as not every hypervisor below has what they need.
pub fn run_posted(suite: &mut Suite, processors: &Processors) {
    posted::run(suite, processors, |_| true);
}

/// Posts interrupts with every local APIC in x2APIC mode, in which the notifications are sent differently.
pub fn run_posted_in_x2apic_mode(suite: &mut Suite, processors: &Processors) {
    let _ = processors.run_on_all(apic::enter_x2apic_mode, 0);
    posted::run(suite, processors, |name| name == "posted");
    let _ = processors.run_on_all(apic::leave_x2apic_mode, 0);
}

/// The cases whose interrupts are sent and ended differently in x2APIC mode. A nested guest that takes an interrupt
/// from the machine's APIC would end it as in xAPIC mode.
const IN_X2APIC_MODE: [&str; 5] =
    ["host-without-guest", "host-exits", "nested-acknowledged", "nmi-host", "nmi-virtual"];

/// Runs these cases with every local APIC in x2APIC mode, and a start of each processor in that mode (SDM 12.12
/// "Extended XAPIC (x2APIC)"): INIT leaves the mode as it is.
pub fn run_in_x2apic_mode(suite: &mut Suite, processors: &Processors) {
    let bases = processors.run_on_all(apic::enter_x2apic_mode, 0);
    suite.case("base", format_args!("{:x?}", &bases[..processors.count()]));
    let is_wanted = |name: &str| IN_X2APIC_MODE.contains(&name);
    interrupts(suite, processors, is_wanted);
    nmi::run(suite, processors, is_wanted);
    for number in processors.others() {
        let _ = processors.run_on(number, smp::leave_vmx, 0);
        processors.restart(number);
        let id = processors.run_on(number, |_| apic::id() as u64, 0);
        let entered = processors.run_on(number, smp::enter_vmx, 0);
        suite.case(format_args!("{number}-restarted"), format_args!("id={id} vmxon={entered}"));
    }
    let bases = processors.run_on_all(apic::leave_x2apic_mode, 0);
    suite.case("base-afterwards", format_args!("{:x?}", &bases[..processors.count()]));
}

fn interrupts(suite: &mut Suite, processors: &Processors, is_wanted: impl Fn(&str) -> bool) {
    for (index, case) in CASES.iter().enumerate().filter(|(_, case)| is_wanted(case.name)) {
        for vector in traffic::vectors() {
            TAKEN.forget(vector);
            HANDLED.forget(vector);
        }
        READY.clear();
        SENT.clear();
        let defects = processors.run_on_all(take_part, index as u64);
        let total = traffic::total(case.counters());
        if traffic::is_right(case.counters()) && defects.iter().all(|&defect| defect == 0) {
            suite.case(case.name, format_args!("{total} sent, {total} counted"));
        } else {
            suite.case(case.name, format_args!("wrong: {total} counted, defects {defects:x?}"));
        }
    }
}

/// Sends and receives until all processors have sent everything.
fn take_part(index: u64) -> u64 {
    let case = &CASES[index as usize];
    let mut traffic =
        Traffic::new(case.counters(), |receiver, vector| apic::send(receiver, Message::Interrupt(vector)));
    let mut hypervisor = case.way.map(|(way, program)| Hypervisor::new(way, case.level, program, &HANDLED));
    let mut is_over = false;
    READY.join();
    while !SENT.is_complete() {
        traffic.send();
        let defect = hypervisor.as_ref().and_then(|hypervisor| hypervisor.defect);
        if !is_over && (defect.is_some() || traffic.is_over()) {
            is_over = true;
            SENT.arrive();
        }
        if let Some(defect) = defect {
            return defect.code();
        }
        match &mut hypervisor {
            Some(hypervisor) => hypervisor.round(),
            None => {
                let _ = take_interrupt();
                let _ = core::arch::x86_64::__cpuid(0);
            }
        }
    }
    0
}
