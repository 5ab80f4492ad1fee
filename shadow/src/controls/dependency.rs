//! Controls that depend on each other (SDM 27.2.1 "Checks on VMX Controls"), as one list. VM entry fails if a row is
//! broken; code that computes control words can check them beforehand.

use super::{EntryControls, ExitControls, Pin, Primary, Secondary, Tertiary};
use core::fmt;

/// The control words that depend on each other. A word that is not activated counts as 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ControlWords {
    /// Pin-based VM-execution controls.
    pub pin: Pin,
    /// Primary processor-based VM-execution controls.
    pub primary: Primary,
    /// Secondary processor-based VM-execution controls.
    pub secondary: Secondary,
    /// Tertiary processor-based VM-execution controls.
    pub tertiary: Tertiary,
    /// Primary VM-exit controls.
    pub exit: ExitControls,
    /// VM-entry controls.
    pub entry: EntryControls,
}

/// How one control depends on another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Relation {
    /// The control may be 1 only if the other is 1.
    Needs,
    /// The control may be 1 only if the other is 0.
    Excludes,
}

/// A row of the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dependency {
    /// The control that depends.
    pub control: &'static str,
    /// How `control` depends on `on`.
    pub relation: Relation,
    /// The other control.
    pub on: &'static str,
    /// The whole rule in words.
    pub rule: &'static str,
}

impl fmt::Display for Dependency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.rule)
    }
}

macro_rules! word_type {
    (pin) => {
        Pin
    };
    (primary) => {
        Primary
    };
    (secondary) => {
        Secondary
    };
    (tertiary) => {
        Tertiary
    };
    (exit) => {
        ExitControls
    };
    (entry) => {
        EntryControls
    };
}

macro_rules! rule {
    ($control:ident Needs $on:ident) => {
        concat!(stringify!($control), " needs ", stringify!($on))
    };
    ($control:ident Excludes $on:ident) => {
        concat!(stringify!($control), " excludes ", stringify!($on))
    };
}

macro_rules! row {
    ($control:ident $relation:ident $on:ident) => {
        Dependency {
            control: stringify!($control),
            relation: Relation::$relation,
            on: stringify!($on),
            rule: rule!($control $relation $on),
        }
    };
}

macro_rules! dependencies {
    ($($word:ident $control:ident $relation:ident $other_word:ident $other:ident;)*) => {
        impl Dependency {
            /// All of them.
            pub const ALL: &[Self] = &[$(row!($control $relation $other)),*];
        }

        impl ControlWords {
            /// Checks every row of the list. The rows are unrolled into code, because VM entry makes this check.
            ///
            /// ```
            /// use shadow::controls::{ControlWords, Pin};
            ///
            /// let words = ControlWords { pin: Pin::VIRTUAL_NMIS, ..ControlWords::default() };
            /// assert_eq!(words.check_dependencies().unwrap_err().to_string(), "VIRTUAL_NMIS needs NMI_EXITING");
            /// ```
            ///
            /// # Errors
            ///
            /// The first rule that the words break.
            pub fn check_dependencies(&self) -> Result<(), &'static Dependency> {
                $(
                    let wanted = matches!(Relation::$relation, Relation::Needs);
                    if self.$word.contains(<word_type!($word)>::$control)
                        && self.$other_word.contains(<word_type!($other_word)>::$other) != wanted
                    {
                        return Err(const { &row!($control $relation $other) });
                    }
                )*
                Ok(())
            }
        }
    };
}

dependencies! {
    // 27.2.1.1 "VM-Execution Control Fields".
    pin VIRTUAL_NMIS Needs pin NMI_EXITING;
    primary NMI_WINDOW_EXITING Needs pin VIRTUAL_NMIS;
    secondary VIRTUALIZE_X2APIC_MODE Needs primary USE_TPR_SHADOW;
    secondary APIC_REGISTER_VIRTUALIZATION Needs primary USE_TPR_SHADOW;
    secondary VIRTUAL_INTERRUPT_DELIVERY Needs primary USE_TPR_SHADOW;
    tertiary IPI_VIRTUALIZATION Needs primary USE_TPR_SHADOW;
    secondary VIRTUALIZE_X2APIC_MODE Excludes secondary VIRTUALIZE_APIC_ACCESSES;
    secondary VIRTUAL_INTERRUPT_DELIVERY Needs pin EXTERNAL_INTERRUPT_EXITING;
    pin PROCESS_POSTED_INTERRUPTS Needs secondary VIRTUAL_INTERRUPT_DELIVERY;
    pin PROCESS_POSTED_INTERRUPTS Needs exit ACKNOWLEDGE_INTERRUPT;
    secondary ENABLE_PML Needs secondary ENABLE_EPT;
    secondary UNRESTRICTED_GUEST Needs secondary ENABLE_EPT;
    secondary MODE_BASED_EXECUTE Needs secondary ENABLE_EPT;
    secondary SUB_PAGE_WRITE_PERMISSIONS Needs secondary ENABLE_EPT;
    secondary PT_USES_GUEST_PHYSICAL Needs secondary ENABLE_EPT;
    secondary PT_USES_GUEST_PHYSICAL Needs entry LOAD_RTIT_CTL;
    secondary PT_USES_GUEST_PHYSICAL Needs exit CLEAR_RTIT_CTL;
    // 27.2.1.2 "VM-Exit Control Fields".
    exit SAVE_PREEMPTION_TIMER Needs pin ACTIVATE_PREEMPTION_TIMER;
    // 27.2.1.3 "VM-Entry Control Fields".
    entry DEACTIVATE_DUAL_MONITOR Excludes entry ENTRY_TO_SMM;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Control words in which only the control of this name is 1.
    fn named(name: &str) -> ControlWords {
        ControlWords {
            pin: Pin::from_name(name).unwrap_or_default(),
            primary: Primary::from_name(name).unwrap_or_default(),
            secondary: Secondary::from_name(name).unwrap_or_default(),
            tertiary: Tertiary::from_name(name).unwrap_or_default(),
            exit: ExitControls::from_name(name).unwrap_or_default(),
            entry: EntryControls::from_name(name).unwrap_or_default(),
        }
    }

    fn set(words: &mut ControlWords, name: &str) {
        let bit = named(name);
        words.pin |= bit.pin;
        words.primary |= bit.primary;
        words.secondary |= bit.secondary;
        words.tertiary |= bit.tertiary;
        words.exit |= bit.exit;
        words.entry |= bit.entry;
    }

    fn clear(words: &mut ControlWords, name: &str) {
        let bit = named(name);
        words.pin -= bit.pin;
        words.primary -= bit.primary;
        words.secondary -= bit.secondary;
        words.tertiary -= bit.tertiary;
        words.exit -= bit.exit;
        words.entry -= bit.entry;
    }

    /// Sets a control, and recursively every control that it needs.
    fn set_with_needs(words: &mut ControlWords, name: &str) {
        set(words, name);
        for row in Dependency::ALL.iter().filter(|row| row.control == name && row.relation == Relation::Needs) {
            set_with_needs(words, row.on);
        }
    }

    #[test]
    fn each_dependency_is_broken_by_its_control_alone_and_kept_with_what_it_needs() {
        for row in Dependency::ALL {
            let (mut alone, mut complete) = (ControlWords::default(), ControlWords::default());
            set(&mut alone, row.control);
            set_with_needs(&mut complete, row.control);
            assert_eq!(complete.check_dependencies(), Ok(()), "{row}");
            match row.relation {
                Relation::Needs => assert_eq!(alone.check_dependencies().unwrap_err().control, row.control),
                Relation::Excludes => {
                    set_with_needs(&mut complete, row.on);
                    assert_eq!(complete.check_dependencies(), Err(row));
                }
            }
        }
    }

    #[test]
    fn each_need_is_noticed_when_only_it_is_missing() {
        for row in Dependency::ALL.iter().filter(|row| row.relation == Relation::Needs) {
            let mut words = ControlWords::default();
            set_with_needs(&mut words, row.control);
            clear(&mut words, row.on);
            assert_eq!(words.check_dependencies().unwrap_err().on, row.on, "{row}");
        }
    }
}
