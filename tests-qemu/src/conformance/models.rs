//! The suite on a model of the emulated processor.

use anyhow::Result;

use super::processors::{Found, OfProcessor};
use super::{Mode, Place, Suite};
use crate::layout::Layout;
use crate::models::Model;
use crate::progress::Progress;
use crate::provision::Provisioned;

/// Runs the suite on `model`, bare and under l1hv. A suite that does not end is a result, not an error.
pub fn of_model(
    layout: &Layout,
    progress: &Progress,
    provisioned: &Provisioned,
    model: &'static Model,
    (mode, filter): (Mode<'_>, Option<&str>),
) -> Result<OfProcessor> {
    let mut suite = Suite::build(layout, progress, provisioned, Place::model(model))?;
    let found = if let Some(kind) = model.stop {
        suite.must_stop(mode, kind)?.map_or(Found::Stops(kind.to_owned()), Found::Failed)
    } else if let Err(error) = suite.run_on_bare_machine() {
        Found::Failed(format!("{error:#}"))
    } else {
        Found::Compared(suite.under_l1hv(mode, filter)?)
    };
    Ok(OfProcessor { processor: model.name.to_owned(), found })
}
