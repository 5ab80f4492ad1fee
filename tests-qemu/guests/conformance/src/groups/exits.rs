//! x
pub fn run(_: &mut crate::output::Suite) {}
