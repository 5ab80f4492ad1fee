//! The directories: the workspace and the runner's part of the build directory.

use std::fs::{File, TryLockError};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result, ensure};

use crate::command;

/// A directory for the logs of a run, which is this run's until it is dropped.
#[derive(Debug)]
pub struct LogDir {
    path: PathBuf,
    _lock: File,
}

impl Deref for LogDir {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

/// The directories that everything else derives its paths from.
#[derive(Debug, Clone)]
pub struct Layout {
    workspace: PathBuf,
    target: PathBuf,
}

impl Layout {
    /// Finds the directories. Cargo says which checkout it runs this program for; a program that is run without it belongs
    /// to the checkout that it was built in. The build directory considers `CARGO_TARGET_DIR` and every cargo
    /// configuration file.
    pub fn find() -> Result<Self> {
        let runner = env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        ensure!(runner.is_dir(), "{} is gone: run cargo in the checkout of l1hv", runner.display());
        let workspace = runner.parent().context("the runner's crate has no parent directory")?.to_path_buf();
        let metadata = command::output(
            command::cargo()
                .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
                .current_dir(&workspace),
        )?;
        let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
        let target = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
        Ok(Self { workspace, target: target.into() })
    }

    /// The workspace's top directory.
    pub fn workspace(&self) -> &Path {
        &self.workspace
    }

    /// The directory of everything that the runner provisions, builds or logs.
    pub fn root(&self) -> PathBuf {
        self.target.join("l1hv")
    }

    /// Target directory of the nested cargo runs. It is not the workspace's, as the outer cargo may hold the lock of
    /// that.
    pub fn bare_target(&self) -> PathBuf {
        self.target.join("bare")
    }

    /// An empty directory for the logs of the run called `name`. While another run of this name goes on, its name has a
    /// number.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn fresh_log_dir(&self, name: &str) -> Result<LogDir> {
        let logs = self.root().join("logs");
        fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
        let names = std::iter::once(name.to_owned()).chain((2..).map(|number| format!("{name}-{number}")));
        for name in names {
            let lock = File::create(logs.join(format!(".{name}.lock")))?;
            match lock.try_lock() {
                Err(TryLockError::WouldBlock) => continue,
                other => other?,
            }
            let path = logs.join(name);
            if path.exists() {
                fs::remove_dir_all(&path).with_context(|| format!("cannot empty {}", path.display()))?;
            }
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
            return Ok(LogDir { path, _lock: lock });
        }
        unreachable!("numbers do not end")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_one_name_have_directories_of_their_own_while_they_go_on() {
        let target = env::temp_dir().join(format!("l1hv-logs-{}", std::process::id()));
        let layout = Layout { workspace: PathBuf::new(), target: target.clone() };
        let first = layout.fresh_log_dir("run").unwrap();
        fs::write(first.join("console.log"), "kept").unwrap();
        let second = layout.fresh_log_dir("run").unwrap();
        assert!(first.ends_with("logs/run") && second.ends_with("logs/run-2"));
        assert!(first.join("console.log").is_file());
        drop(first);
        let third = layout.fresh_log_dir("run").unwrap();
        assert!(third.ends_with("logs/run") && !third.join("console.log").exists());
        fs::remove_dir_all(target).unwrap();
    }
}
