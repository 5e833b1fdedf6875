//! Two layers become one: which clusters of the surviving file must change.
//!
//! A pair of neighbouring layers can be merged into either file. [`pull`] copies down-to-up: the overlay takes what it
//! lacks of its backing file. [`commit`] copies up-to-down: the backing file takes what the overlay has. Either way
//! the result reads as the overlay did.

use alloc::vec::Vec;
use core::ops::Range;

use crate::overlay::changed;
use crate::{Content, Cover, Overlay, Say};

/// The file that receives.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// log2 of the bytes that change as one: its cluster size, or the size of its subclusters. What is called a cluster here
    /// is a subcluster then.
    pub cluster_bits: u32,
    /// Its virtual size when all is done.
    pub size: u64,
    /// Whether a cluster can be marked as zeros (version 3).
    pub zero_flag: bool,
}

/// How clusters of the target change.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// Not at all.
    Skip,
    /// A new host cluster with everything that the overlay reads there.
    Fill,
    /// The bytes of [`Need::pieces`] are overwritten where they are, with what the overlay reads there.
    Patch,
    /// The entry says zeros; a host cluster is given up.
    Zero,
    /// The entry says nothing; a host cluster is given up.
    Unmap,
}

/// Neighbouring clusters of the target that change in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Guest cluster indexes.
    pub clusters: Range<u64>,
    /// What happens, unless the content turns out to be all zeros.
    pub how: How,
    /// What happens to a cluster whose content is all zeros.
    pub if_zero: How,
    /// For [`How::Patch`], which is one cluster a need: the guest byte ranges to overwrite, in order.
    pub pieces: Vec<Range<u64>>,
}

impl Target {
    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn bytes(&self, cluster: u64) -> Range<u64> {
        cluster << self.cluster_bits..(cluster + 1) << self.cluster_bits
    }
}

/// Needs in cluster order, equal neighbours joined; each cluster is judged once.
#[derive(Default)]
struct Needs {
    needs: Vec<Need>,
    next: u64,
}

impl Needs {
    /// Judges the clusters that `range` touches and that were not judged before.
    fn judge(&mut self, target: &Target, range: &Range<u64>, mut judge: impl FnMut(Range<u64>) -> Need) {
        let end = range.end.min(target.size);
        if range.start >= end {
            return;
        }
        let first = (range.start >> target.cluster_bits).max(self.next);
        let last = (end - 1) >> target.cluster_bits;
        for cluster in first..=last {
            let need = judge(target.bytes(cluster));
            self.push(Need { clusters: cluster..cluster + 1, ..need });
        }
        self.next = self.next.max(last + 1);
    }

    fn push(&mut self, need: Need) {
        if need.how == How::Skip {
            return;
        }
        if let Some(last) = self.needs.last_mut()
            && last.clusters.end == need.clusters.start
            && (last.how, last.if_zero) == (need.how, need.if_zero)
            && need.how != How::Patch
        {
            last.clusters.end = need.clusters.end;
            return;
        }
        self.needs.push(need);
    }
}

fn need(how: How, if_zero: How) -> Need {
    Need { clusters: 0..0, how, if_zero, pieces: Vec::new() }
}

/// The overlay `own` takes what it lacks of `victim`, its backing file, and stands on `below`, the content of the
/// victim's backing chain, afterwards. Several backing files that go together are one victim, folded.
///
/// `own` covers whole clusters of `target`. Pure: equal inputs give equal needs.
pub fn pull(target: Target, own: &Cover, victim: &Cover, below: &Content) -> Vec<Need> {
    // What reads differently once the victim is out of the way: its data, its zeros over content, and content that its
    // end hid.
    let mut changed: Vec<Range<u64>> = Vec::new();
    for (range, say) in victim.says() {
        match say {
            Say::Data => changed.push(range),
            Say::Zero => changed.extend(below.within(range)),
        }
    }
    changed.extend(below.within(victim.size()..target.size.max(victim.size())));
    lacking(target, own, &changed, &below.under(victim), below)
}

/// The overlay `own`, which stands on the chain `old`, is to stand on the chain `new`: what it needs wherever the two do
/// not read from the same place. Whether they read the same there all the same, only a look tells: see
/// [`settle_against`](crate::settle_against).
///
/// `own` covers whole clusters of `target`. Pure: equal inputs give equal needs.
pub fn rebase(target: Target, own: &Cover, old: &Overlay, new: &Overlay) -> Vec<Need> {
    let content = |chain: &Overlay| Content::none().under(&chain.cover());
    lacking(target, own, &changed(old, new, target.size), &content(old), &content(new))
}

/// What `own` needs of the content `seen` below it when `changed` is replaced by `below`.
fn lacking(
    target: Target,
    own: &Cover,
    changed: &[Range<u64>],
    seen: &Content,
    below: &Content,
) -> Vec<Need> {
    let zeros = if target.zero_flag { How::Zero } else { How::Fill };
    let mut needs = Needs::default();
    for range in changed {
        needs.judge(&target, range, |bytes| {
            if own.touches(&bytes) {
                return need(How::Skip, How::Skip);
            }
            let hidden = if below.touches(&bytes) { zeros } else { How::Skip };
            let visible = bytes.start..bytes.end.min(target.size);
            if seen.touches(&visible) { need(How::Fill, hidden) } else { need(hidden, hidden) }
        });
    }
    needs.needs
}

/// The backing file takes what the overlay `upper` has, and its virtual size. `plain` is what of the backing file can
/// be overwritten where it is; `own` is all that it says; `below` is the content of its backing chain.
///
/// `target.size` is the overlay's size, which is not smaller than the backing file's. Pure: equal inputs give equal
/// needs.
pub fn commit(target: Target, upper: &Cover, own: &Cover, plain: &Cover, below: &Content) -> Vec<Need> {
    let upper = &with_zeros_behind(upper, own.size());
    let zeros = if target.zero_flag { How::Zero } else { How::Fill };
    let merged = below.under(own).under(upper);
    let mut needs = Needs::default();
    for (range, say) in upper.says() {
        let relevant: Vec<Range<u64>> = match say {
            Say::Data => alloc::vec![range],
            // Zeros only matter where something would be read instead.
            Say::Zero => hidden(&range, own, below, target),
        };
        for range in &relevant {
            needs.judge(&target, range, |bytes| {
                let visible = bytes.start..bytes.end.min(target.size);
                let gone = match (below.touches(&bytes), own.touches(&bytes)) {
                    (true, _) => zeros,
                    (false, true) => How::Unmap,
                    (false, false) => How::Skip,
                };
                if !merged.touches(&visible) {
                    return need(gone, gone);
                }
                if !plain.touches(&bytes) {
                    return need(How::Fill, gone);
                }
                let pieces: Vec<_> = upper.within(visible.clone()).map(|(range, _)| range).collect();
                let whole =
                    pieces.iter().map(|p| p.end - p.start).sum::<u64>() == visible.end - visible.start;
                // Only if the overlay answers for all of the cluster can its content be known to be zeros.
                let if_zero = if whole { gone } else { How::Patch };
                Need { pieces: join(pieces), ..need(How::Patch, if_zero) }
            });
        }
    }
    needs.needs
}

/// The needs of [`commit`] into a target with subclusters, `1 << parts` of which are a cluster: a cluster with data that cannot
/// be overwritten (it is compressed) is written anew, all of it, where anything of it changes.
///
/// The other parameters are those of [`commit`]. Pure: equal inputs give equal needs.
pub fn rewrite_whole(
    target: Target,
    needs: &[Need],
    own: &Cover,
    plain: &Cover,
    below: &Content,
    parts: u32,
) -> Vec<Need> {
    let mut out = Needs::default();
    let mut rest = needs.iter().flat_map(|need| {
        need.clusters.clone().map(move |part| Need { clusters: part..part + 1, ..need.clone() })
    });
    let mut next = rest.next();
    while let Some(need) = next.take() {
        let first = need.clusters.start >> parts << parts;
        let cluster = target.bytes(first).start..target.bytes(first + (1 << parts)).start;
        let packed = |(range, say): (Range<u64>, Say)| say == Say::Data && !plain.touches(&range);
        if !own.within(cluster).any(packed) {
            out.push(need);
            next = rest.next();
            continue;
        }
        next = Some(need);
        for part in first..first + (1 << parts) {
            let bytes = target.bytes(part);
            let need = match next.take_if(|need| need.clusters.start == part) {
                Some(known) => {
                    next = rest.next();
                    known
                }
                None if bytes.start >= target.size => self::need(How::Unmap, How::Unmap),
                None if below.touches(&bytes) => self::need(How::Fill, How::Zero),
                None => self::need(How::Fill, How::Unmap),
            };
            out.push(Need { clusters: part..part + 1, ..need });
        }
    }
    out.needs
}

/// `upper`, and zeros wherever it says nothing behind `end`: there the old backing file ended.
fn with_zeros_behind(upper: &Cover, end: u64) -> Cover {
    let mut says: Vec<_> = upper.says().map(|(r, say)| (r.start, r.end - r.start, say)).collect();
    says.extend(
        upper
            .transparent(end..upper.size().max(end))
            .into_iter()
            .map(|r| (r.start, r.end - r.start, Say::Zero)),
    );
    says.sort_by_key(|s| s.0);
    Cover::new(upper.size(), says)
}

/// The parts of `range` whose clusters hold something in the backing file or below it.
fn hidden(range: &Range<u64>, own: &Cover, below: &Content, target: Target) -> Vec<Range<u64>> {
    let cluster = target.cluster();
    // A cluster may reach over the range's ends: what it holds there counts too.
    let wide = range.start & !(cluster - 1)..range.end.next_multiple_of(cluster);
    let mut parts: Vec<Range<u64>> =
        own.within(wide.clone()).map(|(r, _)| r).chain(below.within(wide)).collect();
    parts.sort_by_key(|r| r.start);
    parts
        .into_iter()
        .map(|r| {
            let (start, end) = (r.start & !(cluster - 1), r.end.next_multiple_of(cluster));
            start.max(range.start)..end.min(range.end)
        })
        .filter(|r| r.start < r.end)
        .collect()
}

fn join(pieces: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for piece in pieces {
        match out.last_mut() {
            Some(last) if last.end == piece.start => last.end = piece.end,
            _ => out.push(piece),
        }
    }
    out
}

#[cfg(test)]
mod tests;
