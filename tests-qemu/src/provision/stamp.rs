//! Directories that are complete or absent.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

const STAMP: &str = ".made-from";

/// Whether `dir` was completed from `key`.
pub fn is_fresh(dir: &Path, key: &str) -> bool {
    fs::read_to_string(dir.join(STAMP)).is_ok_and(|stamp| stamp == key)
}

/// Makes `dir` by calling `fill` on an empty directory beside it, which replaces `dir` when `fill` has succeeded: an
/// interrupted run leaves nothing that looks complete.
pub fn make(dir: &Path, key: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let staging = staging_of(dir);
    remove(&staging)?;
    fs::create_dir_all(&staging).with_context(|| format!("cannot create {}", staging.display()))?;
    fill(&staging)?;
    fs::write(staging.join(STAMP), key)?;
    remove(dir)?;
    fs::rename(&staging, dir).with_context(|| format!("cannot move {} into place", dir.display()))
}

fn staging_of(dir: &Path) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    dir.with_file_name(name)
}

fn remove(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    Ok(())
}

/// SHA-256 of `parts`, each preceded by its length so that no two lists share a digest.
pub fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

/// SHA-256 of one file's content.
pub fn file_digest(path: &Path) -> Result<String> {
    let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex(&Sha256::digest(content)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_fill_leaves_nothing_that_looks_complete() {
        let dir = std::env::temp_dir().join(format!("l1hv-stamp-{}", std::process::id()));
        let failed = make(&dir, "key", |_| anyhow::bail!("no"));
        assert!(failed.is_err() && !dir.exists());
        make(&dir, "key", |staging| Ok(fs::write(staging.join("file"), "content")?)).unwrap();
        assert!(is_fresh(&dir, "key") && !is_fresh(&dir, "another key"));
        assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "content");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn the_digest_depends_on_where_one_part_ends() {
        let one: [&[u8]; 2] = [b"ab", b"c"];
        let other: [&[u8]; 2] = [b"a", b"bc"];
        assert_ne!(digest(one), digest(other));
    }
}
