//! Permissions as text: `NAME:ACCESS,NAME:ACCESS`. A later item overrides an earlier one.
//!
//! `NAME` is a field's name in the table; a `*` at its end stands for every field that begins so. `ACCESS` is `none`,
//! `r`, `w` or `rw`. With a `*`, each field gets the part of ACCESS that it allows; a single field must allow all of
//! it, else the list is an error.

use core::fmt;

use super::{Access, Denied, Permissions};
use crate::fields::FieldId;

/// What is wrong with a list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ListError<'a> {
    /// Not of the form `NAME:ACCESS`.
    Form(&'a str),
    /// No field of the table has this name, or begins with it.
    NoSuchName(&'a str),
    /// The field cannot be granted so.
    Denied(Denied),
}

impl fmt::Display for ListError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Form(item) => write!(f, "\"{item}\" is not FIELD:ACCESS, with access none, r, w or rw"),
            Self::NoSuchName(name) => write!(f, "\"{name}\" names no VMCS field: use a name of the field table"),
            Self::Denied(denied) => denied.fmt(f),
        }
    }
}

impl core::error::Error for ListError<'_> {}

impl Permissions {
    /// Applies a list to the permissions.
    ///
    /// # Errors
    ///
    /// The first item that cannot be applied; the permissions are as before then.
    pub fn apply<'a>(&mut self, list: &'a str) -> Result<(), ListError<'a>> {
        let mut permissions = *self;
        for item in list.split(',').filter(|item| !item.is_empty()) {
            permissions.apply_item(item)?;
        }
        *self = permissions;
        Ok(())
    }

    fn apply_item<'a>(&mut self, item: &'a str) -> Result<(), ListError<'a>> {
        let (name, wanted) = item.split_once(':').ok_or(ListError::Form(item))?;
        let wanted = match wanted {
            "none" => Access::empty(),
            "r" => Access::READ,
            "w" => Access::WRITE,
            "rw" => Access::READ | Access::WRITE,
            _ => return Err(ListError::Form(item)),
        };
        if let Some(beginning) = name.strip_suffix('*') {
            let mut fields = FieldId::all().filter(|id| id.info().name.starts_with(beginning)).peekable();
            fields.peek().ok_or(ListError::NoSuchName(name))?;
            let offered = self.offered;
            for id in fields.filter(|&id| offered.contains(id)) {
                self.set(id, wanted & self.most(id)).map_err(ListError::Denied)?;
            }
            return Ok(());
        }
        let id = FieldId::all().find(|id| id.info().name == name).ok_or(ListError::NoSuchName(name))?;
        self.set(id, wanted).map_err(ListError::Denied)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::Policy;
    use crate::fake::skylake_caps;
    use crate::fields::*;
    use std::string::ToString;

    fn widest() -> Permissions {
        Permissions::widest(&skylake_caps().offered(&Policy::EVERYTHING))
    }

    #[test]
    fn later_items_win_and_a_star_takes_what_there_is() {
        let mut permissions = widest();
        permissions.apply("*:none,HOST_*:rw,GUEST_R*:rw,GUEST_RSP:w").unwrap();
        assert_eq!(permissions.get(GUEST_RIP.id()), Access::all());
        assert_eq!(permissions.get(GUEST_RSP.id()), Access::WRITE);
        assert_eq!(permissions.get(GUEST_CR0.id()), Access::empty());
        assert_eq!(permissions.get(HOST_RIP.id()), Access::empty());
    }

    #[test]
    fn a_list_with_an_error_changes_nothing_and_the_error_names_the_item() {
        for (list, named) in [
            ("GUEST_RIP:none,GUEST_RSP", "\"GUEST_RSP\""),
            ("GUEST_RIP:none,GUEST_RSP:x", "\"GUEST_RSP:x\""),
            ("GUEST_RIP:none,RIP:r", "\"RIP\""),
            ("GUEST_RIP:none,guest_*:r", "\"guest_*\""),
            ("GUEST_RIP:none,HOST_RIP:r", "HOST_RIP"),
        ] {
            let mut permissions = widest();
            let error = permissions.apply(list).unwrap_err().to_string();
            assert!(error.contains(named), "{list}: {error}");
            assert_eq!(permissions, widest(), "{list}");
        }
    }
}
