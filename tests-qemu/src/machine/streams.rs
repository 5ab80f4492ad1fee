//! A log file that grows, read line by line.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

/// GRUB clears the screen before the guest writes its first line.
const CLEAR_SCREEN: &str = "\x1b[H\x1b[J\x1b[1;1H";

/// Follows a file from its beginning. The file need not exist yet.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    file: Option<File>,
    pending: Vec<u8>,
}

impl Follower {
    /// Follows the file at `path`.
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: None, pending: Vec::new() }
    }

    /// The lines completed since the last call. A guest may write any bytes: invalid UTF-8 becomes U+FFFD, carriage
    /// returns and NULs are removed.
    pub fn lines(&mut self) -> Vec<String> {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok();
        }
        if let Some(file) = &mut self.file {
            // An error here appears as silence, which has its own limit.
            let _ = file.read_to_end(&mut self.pending);
        }
        let Some(end) = self.pending.iter().rposition(|&byte| byte == b'\n') else {
            return Vec::new();
        };
        let rest = self.pending.split_off(end + 1);
        let complete = std::mem::replace(&mut self.pending, rest);
        complete[..end].split(|&byte| byte == b'\n').map(clean).collect()
    }

    /// The text after the last newline.
    pub fn unfinished(&mut self) -> Option<String> {
        let rest = clean(&std::mem::take(&mut self.pending));
        (!rest.is_empty()).then_some(rest)
    }
}

fn clean(line: &[u8]) -> String {
    String::from_utf8_lossy(line).trim_start_matches(CLEAR_SCREEN).chars().filter(|&c| c != '\r' && c != '\0').collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_line_is_reported_once_it_is_complete() {
        let path = std::env::temp_dir().join(format!("l1hv-follow-{}", std::process::id()));
        let mut follower = Follower::new(path.clone());
        assert!(follower.lines().is_empty(), "the file is not there yet");
        let mut file = File::create(&path).unwrap();
        file.write_all(b"one\r\ntw").unwrap();
        assert_eq!(follower.lines(), ["one"]);
        file.write_all(b"o\n\nthr").unwrap();
        assert_eq!(follower.lines(), ["two", ""]);
        assert_eq!(follower.unfinished().as_deref(), Some("thr"));
        std::fs::remove_file(path).unwrap();
    }
}
