//! Debian's archive, from the mirror that this machine is configured for.
//!
//! The lists live in a directory of our own: no root needed, the system's lists stay as they are, and a
//! newer release's sources can be used without mixing releases. apt checks every signature.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::stamp;
use crate::command::{self, which};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const HELPER: &str = "/usr/lib/apt/apt-helper";

/// Release of the binary packages.
pub const RELEASE: &str = "bookworm";
/// Release of the sources of Bochs.
const SOURCE_RELEASE: &str = "trixie";

/// A private view of the archive.
#[derive(Debug)]
pub struct Archive {
    dir: PathBuf,
}

impl Archive {
    /// A view whose state is kept in `dir`; nothing is fetched yet.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The file that names the mirror.
    pub fn sources_file(&self) -> PathBuf {
        self.dir.join("archive.sources")
    }

    /// Fetches the lists, unless this has been done.
    pub fn refresh(&self) -> Result<()> {
        ensure!(which("apt-get").is_some(), "apt-get is not here: this is not a Debian system");
        ensure!(Path::new(KEYRING).is_file(), "{KEYRING} is not here (Debian package debian-archive-keyring)");
        let sources = sources(&configured_uris("/etc/apt")?)?;
        let key = stamp::digest([sources.as_bytes()]);
        if stamp::is_fresh(&self.dir, &key) {
            return Ok(());
        }
        stamp::make(&self.dir, &key, |dir| {
            fs::create_dir_all(dir.join("lists/partial"))?;
            fs::write(dir.join("archive.sources"), &sources)?;
            command::output(apt("apt-get", dir).arg("update"))?;
            Ok(())
        })
        .context("cannot fetch Debian's package lists")
    }

    /// Fetches the lists again, when they name files that the mirror no longer has.
    pub fn refresh_anew(&self) -> Result<()> {
        if self.dir.exists() {
            fs::remove_dir_all(&self.dir)?;
        }
        self.refresh()
    }

    /// Names of the packages that begin with `prefix`.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = command::output(apt("apt-cache", &self.dir).args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Downloads binary package `name` into `dir` and returns the file.
    pub fn download(&self, name: &str, dir: &Path) -> Result<PathBuf> {
        let download = || command::output(apt("apt-get", &self.dir).args(["download", name]).current_dir(dir));
        if download().is_err() {
            self.refresh_anew()?;
            download().with_context(|| format!("cannot download Debian package {name}"))?;
        }
        fs::read_dir(dir)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get download {name} left no package file"))
    }

    /// Downloads `file` of source package `name` to `path`, if its SHA-256 is `sha256`.
    pub fn download_source(&self, name: &str, file: &str, sha256: &str, path: &Path) -> Result<()> {
        let uris = command::output(apt("apt-get", &self.dir).args(["source", "--print-uris", name]))?;
        let uri = uris.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            let uri = words.next()?.trim_matches('\'');
            (words.next()? == file).then_some(uri)
        });
        let Some(uri) = uri else {
            bail!("Debian {SOURCE_RELEASE} has no source file {file} in package {name}");
        };
        let sum = format!("SHA256:{sha256}");
        command::output(Command::new(HELPER).arg("download-file").arg(uri).arg(path).arg(sum))
            .with_context(|| format!("cannot download {file}"))?;
        ensure!(stamp::file_digest(path)? == sha256, "{file} has the wrong SHA-256");
        Ok(())
    }
}

/// `program` of apt, which uses only the lists in `dir`.
fn apt(program: &str, dir: &Path) -> Command {
    let mut command = Command::new(program);
    for (option, value) in [
        ("Dir::Etc::sourcelist", dir.join("archive.sources").display().to_string()),
        ("Dir::Etc::sourceparts", "/nonexistent".into()),
        ("Dir::State::lists", dir.join("lists").display().to_string()),
        // Caches would be written to system directories.
        ("Dir::Cache::pkgcache", String::new()),
        ("Dir::Cache::srcpkgcache", String::new()),
    ] {
        command.arg("-o").arg(format!("{option}={value}"));
    }
    command
}

/// The sources file of our view.
fn sources(uris: &BTreeSet<String>) -> Result<String> {
    let ends_with = |suffix| uris.iter().find(|uri| uri.trim_end_matches('/').ends_with(suffix));
    let Some(main) = ends_with("/debian") else {
        bail!("apt's configuration names no Debian mirror (an address that ends in /debian)");
    };
    let entry = |types, uri, suites| {
        format!("Types: {types}\nURIs: {uri}\nSuites: {suites}\nComponents: main\nSigned-By: {KEYRING}\n\n")
    };
    let mut text = entry("deb", main, RELEASE) + &entry("deb-src", main, SOURCE_RELEASE);
    if let Some(security) = ends_with("/debian-security") {
        text += &entry("deb", security, &format!("{RELEASE}-security"));
    }
    Ok(text)
}

/// The archive addresses in apt's configuration below `etc_apt`, of both file formats.
fn configured_uris(etc_apt: &str) -> Result<BTreeSet<String>> {
    let etc_apt = Path::new(etc_apt);
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(entries) = fs::read_dir(etc_apt.join("sources.list.d")) {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    Ok(files.iter().filter_map(|file| fs::read_to_string(file).ok()).flat_map(|text| uris_of(&text)).collect())
}

fn uris_of(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| ["deb ", "deb-src ", "URIs:"].iter().any(|start| line.starts_with(start)))
        .flat_map(str::split_whitespace)
        .filter(|word| word.contains(":/") && !word.starts_with('['))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_found_in_both_file_formats() {
        let deb822 = "Types: deb\n# URIs: x://no/debian\nURIs: a://m/debian\nSuites: bookworm\n";
        let one_line = "deb [signed-by=/k] b://m/debian-security bookworm-security main\n#deb c://m d\n";
        assert_eq!(uris_of(deb822), ["a://m/debian"]);
        assert_eq!(uris_of(one_line), ["b://m/debian-security"]);
    }

    #[test]
    fn a_system_without_a_debian_mirror_is_told_so() {
        let error = sources(&BTreeSet::from(["a://m/ubuntu".to_owned()])).unwrap_err();
        assert!(error.to_string().contains("no Debian mirror"));
    }

    #[test]
    fn sources_and_packages_come_from_the_configured_mirror() {
        let uris = ["a://m/debian/", "a://m/debian-security"].map(str::to_owned);
        let text = sources(&BTreeSet::from(uris)).unwrap();
        assert!(text.contains("Types: deb-src\nURIs: a://m/debian/\nSuites: trixie\n"));
        assert!(text.contains("URIs: a://m/debian-security\nSuites: bookworm-security\n"));
    }
}
