//! The comparison, and its report.

use std::collections::{HashMap, HashSet};
use std::fmt;

use serde::Serialize;

use super::explained::Explained;
use super::glob::matches;

/// Differences that the text shows; the JSON has them all.
const SHOWN: usize = 40;

/// The comparison's verdict on a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The results are equal.
    Equal,
    /// The results differ, for a written reason.
    Explained,
    /// The results differ.
    Different,
}

/// One case.
#[derive(Debug, Serialize)]
pub struct Case {
    /// `GROUP/CASE`.
    pub name: String,
    /// Its result on the bare machine; `None` if the case did not run.
    pub bare: Option<String>,
    /// Its result under l1hv.
    pub l1hv: Option<String>,
    /// The verdict.
    pub verdict: Verdict,
    /// The reason of an explained difference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// All cases and their numbers.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Number of cases.
    pub cases: usize,
    /// Number of equal cases.
    pub equal: usize,
    /// Number of cases that differ for a written reason.
    pub explained: usize,
    /// Number of unexplained differences, including patterns of the list that explain nothing.
    pub different: usize,
    /// One record for each case.
    pub records: Vec<Case>,
    /// Errors that are not about single cases.
    pub notes: Vec<String>,
}

impl Report {
    /// Compares two runs' names and results. Only cases that match `filter` count.
    pub fn compare(
        bare: &[(String, String)],
        l1hv: &[(String, String)],
        explained: &Explained,
        filter: Option<&str>,
    ) -> Self {
        let mut report = Self::default();
        let mut used = HashSet::new();
        let mut under: HashMap<&str, &str> = l1hv.iter().map(|(name, result)| (&**name, &**result)).collect();
        let mut seen = HashSet::new();
        for (name, result) in bare {
            if !seen.insert(name) {
                report.note(format!("two cases are called {name}"));
            }
            report.add(name, Some(result), under.remove(&**name), explained, &mut used, filter);
        }
        for (name, result) in l1hv {
            if under.remove(&**name).is_some() {
                report.add(name, None, Some(result), explained, &mut used, filter);
            }
        }
        if filter.is_none() {
            for pattern in explained.patterns().filter(|pattern| !used.contains(pattern)) {
                report.note(format!("the list of explained differences has {pattern}, which explains nothing"));
            }
        }
        report
    }

    fn add<'e>(
        &mut self,
        name: &str,
        bare: Option<&String>,
        l1hv: Option<&str>,
        explained: &'e Explained,
        used: &mut HashSet<&'e str>,
        filter: Option<&str>,
    ) {
        if filter.is_some_and(|pattern| !matches(pattern, name)) {
            return;
        }
        let (bare, l1hv) = (bare.cloned(), l1hv.map(str::to_owned));
        let (verdict, reason) = match explained.of(name, bare.as_deref(), l1hv.as_deref()) {
            _ if bare == l1hv => (Verdict::Equal, None),
            Some((entry, pattern)) => {
                used.insert(pattern);
                (Verdict::Explained, Some(entry.reason.clone()))
            }
            None => (Verdict::Different, None),
        };
        self.cases += 1;
        match verdict {
            Verdict::Equal => self.equal += 1,
            Verdict::Explained => self.explained += 1,
            Verdict::Different => self.different += 1,
        }
        self.records.push(Case { name: name.to_owned(), bare, l1hv, verdict, reason });
    }

    /// Adds an error that is not about a single case. It counts as a difference.
    pub fn note(&mut self, note: String) {
        self.different += 1;
        self.notes.push(note);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let different = self.records.iter().filter(|case| case.verdict == Verdict::Different);
        for case in different.take(SHOWN) {
            writeln!(f, "{}", case.name)?;
            writeln!(f, "  bare: {}", case.bare.as_deref().unwrap_or("-"))?;
            writeln!(f, "  l1hv: {}", case.l1hv.as_deref().unwrap_or("-"))?;
        }
        for note in &self.notes {
            writeln!(f, "{note}")?;
        }
        let Self { cases, equal, explained, different, .. } = self;
        write!(f, "{cases} cases: {equal} equal, {explained} explained, {different} different")
    }
}

#[cfg(test)]
mod tests {
    use super::super::explained::Entry;
    use super::*;

    fn run(results: &[(&str, &str)]) -> Vec<(String, String)> {
        results.iter().map(|&(name, result)| (name.to_owned(), result.to_owned())).collect()
    }

    fn list(cases: &[&str]) -> Explained {
        let cases = cases.iter().map(|&case| case.to_owned()).collect();
        Explained { entry: vec![Entry { reason: "hidden".to_owned(), cases, ..Entry::default() }] }
    }

    #[test]
    fn a_difference_needs_a_reason() {
        let (bare, l1hv) =
            (run(&[("a/1", "x"), ("a/2", "x"), ("a/3", "x")]), run(&[("a/1", "x"), ("a/2", "y"), ("a/3", "y")]));
        let report = Report::compare(&bare, &l1hv, &list(&["a/2"]), None);
        assert_eq!((report.cases, report.equal, report.explained, report.different), (3, 1, 1, 1));
        assert_eq!(report.to_string().lines().last(), Some("3 cases: 1 equal, 1 explained, 1 different"));
    }

    #[test]
    fn a_case_that_only_one_of_them_reached_differs() {
        let report = Report::compare(&run(&[("a/1", "x")]), &run(&[("a/2", "x")]), &list(&[]), None);
        assert_eq!((report.cases, report.different), (2, 2));
    }

    #[test]
    fn a_pattern_that_explains_nothing_is_wrong_unless_cases_were_filtered_out() {
        let (bare, list) = (run(&[("a/1", "x"), ("b/1", "x")]), list(&["a/*"]));
        assert_eq!(Report::compare(&bare, &bare, &list, None).different, 1);
        let filtered = Report::compare(&bare, &bare, &list, Some("b/*"));
        assert_eq!((filtered.cases, filtered.different), (1, 0));
    }
}
