//! The options for the image of a command, and the image.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Result;
use boot::guest::ImageFormat;

use super::BadArgument;
use crate::machine::{Boot, Module};

/// Which guest.
#[derive(Debug, Clone, clap::Args)]
pub struct GuestArgs {
    /// The guest: a Linux bzImage or a multiboot 1 image [default: what the first disk's boot sector starts].
    #[arg(long, value_name = "IMAGE")]
    kernel: Option<PathBuf>,
    /// An initrd, or for a multiboot image a module with its arguments ("FILE ARGS"); repeatable.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Vec<String>,
    /// The guest's command line [default for Linux: a serial console and what makes it quick].
    #[arg(long, value_name = "STRING", allow_hyphen_values = true, requires = "kernel")]
    append: Option<String>,
}

impl GuestArgs {
    /// The image, if one is named; a Linux without arguments of its own gets `linux_args`.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn open(&self, linux_args: &str) -> Result<Option<Image>> {
        self.kernel.as_deref().map(|kernel| Image::open(kernel, self, linux_args)).transpose()
    }
}

/// An image and what is loaded with it.
#[derive(Debug, Clone)]
pub struct Image {
    format: Option<ImageFormat>,
    kernel: Module,
    modules: Vec<Module>,
}

impl Image {
    fn open(kernel: &Path, args: &GuestArgs, linux_args: &str) -> Result<Self> {
        let format = format_of(kernel)?;
        let modules: Vec<Module> = args.initrd.iter().map(|text| module(text)).collect::<Result<_>>()?;
        let append = args.append.clone().unwrap_or_else(|| match format {
            Some(ImageFormat::BzImage) => linux_args.to_owned(),
            Some(ImageFormat::Multiboot(_)) | None => String::new(),
        });
        let kernel = Module::with_args(kernel, append);
        Ok(match format {
            Some(ImageFormat::Multiboot(_)) => {
                Self { format, kernel: kernel.named(), modules: modules.into_iter().map(Module::named).collect() }
            }
            Some(ImageFormat::BzImage) | None => Self { format, kernel, modules },
        })
    }

    /// The name of its file.
    pub fn name(&self) -> String {
        self.kernel.file.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// This image as GRUB loads it: without the names of this machine's files before the arguments.
    pub fn unnamed(self) -> Self {
        let unnamed = |module: Module| Module { named: false, ..module };
        let modules = self.modules.into_iter().map(unnamed).collect();
        Self { kernel: unnamed(self.kernel), modules, ..self }
    }

    /// All files for l1hv, the image first.
    pub fn modules(self) -> Vec<Module> {
        std::iter::once(self.kernel).chain(self.modules).collect()
    }

    /// The image on the machine itself.
    ///
    /// # Errors
    /// When only l1hv can say what is wrong with it.
    pub fn bare(self) -> Result<Boot> {
        let Self { format, kernel, modules } = self;
        match format {
            Some(ImageFormat::BzImage) => {
                Ok(Boot::Linux { kernel, initrds: modules.into_iter().map(|module| module.file).collect() })
            }
            Some(ImageFormat::Multiboot(_)) => Ok(Boot::Multiboot { kernel, modules }),
            None => {
                let file = kernel.file.display();
                Err(BadArgument(format!("{file} is neither a bzImage nor a multiboot 1 image")).into())
            }
        }
    }
}

/// The format of the image in `file`; `None` for one that l1hv will refuse.
fn format_of(file: &Path) -> Result<Option<ImageFormat>> {
    let mut head = Vec::new();
    File::open(file)
        .and_then(|image| image.take(ImageFormat::HEAD_BYTES as u64).read_to_end(&mut head))
        .map_err(|error| BadArgument(format!("cannot read {}: {error}", file.display())))?;
    Ok(ImageFormat::of(&head))
}

/// `FILE` or `FILE ARGS`.
fn module(text: &str) -> Result<Module> {
    let (file, args) = text.split_once(' ').unwrap_or((text, ""));
    if !Path::new(file).is_file() {
        return Err(BadArgument(format!("--initrd {file}: no such file")).into());
    }
    Ok(Module::with_args(file, args))
}
