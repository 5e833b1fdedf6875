//! From needs to what really happens, once it is known which candidates hold nothing but zeros.

use alloc::vec::Vec;

use crate::{How, Need, Target};

/// What a plan costs.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Guest bytes written as data.
    pub bytes_written: u64,
    /// New host clusters for data.
    pub new_clusters: u64,
}

/// The clusters whose content decides what happens to them, in order: look at each, and tell [`settle`].
pub fn candidates(needs: &[Need]) -> impl Iterator<Item = u64> {
    needs.iter().filter(|n| n.how != n.if_zero).flat_map(|n| n.clusters.clone())
}

/// The needs with each candidate decided: `zero` says, in the order of [`candidates`], which ones are all zeros.
pub fn settle(needs: &[Need], zero: impl IntoIterator<Item = bool>) -> Vec<Need> {
    let mut zero = zero.into_iter();
    let mut out: Vec<Need> = Vec::new();
    for need in needs {
        if need.how == need.if_zero {
            push(&mut out, need.clone());
            continue;
        }
        for cluster in need.clusters.clone() {
            let how = if zero.next().unwrap_or(false) { need.if_zero } else { need.how };
            let pieces = if how == How::Patch { need.pieces.clone() } else { Vec::new() };
            push(&mut out, Need { clusters: cluster..cluster + 1, how, if_zero: how, pieces });
        }
    }
    out
}

/// What a look at a cluster tells when two chains are compared there.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Both read the same.
    Same,
    /// The old chain reads as zeros, the new one does not.
    Zero,
    /// They differ, and the old one holds data.
    Data,
}

/// Every cluster of the needs, in order: look at each in both chains, and tell [`settle_against`].
pub fn clusters(needs: &[Need]) -> impl Iterator<Item = u64> {
    needs.iter().flat_map(|n| n.clusters.clone())
}

/// The needs of [`rebase`](crate::rebase) with each cluster decided: `found` says, in the order of [`clusters`], what is
/// there.
pub fn settle_against(needs: &[Need], found: impl IntoIterator<Item = Found>) -> Vec<Need> {
    let mut found = found.into_iter();
    let mut out: Vec<Need> = Vec::new();
    for need in needs {
        for cluster in need.clusters.clone() {
            let how = match found.next().unwrap_or(Found::Data) {
                Found::Same => How::Skip,
                Found::Zero => need.if_zero,
                Found::Data => need.how,
            };
            push(&mut out, Need { clusters: cluster..cluster + 1, how, if_zero: how, pieces: Vec::new() });
        }
    }
    out
}

fn push(out: &mut Vec<Need>, need: Need) {
    if need.how == How::Skip {
        return;
    }
    match out.last_mut() {
        Some(last)
            if last.clusters.end == need.clusters.start && last.how == need.how && need.how != How::Patch =>
        {
            last.clusters.end = need.clusters.end;
        }
        _ => out.push(need),
    }
}

impl Summary {
    /// The cost of settled needs.
    pub fn of(target: Target, needs: &[Need]) -> Self {
        let mut sum = Self::default();
        for need in needs {
            let clusters = need.clusters.end - need.clusters.start;
            match need.how {
                How::Fill => {
                    sum.new_clusters += clusters;
                    sum.bytes_written += clusters << target.cluster_bits;
                }
                How::Patch => sum.bytes_written += need.pieces.iter().map(|p| p.end - p.start).sum::<u64>(),
                How::Zero | How::Unmap | How::Skip => {}
            }
        }
        sum
    }
}
