//! The Intel processors with VMX and 64-bit mode that Bochs emulates.

use clap::builder::{PossibleValuesParser, TypedValueParser};

/// A processor model of Bochs.
#[derive(Debug, PartialEq, Eq)]
pub struct Model {
    /// Its name in Bochs.
    pub name: &'static str,
    /// The kind with which l1hv stops on it, because a feature is missing.
    pub stop: Option<&'static str>,
}

/// All models, in the order in which Intel sold them.
pub static MODELS: [Model; 13] = [
    stopping("core2_penryn_t9600", "no-ept"),
    stopping("corei5_lynnfield_750", "no-unrestricted-guest"),
    running("corei5_arrandale_m520"),
    running("corei7_sandy_bridge_2600k"),
    running("corei7_ivy_bridge_3770k"),
    running("corei7_haswell_4770"),
    running("broadwell_ult"),
    running("corei7_skylake_x"),
    running("corei3_cnl"),
    running("corei7_icelake_u"),
    running("tigerlake"),
    running("sapphire_rapids"),
    running("arrow_lake"),
];

const fn running(name: &'static str) -> Model {
    Model { name, stop: None }
}

const fn stopping(name: &'static str, stop: &'static str) -> Model {
    Model { name, stop: Some(stop) }
}

impl Model {
    /// The model with this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        MODELS.iter().find(|model| model.name == name)
    }
}

/// Parses a model's name on a command line. The error for another word lists all names.
pub fn parser() -> impl TypedValueParser<Value = &'static Model> {
    PossibleValuesParser::new(MODELS.iter().map(|model| model.name))
        .try_map(|name| Model::named(&name).ok_or("no such model"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_none_is_answered_with_all() {
        let argument = clap::Arg::new("model").long("model").value_parser(parser());
        let command = clap::Command::new("command").arg(argument);
        let parsed = |name| command.clone().try_get_matches_from(["command", "--model", name]);
        let model = parsed("arrow_lake").unwrap().get_one::<&Model>("model").copied();
        assert_eq!(model, Model::named("arrow_lake"));
        let error = parsed("pentium").unwrap_err().to_string();
        assert!(MODELS.iter().all(|model| error.contains(model.name)), "{error}");
    }
}
