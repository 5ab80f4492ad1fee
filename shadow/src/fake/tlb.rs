use std::collections::BTreeMap;

/// Translations that a processor keeps, until software drops them.
#[derive(Debug, Default)]
pub struct Tlb(BTreeMap<(u64, u64), (u64, bool)>);

impl Tlb {
    /// The address of a page under an EPTP, from a kept translation or else from a walk. A write walks anew if the kept
    /// translation is for reads only.
    ///
    /// # Errors
    ///
    /// The walk fails.
    pub fn access<E>(
        &mut self,
        eptp: u64,
        page: u64,
        write: bool,
        walk: impl FnOnce() -> Result<u64, E>,
    ) -> Result<u64, E> {
        if let Some(&(address, writable)) = self.0.get(&(eptp, page))
            && (writable || !write)
        {
            return Ok(address);
        }
        let outcome = walk();
        match outcome {
            Ok(address) => self.0.insert((eptp, page), (address, write)),
            Err(_) => self.0.remove(&(eptp, page)),
        };
        outcome
    }

    /// INVEPT.
    pub fn drop(&mut self, eptp: Option<u64>) {
        self.0.retain(|&(kept, _), _| eptp.is_some_and(|eptp| eptp != kept));
    }
}
