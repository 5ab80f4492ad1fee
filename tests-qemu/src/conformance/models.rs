//! The suite on one model of the emulated processor after the other: one table.

use std::fmt;

use anyhow::Result;
use serde::Serialize;

use super::{Mode, Place, Report, Suite};
use crate::layout::Layout;
use crate::models::Model;
use crate::progress::Progress;
use crate::provision::Provisioned;
use crate::table::Table;

/// What the suite found on a model.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Found {
    /// The comparison of both runs.
    Compared(Report),
    /// l1hv stops for want of a feature, and says so.
    Stops(&'static str),
    /// There is nothing to compare; why.
    Failed(String),
}

/// A model and what the suite found on it.
#[derive(Debug, Serialize)]
pub struct OfModel {
    /// The model's name.
    pub model: &'static str,
    /// The result.
    pub found: Found,
}

/// Runs the suite on `model`, bare and under l1hv. A suite that does not end is a result, not an error.
pub fn of_model(
    layout: &Layout,
    progress: &Progress,
    provisioned: &Provisioned,
    model: &'static Model,
    (mode, filter): (Mode<'_>, Option<&str>),
) -> Result<OfModel> {
    let mut suite = Suite::build(layout, progress, provisioned, Place::model(model))?;
    let found = if let Some(kind) = model.stop {
        suite.must_stop(mode, kind)?.map_or(Found::Stops(kind), Found::Failed)
    } else if let Err(error) = suite.run_on_bare_machine() {
        Found::Failed(format!("{error:#}"))
    } else {
        Found::Compared(suite.under_l1hv(mode, filter)?)
    };
    Ok(OfModel { model: model.name, found })
}

impl OfModel {
    /// Whether nothing is wrong.
    pub fn is_right(&self) -> bool {
        match &self.found {
            Found::Compared(report) => report.different == 0,
            Found::Stops(_) => true,
            Found::Failed(_) => false,
        }
    }
}

impl fmt::Display for OfModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, found } = self;
        match found {
            Found::Compared(report) => write!(f, "{model}: {report}"),
            Found::Stops(kind) => write!(f, "{model}: l1hv stops: {kind}"),
            Found::Failed(why) => write!(f, "{model}: {why}"),
        }
    }
}

/// All models' results, as a table.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Verdicts(pub Vec<OfModel>);

impl Verdicts {
    /// Whether nothing is wrong on any of them.
    pub fn are_right(&self) -> bool {
        self.0.iter().all(OfModel::is_right)
    }
}

impl fmt::Display for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&["model", "l1hv", "cases", "equal", "explained", "different"]);
        for OfModel { model, found } in &self.0 {
            match found {
                Found::Compared(Report { cases, equal, explained, different, .. }) => {
                    let numbers = [cases, equal, explained, different].map(|&number| Some(number as u64));
                    table.row_of(&[model, "runs"], numbers);
                }
                Found::Stops(kind) => table.row_of(&[model, &format!("stops: {kind}")], [None; 4]),
                Found::Failed(_) => table.row_of(&[model, "FAILED"], [None; 4]),
            }
        }
        f.write_str(&table.render())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_right_if_nothing_differs_or_l1hv_stops_as_it_should() {
        let of = |found| OfModel { model: "p", found };
        let verdicts = Verdicts(vec![of(Found::Compared(Report::default())), of(Found::Stops("no-ept"))]);
        assert!(verdicts.are_right());
        let table = verdicts.to_string();
        assert!(table.contains("stops: no-ept") && table.contains("runs"), "{table}");
        let differs = Report { different: 1, ..Report::default() };
        for wrong in [Found::Compared(differs), Found::Failed("does not end".into())] {
            assert!(!Verdicts(vec![of(wrong)]).are_right());
        }
    }
}
