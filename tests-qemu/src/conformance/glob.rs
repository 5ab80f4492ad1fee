//! Patterns for case names.

/// Whether `name` matches `pattern`: `*` stands for any text, `?` for one character, `{a,b}` for either.
///
/// ```
/// use tests_qemu::conformance::matches;
/// assert!(matches("fields/0x20{16,18}*", "fields/0x2018-high"));
/// assert!(matches("*/cr?-bit-*", "insn/cr0-bit-5"));
/// assert!(!matches("fields/*", "insn/vmxon"));
/// ```
pub fn matches(pattern: &str, name: &str) -> bool {
    if let Some((before, rest)) = pattern.split_once('{')
        && let Some((choices, after)) = rest.split_once('}')
    {
        return choices.split(',').any(|choice| matches(&format!("{before}{choice}{after}"), name));
    }
    plain(pattern.as_bytes(), name.as_bytes())
}

fn plain(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((b'*', rest)) => (0..=name.len()).any(|skipped| plain(rest, &name[skipped..])),
        Some((b'?', rest)) => !name.is_empty() && plain(rest, &name[1..]),
        Some((byte, rest)) => name.first() == Some(byte) && plain(rest, &name[1..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_may_be_several_and_hold_stars() {
        assert!(matches("{a,b*}/{c,d}", "bee/d"));
        assert!(!matches("{a,b*}/{c,d}", "bee/e"));
        assert!(matches("*", ""));
        assert!(!matches("?", ""));
    }
}
