//! A seeded generator: small, the same on every machine, and good enough to vary tests.

use std::fmt::Display;

/// SplitMix64 (Steele, Lea, Flood 2014): one `u64` of state, every seed a good one.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator whose whole future follows from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number in `0..limit`.
    ///
    /// # Panics
    /// If `limit` is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        assert!(limit > 0, "a number below 0 was asked for");
        let product = u128::from(self.bits()) * u128::from(limit);
        u64::try_from(product >> 64).expect("the high half of a 128-bit number has 64 bits")
    }

    /// A number in `first..=last`.
    pub fn between(&mut self, first: u64, last: u64) -> u64 {
        first + self.below(last - first + 1)
    }

    /// An index into something of `len` items.
    pub fn index(&mut self, len: usize) -> usize {
        let limit = u64::try_from(len).expect("lengths fit 64 bits");
        usize::try_from(self.below(limit)).expect("below a usize")
    }

    /// One of `items`.
    ///
    /// # Panics
    /// If there are none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        let index = self.index(items.len());
        items.get(index).expect("index() is below the length")
    }

    /// True `percent` times out of 100.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// `len` bytes that do not compress.
    pub fn noise(&mut self, len: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.bits().to_be_bytes()).flatten().take(len).collect()
    }
}

/// Says how to reproduce a run if the test that holds it panics.
pub struct OnFailure(String);

impl OnFailure {
    /// Prints `PLEACH_SEED=seed` and `what` on a panic of this thread, and nothing otherwise.
    #[must_use]
    pub fn print_seed(seed: u64, what: impl Display) -> Self {
        Self(format!("reproduce with PLEACH_SEED={seed:#x} ({what})"))
    }
}

impl Drop for OnFailure {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Rng;

    #[test]
    fn equal_seeds_give_equal_numbers_and_the_published_ones() {
        let mut rng = Rng::new(1_234_567);
        let first = [rng.bits(), rng.bits(), rng.bits()];
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn numbers_stay_in_range_and_reach_both_ends() {
        let mut rng = Rng::new(1);
        let drawn: Vec<u64> = (0..1000).map(|_| rng.between(3, 9)).collect();
        assert_eq!((drawn.iter().min(), drawn.iter().max()), (Some(&3), Some(&9)));
    }
}
