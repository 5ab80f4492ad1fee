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
    let suite = Suite::build(layout, progress, provisioned, Place::model(model))?;
    let found = match model.stop {
        Some(kind) => suite.must_stop(mode, kind)?.map_or(Found::Stops(kind.to_owned()), Found::Failed),
        None => match suite.compare([mode], filter) {
            Ok([report]) => Found::Compared(report),
            Err(error) => Found::Failed(format!("{error:#}")),
        },
    };
    Ok(OfProcessor { processor: model.name.to_owned(), found })
}
