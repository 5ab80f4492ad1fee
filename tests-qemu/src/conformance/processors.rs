//! The suite's results on several processors, as one table.

use std::fmt;

use serde::Serialize;
use table::Table;

use super::Report;

/// The result on a processor.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Found {
    /// The comparison of both runs.
    Compared(Report),
    /// l1hv stops because a feature is missing: the kind of the stop, and perhaps its message.
    Stops(String),
    /// There is nothing to compare: the reason.
    Failed(String),
}

/// A processor and the result on it.
#[derive(Debug, Serialize)]
pub struct OfProcessor {
    /// The processor's name, or the feature that it lacks.
    pub processor: String,
    /// The result.
    pub found: Found,
}

impl OfProcessor {
    /// Whether nothing differs, or l1hv stops for another reason than a defect of its own.
    pub fn is_right(&self) -> bool {
        match &self.found {
            Found::Compared(report) => report.different == 0,
            Found::Stops(reason) => !reason.starts_with("internal"),
            Found::Failed(_) => false,
        }
    }
}

impl fmt::Display for OfProcessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processor, found } = self;
        match found {
            Found::Compared(report) => write!(f, "{processor}: {report}"),
            Found::Stops(reason) => write!(f, "{processor}: l1hv stops: {reason}"),
            Found::Failed(why) => write!(f, "{processor}: {why}"),
        }
    }
}

/// All processors' results, as a table.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Verdicts(pub Vec<OfProcessor>);

impl Verdicts {
    /// Whether the results of all processors are right.
    pub fn are_right(&self) -> bool {
        self.0.iter().all(OfProcessor::is_right)
    }
}

impl fmt::Display for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&["processor", "l1hv", "cases", "equal", "explained", "different"]);
        for OfProcessor { processor, found } in &self.0 {
            match found {
                Found::Compared(Report { cases, equal, explained, different, .. }) => {
                    let numbers = [cases, equal, explained, different].map(|&number| Some(number as u64));
                    table.row_of(&[processor, "runs"], numbers);
                }
                Found::Stops(reason) => table.row_of(&[processor, &format!("stops: {reason}")], [None; 4]),
                Found::Failed(_) => table.row_of(&[processor, "FAILED"], [None; 4]),
            }
        }
        f.write_str(&table.render())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(found: Found) -> OfProcessor {
        OfProcessor { processor: "p".to_owned(), found }
    }

    #[test]
    fn a_processor_is_right_if_nothing_differs_or_l1hv_stops_as_it_should() {
        let verdicts = Verdicts(vec![of(Found::Compared(Report::default())), of(Found::Stops("no-ept".into()))]);
        assert!(verdicts.are_right());
        let table = verdicts.to_string();
        assert!(table.contains("stops: no-ept") && table.contains("runs"), "{table}");
        let differs = Report { different: 1, ..Report::default() };
        for wrong in [Found::Compared(differs), Found::Failed("does not end".into())] {
            assert!(!Verdicts(vec![of(wrong)]).are_right());
        }
    }

    #[test]
    fn a_stop_that_names_the_lack_is_right_and_a_defect_is_not() {
        assert!(of(Found::Stops("no-ept: this processor's VMX has no EPT".to_owned())).is_right());
        assert!(!of(Found::Stops("internal: a defect of l1hv".to_owned())).is_right());
        assert!(!of(Found::Failed("bare: timeout".to_owned())).is_right());
    }
}
