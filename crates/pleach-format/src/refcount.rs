//! Refcounts of 1 to 64 bits in a refcount block (spec: refcount block entries).

use crate::{FormatError, Geometry};

/// Bits a refcount: `1 << refcount_order`, 1 to 64.
///
/// Counts below a byte are packed least significant bits first; wider ones are big-endian.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct RefcountWidth {
    order: u32,
}

impl RefcountWidth {
    /// 16 bits: the only width of version 2, and the default of version 3.
    pub const DEFAULT: Self = Self { order: 4 };

    /// The width `1 << order`.
    ///
    /// # Errors
    /// [`FormatError::OutOfRange`] for orders above 6.
    pub fn new(order: u32) -> Result<Self, FormatError> {
        if order <= 6 {
            Ok(Self { order })
        } else {
            Err(FormatError::OutOfRange { field: "refcount_order", value: order.into(), min: 0, max: 6 })
        }
    }

    /// log2 of the bits a count.
    pub fn order(self) -> u32 {
        self.order
    }

    /// Bits a count.
    pub fn bits(self) -> u32 {
        1 << self.order
    }

    /// Largest count.
    pub fn max(self) -> u64 {
        if self.order == 6 { u64::MAX } else { (1 << self.bits()) - 1 }
    }

    /// Counts a refcount block.
    pub fn per_block(self, geometry: Geometry) -> u64 {
        (geometry.cluster_size() * 8) >> self.order
    }

    /// Count number `index` of `block`; 0 past its end.
    pub fn get(self, block: &[u8], index: usize) -> u64 {
        if self.order < 3 {
            let per_byte = 8usize >> self.order;
            let byte = block.get(index / per_byte).copied().unwrap_or(0);
            let shift = (index % per_byte) << self.order;
            return u64::from(byte >> shift) & self.max();
        }
        let bytes = 1usize << (self.order - 3);
        let at = index.saturating_mul(bytes);
        let field = block.get(at..at.saturating_add(bytes)).unwrap_or(&[]);
        field.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    /// Whether `block` starts with exactly these counts, of which it has enough.
    pub fn holds(self, block: &[u8], counts: &[u32]) -> bool {
        if self == Self::DEFAULT && block.len() / 2 >= counts.len() {
            // All of them, without a branch for each: made of vector instructions.
            let pairs = block.as_chunks::<2>().0.iter().zip(counts);
            return pairs
                .fold(0, |diff, (pair, count)| diff | (u32::from(u16::from_be_bytes(*pair)) ^ count))
                == 0;
        }
        counts.iter().enumerate().all(|(i, &count)| self.get(block, i) == u64::from(count))
    }

    /// How many counts from number `index` on are the same as that one, at most `most`; 0 past the end of `block`.
    pub fn alike(self, block: &[u8], index: usize, most: usize) -> usize {
        if self != Self::DEFAULT {
            let last = (block.len() * 8) >> self.order;
            let most = most.min(last.saturating_sub(index));
            let first = self.get(block, index);
            return (0..most).take_while(|&i| self.get(block, index + i) == first).count();
        }
        let pairs = block.as_chunks::<2>().0.get(index..).unwrap_or_default();
        let Some((&first, _)) = pairs.split_first() else { return 0 };
        let pairs = pairs.get(..most).unwrap_or(pairs);
        // Many at once without a branch for each: made of vector instructions.
        let (groups, _) = pairs.as_chunks::<32>();
        let groups = groups.iter().take_while(|g| g.iter().fold(0, |diff, &p| diff | differs(p, first)) == 0);
        let whole = groups.count() * 32;
        whole + pairs.iter().skip(whole).take_while(|&&pair| pair == first).count()
    }

    /// Adds to the counts that `block` starts with, of which it has enough.
    ///
    /// # Errors
    /// The index of the first count that would not fit. Nothing is changed then.
    pub fn raise(self, block: &mut [u8], by: &[u32]) -> Result<(), usize> {
        let fits =
            |i: usize, &by: &u32| self.get(block, i).checked_add(by.into()).is_some_and(|n| n <= self.max());
        if self != Self::DEFAULT {
            if let Some(bad) = by.iter().enumerate().position(|(i, by)| !fits(i, by)) {
                return Err(bad);
            }
            for (i, &by) in by.iter().enumerate().filter(|(_, by)| **by > 0) {
                let sum = self.get(block, i) + u64::from(by);
                self.set(block, i, sum).map_err(|_| i)?;
            }
            return Ok(());
        }
        let sum = |pair: [u8; 2], by: u32| u32::from(u16::from_be_bytes(pair)).saturating_add(by);
        let (pairs, _) = block.as_chunks::<2>();
        if pairs.iter().zip(by).fold(0, |over, (&pair, &by)| over | sum(pair, by) >> 16) != 0 {
            return Err(by.iter().enumerate().position(|(i, by)| !fits(i, by)).unwrap_or(0));
        }
        for (pair, &by) in block.as_chunks_mut::<2>().0.iter_mut().zip(by) {
            let [.., high, low] = sum(*pair, by).to_be_bytes();
            *pair = [high, low];
        }
        Ok(())
    }

    /// Subtracts from the counts that `block` starts with, of which it has enough. True if any became 0.
    ///
    /// # Errors
    /// The index of the first count that is lower than what is subtracted. Nothing is changed then.
    pub fn lower(self, block: &mut [u8], by: &[u32]) -> Result<bool, usize> {
        let short = |i: usize, &by: &u32| self.get(block, i) < u64::from(by);
        if self != Self::DEFAULT {
            if let Some(bad) = by.iter().enumerate().position(|(i, by)| short(i, by)) {
                return Err(bad);
            }
            let mut freed = false;
            for (i, &by) in by.iter().enumerate().filter(|(_, by)| **by > 0) {
                let left = self.get(block, i) - u64::from(by);
                freed |= left == 0;
                self.set(block, i, left).map_err(|_| i)?;
            }
            return Ok(freed);
        }
        let count = |pair: [u8; 2]| u32::from(u16::from_be_bytes(pair));
        let (pairs, _) = block.as_chunks::<2>();
        if pairs.iter().zip(by).fold(false, |under, (&pair, &by)| under | (count(pair) < by)) {
            return Err(by.iter().enumerate().position(|(i, by)| short(i, by)).unwrap_or(0));
        }
        let mut freed = false;
        for (pair, &by) in block.as_chunks_mut::<2>().0.iter_mut().zip(by) {
            let left = count(*pair).wrapping_sub(by);
            freed |= (left == 0) & (by != 0);
            let [.., high, low] = left.to_be_bytes();
            *pair = [high, low];
        }
        Ok(freed)
    }

    /// Sets count number `index` of `block` to `value`.
    ///
    /// # Errors
    /// [`FormatError::OutOfRange`] if `value` does not fit the width or `index` the block.
    pub fn set(self, block: &mut [u8], index: usize, value: u64) -> Result<(), FormatError> {
        let range = |field, value, max| FormatError::OutOfRange { field, value, min: 0, max };
        if value > self.max() {
            return Err(range("refcount", value, self.max()));
        }
        let last = ((block.len() as u64 * 8) >> self.order).saturating_sub(1);
        let outside = || range("refcount index", index as u64, last);
        if self.order < 3 {
            let per_byte = 8usize >> self.order;
            let byte = block.get_mut(index / per_byte).ok_or_else(outside)?;
            let shift = (index % per_byte) << self.order;
            let [.., low] = value.to_be_bytes();
            let [.., mask] = self.max().to_be_bytes();
            *byte = *byte & !(mask << shift) | low << shift;
            return Ok(());
        }
        let bytes = 1usize << (self.order - 3);
        let at = index.saturating_mul(bytes);
        let field = block.get_mut(at..at.saturating_add(bytes)).ok_or_else(outside)?;
        let be = value.to_be_bytes();
        field.copy_from_slice(be.get(8 - bytes..).expect("bytes is at most 8"));
        Ok(())
    }
}

/// 0 if both are the same.
fn differs(a: [u8; 2], b: [u8; 2]) -> u16 {
    u16::from_be_bytes(a) ^ u16::from_be_bytes(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clusters 0-3 = 1, 4-9 = 3 (2 where the width is 2), 10 = 1, as captured from qemu-img.
    #[test]
    fn packs_as_qemu_does() {
        let counts = [1, 1, 1, 1, 3, 3, 3, 3, 3, 3, 1, 0, 1, 1];
        let cases: &[(u32, &[u8])] = &[
            (2, &[0x11, 0x11, 0x33, 0x33, 0x33, 0x01, 0x11]),
            (3, &[1, 1, 1, 1, 3, 3, 3, 3, 3, 3, 1, 0, 1, 1]),
            (4, &[0, 1, 0, 1, 0, 1, 0, 1, 0, 3, 0, 3]),
        ];
        for (order, want) in cases {
            let width = RefcountWidth::new(*order).unwrap();
            let mut block = [0; 64];
            for (i, count) in counts.iter().enumerate() {
                width.set(&mut block, i, *count).unwrap();
            }
            assert_eq!(&block[..want.len()], *want, "order {order}");
        }
        let two = RefcountWidth::new(1).unwrap();
        let mut block = [0; 4];
        for (i, count) in [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 1, 1].iter().enumerate() {
            two.set(&mut block, i, *count).unwrap();
        }
        assert_eq!(block, [0x55, 0xaa, 0x5a, 0]);
    }

    #[test]
    fn every_width_round_trips_and_is_bounded() {
        for order in 0..=6 {
            let width = RefcountWidth::new(order).unwrap();
            let mut block = [0u8; 512];
            let n = 4096usize >> order;
            for i in 0..n {
                width.set(&mut block, i, (i as u64 * 7 + 1) & width.max()).unwrap();
            }
            for i in 0..n {
                assert_eq!(width.get(&block, i), (i as u64 * 7 + 1) & width.max(), "order {order} index {i}");
            }
            assert_eq!(width.get(&block, n), 0);
            let mut counts: std::vec::Vec<u32> =
                (0..n).map(|i| u32::try_from(width.get(&block, i)).unwrap()).collect();
            for i in [0, 1, n / 2, n - 1] {
                assert!(width.holds(&block, &counts), "order {order}");
                assert!(width.holds(&block, &counts[..i]), "order {order}: the first {i}");
                counts[i] ^= 1 << 16;
                assert!(!width.holds(&block, &counts), "order {order} index {i}: too large for 16 bits");
                counts[i] ^= 1 << 16 | 1;
                assert!(!width.holds(&block, &counts), "order {order} index {i}");
                counts[i] ^= 1;
            }
            let mut other = block;
            let by: std::vec::Vec<u32> = (0..n).map(|i| u32::from(i % 3 == 0)).collect();
            let full = (0..n).position(|i| by[i] == 1 && width.get(&block, i) == width.max());
            assert_eq!(width.raise(&mut other, &by).err(), full, "order {order}");
            if full.is_some() {
                assert_eq!(other, block, "order {order}: all or nothing");
            } else {
                assert!((0..n).all(|i| width.get(&other, i) == width.get(&block, i) + u64::from(by[i])));
                assert!(width.lower(&mut other, &by).is_ok() && other == block, "order {order}");
            }
            let empty = (0..n).position(|i| by[i] == 1 && width.get(&block, i) == 0);
            assert_eq!(width.lower(&mut other, &by).err().is_some(), empty.is_some(), "order {order}");
            let mut ones = [0u8; 512];
            assert_eq!(width.raise(&mut ones, &by), Ok(()));
            assert_eq!(width.alike(&ones, 0, n), 1, "order {order}");
            assert_eq!(width.lower(&mut ones, &by), Ok(true));
            assert_eq!(width.lower(&mut ones, &by), Err(0));
            assert_eq!((width.alike(&ones, 0, n), width.alike(&ones, 3, 40)), (n, 40.min(n - 3)));
            width.set(&mut ones, n - 2, 1).unwrap();
            assert_eq!((width.alike(&ones, 1, n), width.alike(&ones, n, 1)), (n - 3, 0), "order {order}");
            counts.push(1);
            assert!(!width.holds(&block, &counts), "order {order}: more than the block has");
            assert!(width.set(&mut block, n, 1).is_err());
            if order < 6 {
                assert!(width.set(&mut block, 0, width.max() + 1).is_err());
            }
        }
        assert!(RefcountWidth::new(7).is_err());
    }
}
