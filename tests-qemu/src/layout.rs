//! The directories: the workspace and the runner's part of the build directory.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result, ensure};

use crate::command;

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

    /// An empty directory for the logs of the run called `name`.
    pub fn fresh_log_dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.root().join("logs").join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot empty {}", dir.display()))?;
        }
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(dir)
    }
}
