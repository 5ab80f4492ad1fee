//! Progress on standard error: spinners on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Reports steps, of which several may be under way; a step that ends leaves one line with its duration.
#[derive(Debug)]
pub struct Progress {
    style: Style,
    spinners: MultiProgress,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Spinner,
    Lines,
    Silent,
}

impl Progress {
    /// A spinner for each step if standard error is a terminal, else lines.
    pub fn stderr() -> Self {
        Self::new(if std::io::stderr().is_terminal() { Style::Spinner } else { Style::Lines })
    }

    /// A progress that prints nothing.
    pub fn silent() -> Self {
        Self::new(Style::Silent)
    }

    fn new(style: Style) -> Self {
        Self { style, spinners: MultiProgress::new() }
    }

    /// Begins a step. Dropping the returned value without [`Step::done`] erases it.
    pub fn step(&self, what: impl Into<String>) -> Step {
        let what = what.into();
        let bar = match self.style {
            Style::Spinner => {
                let bar = self.spinners.add(ProgressBar::new_spinner().with_message(what.clone()));
                if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]") {
                    bar.set_style(style);
                }
                bar.enable_steady_tick(Duration::from_millis(100));
                bar
            }
            Style::Lines => {
                eprintln!("  {what} ...");
                ProgressBar::hidden()
            }
            Style::Silent => ProgressBar::hidden(),
        };
        Step { bar, what, began: Instant::now(), style: self.style }
    }
}

/// A step under way.
#[derive(Debug)]
pub struct Step {
    bar: ProgressBar,
    what: String,
    began: Instant,
    style: Style,
}

impl Step {
    /// Replaces the detail shown after the step's name.
    pub fn detail(&self, detail: &str) {
        self.bar.set_message(format!("{}: {detail}", self.what));
    }

    /// Prints a line above the spinners.
    pub fn line(&self, line: &str) {
        match self.style {
            Style::Spinner => self.bar.println(line),
            Style::Lines => eprintln!("{line}"),
            Style::Silent => {}
        }
    }

    /// Ends the step, leaving a line that says how long it took.
    pub fn done(self) {
        self.line(&format!("  {} ({:.1} s)", self.what, self.began.elapsed().as_secs_f64()));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
