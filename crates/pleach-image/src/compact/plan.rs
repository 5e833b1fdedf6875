//! Where everything goes: decided before anything moves, from the layout alone.

use std::collections::BTreeMap;

use super::layout::{Extent, Layout, Role, Root, RootKind};

/// What a compaction moves.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Clusters that the file will have.
    pub(super) end: u64,
    /// Refcount blocks that will be left.
    pub(super) blocks: u64,
    /// Refcount table clusters that will be left.
    pub(super) table_clusters: u64,
    /// Refcount blocks that are missing: number, and the free cluster that each gets.
    pub(super) new_blocks: Vec<(u64, u64)>,
    /// Single clusters that make room for roots: what they are, from, to.
    pub(super) aside: Vec<(Role, u64, u64)>,
    /// What is longer than a cluster, and its new first cluster.
    pub(super) roots: Vec<(Root, u64)>,
    /// Compressed data, and the new offset.
    pub(super) packed: Vec<(Extent, u64)>,
    /// Single clusters behind the end: from, to. Both in order.
    pub(super) singles: Singles,
}

/// Roles of single clusters, in the order in which they are moved.
pub(super) const SINGLE: [Role; 4] = [Role::Data, Role::Table, Role::Bits, Role::Block];

/// The moves of single clusters, as what is where before them.
#[derive(Debug, Default)]
pub(super) struct Singles {
    roles: Vec<Role>,
    end: u64,
    blocks_left: Vec<u64>,
}

impl Singles {
    /// The moves of the clusters of one role, in order. Roles take the free places in their fixed order.
    pub(super) fn of(&self, role: Role) -> impl Iterator<Item = (u64, u64)> {
        let before: u64 = SINGLE
            .into_iter()
            .take_while(|other| *other != role)
            .map(|other| self.behind(other).count() as u64)
            .sum();
        self.behind(role).zip(self.free().skip(usize::try_from(before).unwrap_or(usize::MAX)))
    }

    fn behind(&self, role: Role) -> impl Iterator<Item = u64> {
        let index = usize::try_from(self.end).unwrap_or(usize::MAX);
        let rest = self.roles.get(index..).unwrap_or_default();
        let found = (self.end..).zip(rest).filter(move |(_, r)| **r == role).map(|(cluster, _)| cluster);
        found.filter(move |c| role != Role::Block || self.blocks_left.binary_search(c).is_ok())
    }

    fn free(&self) -> impl Iterator<Item = u64> {
        let index = usize::try_from(self.end).unwrap_or(usize::MAX);
        let below = self.roles.get(..index).unwrap_or(&self.roles);
        (0..).zip(below).filter(|(_, role)| **role == Role::Free).map(|(cluster, _)| cluster)
    }

    /// How many.
    pub(super) fn count(&self) -> u64 {
        SINGLE.into_iter().map(|role| self.behind(role).count() as u64).sum()
    }
}

/// Tries that a plan is worth; more are made only where compressed data fit badly.
const MOST_TRIES: usize = 200;

impl Plan {
    /// What is done with a file of `len` bytes, one plan after the other, each for what the one before leaves: what lies
    /// closer together then may fit into less. The last one leaves nothing that another would do.
    pub(super) fn all(mut layout: Layout, mut len: u64) -> Vec<Self> {
        let mut plans: Vec<Self> = Vec::new();
        loop {
            let plan = Self::of(&layout);
            let shorter = plan.length(layout.cluster, len);
            if !plans.is_empty() && shorter >= len {
                return plans;
            }
            layout = plan.outcome(layout);
            len = shorter;
            plans.push(plan);
        }
    }

    /// How long a file of `len` bytes will be.
    pub(super) fn length(&self, cluster: u64, len: u64) -> u64 {
        let end = self.end * cluster;
        if self.moves() { end } else { end.min(len) }
    }

    /// What `layout`, for which this plan was made, will be when it is carried out.
    fn outcome(&self, layout: Layout) -> Layout {
        let Layout { mut roles, roots, packed, mut blocks, cluster, .. } = layout;
        let index = |c: u64| usize::try_from(c).unwrap_or(usize::MAX);
        let mut set = |first: u64, n: u64, role: Role| {
            let end = index(first + n).min(roles.len());
            roles.get_mut(index(first)..end).unwrap_or_default().fill(role);
        };
        let mut moved: BTreeMap<u64, u64> = BTreeMap::new();
        for &(role, from, to) in &self.aside {
            set(from, 1, Role::Free);
            set(to, 1, role);
            moved.insert(from, to);
        }
        let place = |root: Root| match self.roots.iter().find(|(other, _)| *other == root) {
            Some(&(_, first)) => Root { first, ..root },
            None => root,
        };
        roots.iter().for_each(|root| set(root.first, root.clusters, Role::Free));
        let mut roots: Vec<Root> = roots.into_iter().map(place).collect();
        for root in roots.iter_mut().filter(|root| root.what == RootKind::Refcounts) {
            root.clusters = root.clusters.min(self.table_clusters);
        }
        roots.iter().for_each(|root| set(root.first, root.clusters, Role::Root));
        let clusters = |e: Extent| (e.offset / cluster, e.end().div_ceil(cluster) - e.offset / cluster);
        let mut packed_now: Vec<(Extent, u64)> = Vec::new();
        for (extent, times) in packed {
            let to = self.packed.binary_search_by_key(&extent, |(e, _)| *e).ok();
            let offset = to.and_then(|i| self.packed.get(i)).map_or(extent.offset, |(_, to)| *to);
            if offset != extent.offset {
                let (first, n) = clusters(extent);
                set(first, n, Role::Free);
            }
            packed_now.push((Extent { offset, ..extent }, times));
        }
        packed_now.sort_unstable();
        // What stays may share a cluster with what has gone.
        for &(extent, _) in &packed_now {
            let (first, n) = clusters(extent);
            set(first, n, Role::Packed);
        }
        for role in SINGLE {
            for (from, to) in self.singles.of(role) {
                set(from, 1, Role::Free);
                set(to, 1, role);
                moved.insert(from, to);
            }
        }
        for block in blocks.iter_mut().flatten() {
            *block = moved.get(block).copied().unwrap_or(*block);
        }
        let kept = index(self.blocks);
        blocks.iter().skip(kept).flatten().for_each(|&c| set(c, 1, Role::Free));
        blocks.resize(kept, None);
        for &(number, at) in &self.new_blocks {
            set(at, 1, Role::Block);
            if let Some(block) = blocks.get_mut(index(number)) {
                *block = Some(at);
            }
        }
        roles.truncate(index(self.end));
        Layout { roles, roots, packed: packed_now, blocks, ..layout }
    }

    /// The plan with the lowest end that is found: as many clusters as are used, or a few more where what must stay together
    /// does not fit.
    pub(super) fn of(layout: &Layout) -> Self {
        let (used, now) = (layout.used(), layout.end());
        let structures = layout.blocks.iter().flatten().count() as u64;
        let others = used - structures;
        // Blocks that will not be needed lie behind the end, or are left there: both is found out by trying.
        let mut end = (others..).find(|&end| others + end.div_ceil(layout.per_block) <= end).unwrap_or(now);
        for _ in 0..MOST_TRIES {
            if end >= now {
                break;
            }
            match Self::attempt(layout, end) {
                Ok(plan) => return plan,
                Err(short) => end += short.max(1),
            }
        }
        Self { end: now, ..Self::kept(layout, now) }
    }

    /// Nothing moves.
    fn kept(layout: &Layout, end: u64) -> Self {
        let blocks = end.div_ceil(layout.per_block);
        let table_clusters = blocks.div_ceil(layout.per_table_cluster).max(1);
        Self { end, blocks, table_clusters, ..Self::default() }
    }

    /// A plan for a file of `end` clusters; else how many clusters it is too short by, at least.
    fn attempt(layout: &Layout, end: u64) -> Result<Self, u64> {
        let mut plan = Self::kept(layout, end);
        let mut room = Room { roles: layout.roles.clone(), end, from: 0 };
        for index in 0..plan.blocks {
            let known = usize::try_from(index).ok().and_then(|i| layout.blocks.get(i));
            if known.copied().flatten().is_none() {
                let cluster = room.free().ok_or(1u64)?;
                room.set(cluster, 1, Role::Fixed);
                plan.new_blocks.push((index, cluster));
            }
        }
        let mut windows = Vec::new();
        for root in layout.roots.iter().filter(|root| root.first + root.clusters > end) {
            let first = room.window(root.clusters).ok_or(1u64)?;
            for cluster in (first..first + root.clusters).filter(|&c| room.role(c).is_single()) {
                windows.push((cluster, room.role(cluster)));
            }
            room.set(first, root.clusters, Role::Root);
            plan.roots.push((*root, first));
        }
        for (cluster, role) in windows {
            let to = room.free().ok_or(1u64)?;
            room.set(to, 1, role);
            plan.aside.push((role, cluster, to));
        }
        for (root, _) in &plan.roots {
            // Free by the time that what follows is moved.
            room.set(root.first, root.clusters, Role::Free);
        }
        room.from = 0;
        plan.packed = room.pack(layout)?;
        let first_gone = usize::try_from(plan.blocks).unwrap_or(usize::MAX);
        let mut blocks_left: Vec<u64> =
            layout.blocks.iter().take(first_gone).flatten().copied().filter(|&c| c >= end).collect();
        blocks_left.sort_unstable();
        let singles = Singles { roles: room.roles, end, blocks_left };
        let (wanted, free) = (singles.count(), singles.free().count() as u64);
        if wanted > free {
            return Err(wanted - free);
        }
        plan.singles = singles;
        Ok(plan)
    }

    /// Clusters that are copied.
    pub(super) fn copied(&self, cluster: u64) -> u64 {
        let roots: u64 = self.roots.iter().map(|(root, _)| root.clusters).sum();
        let packed: u64 = self.packed.iter().map(|(extent, _)| extent.bytes).sum();
        self.aside.len() as u64 + roots + packed.div_ceil(cluster) + self.singles.count()
    }

    /// Whether anything moves.
    pub(super) fn moves(&self) -> bool {
        let lists = self.aside.len() + self.roots.len() + self.packed.len() + self.new_blocks.len();
        lists > 0 || self.singles.count() > 0
    }
}

/// Where there is room while a plan is made.
struct Room {
    roles: Vec<Role>,
    end: u64,
    /// Below this nothing is free.
    from: u64,
}

impl Room {
    fn role(&self, cluster: u64) -> Role {
        let role = usize::try_from(cluster).ok().and_then(|i| self.roles.get(i));
        role.copied().unwrap_or(Role::Fixed)
    }

    fn set(&mut self, first: u64, n: u64, role: Role) {
        let index = |c: u64| usize::try_from(c).unwrap_or(usize::MAX);
        if let Some(part) = self.roles.get_mut(index(first)..index(first + n)) {
            part.fill(role);
        }
    }

    /// The first free cluster.
    fn free(&mut self) -> Option<u64> {
        let found = (self.from..self.end).find(|&c| self.role(c) == Role::Free);
        self.from = found.unwrap_or(self.end);
        found
    }

    /// The first of the `n` clusters in a row that are free, or can be with the fewest moves.
    fn window(&self, n: u64) -> Option<u64> {
        let cost = |c: u64| match self.role(c) {
            Role::Free => Some(0),
            role if role.is_single() => Some(1),
            _ => None,
        };
        let (mut best, mut first, mut sum): (Option<(u64, u64)>, u64, u64) = (None, 1, 0);
        for c in 1..self.end {
            let Some(more) = cost(c) else {
                (first, sum) = (c + 1, 0);
                continue;
            };
            sum += more;
            if c + 1 - first > n {
                sum -= cost(first).unwrap_or(0);
                first += 1;
            }
            if c + 1 - first == n && best.is_none_or(|(least, _)| sum < least) {
                best = Some((sum, first));
                if sum == 0 {
                    break;
                }
            }
        }
        best.map(|(_, first)| first)
    }

    /// Places for the compressed data that reach behind the end. Data that share a sector stay together where they can;
    /// all keep their place within a sector, on which the length of what they claim depends. No cluster gets more
    /// references than can be counted.
    fn pack(&mut self, layout: &Layout) -> Result<Vec<(Extent, u64)>, u64> {
        let (size, end) = (layout.cluster, self.end * layout.cluster);
        let mut placed: Vec<(Extent, u64)> = Vec::new();
        let mut hole = 0..0u64;
        let mut before: Option<(Extent, u64)> = None;
        // References of the clusters that more data may go to.
        let mut filled: BTreeMap<u64, u64> = BTreeMap::new();
        for &(extent, times) in layout.packed.iter().filter(|(extent, _)| extent.end() > end) {
            let within = |start: u64| start + extent.offset.wrapping_sub(start) % 512;
            let beside = before.filter(|(last, _)| extent.offset < last.end());
            let mut to =
                beside.map_or_else(|| within(hole.start), |(last, to)| to + (extent.offset - last.offset));
            let clusters = |to: u64| to / size..to.saturating_add(extent.bytes).div_ceil(size);
            loop {
                if hole.is_empty() || to.saturating_add(extent.bytes) > hole.end {
                    // The next free clusters in a row.
                    let first = self.free().ok_or((extent.end() - end).div_ceil(size))?;
                    let n = (first..self.end).take_while(|&c| self.role(c) == Role::Free).count() as u64;
                    self.from = first + n;
                    hole = first * size..(first + n) * size;
                    to = within(hole.start);
                    continue;
                }
                let full = |c: &u64| filled.get(c).is_some_and(|sum| sum + times > layout.most_references);
                let Some(full) = clusters(to).rfind(full) else { break };
                hole.start = hole.start.max((full + 1) * size);
                to = within(hole.start);
            }
            filled = filled.split_off(&(to / size));
            for cluster in clusters(to) {
                *filled.entry(cluster).or_insert(0) += times;
            }
            self.set(to / size, clusters(to).end - to / size, Role::Packed);
            placed.push((extent, to));
            before = Some((extent, to));
            hole.start = hole.start.max(to + extent.bytes);
        }
        Ok(placed)
    }
}

#[cfg(test)]
mod tests {
    use pleach_testkit::Rng;

    use super::*;

    const MOST_REFERENCES: u64 = 8;

    /// A layout at random: single clusters, roots of up to four clusters, compressed data of several in a cluster or across
    /// two, holes everywhere.
    fn layout(rng: &mut Rng) -> Layout {
        let (cluster, per_block) = (512, 64);
        let mut layout = Layout {
            roles: vec![Role::Fixed],
            roots: Vec::new(),
            packed: Vec::new(),
            most_references: MOST_REFERENCES,
            blocks: Vec::new(),
            per_block,
            per_table_cluster: 64,
            cluster,
            most: 1 << 20,
        };
        let mut blocks = Vec::new();
        for number in 0..rng.between(5, 120) {
            let first = layout.roles.len() as u64;
            match rng.below(9) {
                0 => {
                    let clusters = rng.between(1, 4);
                    let what = RootKind::SnapshotL1(usize::try_from(number).unwrap());
                    layout.roots.push(Root { what, first, clusters });
                    layout.roles.extend((0..clusters).map(|_| Role::Root));
                }
                1 => {
                    let mut at = first * cluster + rng.below(3) * 7;
                    for _ in 0..rng.between(1, 5) {
                        // Up to the end of a sector; the next one may share that.
                        let sectors = rng.between(1, 2);
                        let bytes = sectors * 512 - at % 512;
                        layout.packed.push((Extent { offset: at, bytes }, rng.between(1, 3)));
                        at += bytes.saturating_sub(rng.below(400)).max(40);
                    }
                    let end = layout.packed.iter().map(|(e, _)| e.end()).max().unwrap().div_ceil(cluster);
                    layout.roles.extend((first..end).map(|_| Role::Packed));
                }
                2 => layout.roles.push(Role::Table),
                3 => layout.roles.push(Role::Bits),
                4 if blocks.len() < 4 => {
                    blocks.push(first);
                    layout.roles.push(Role::Block);
                }
                5 | 6 => layout.roles.extend((0..rng.between(1, 6)).map(|_| Role::Free)),
                _ => layout.roles.push(Role::Data),
            }
        }
        layout.blocks = blocks.into_iter().map(Some).collect();
        layout.packed.sort_unstable();
        layout.packed.dedup_by_key(|(extent, _)| *extent);
        layout
    }

    /// Every place is free when something is moved there, and in the end all lies below the end.
    #[test]
    fn plans_can_be_carried_out() {
        let (mut moved, mut aside, mut packed) = (0, 0, 0);
        for seed in 0..2000 {
            let layout = layout(&mut Rng::new(seed));
            let plan = Plan::of(&layout);
            assert!(plan.end <= layout.end(), "seed {seed}");
            let mut roles = layout.roles.clone();
            let mut take = |from: u64, to: u64, what: &str| {
                let (from, to) = (usize::try_from(from).unwrap(), usize::try_from(to).unwrap());
                assert_eq!(roles[to], Role::Free, "seed {seed}: {what}: {from} to {to}");
                assert!((to as u64) < plan.end, "seed {seed}: {what}");
                roles[to] = std::mem::replace(&mut roles[from], Role::Free);
            };
            for (_, from, to) in &plan.aside {
                take(*from, *to, "aside");
            }
            for (root, to) in &plan.roots {
                for i in 0..root.clusters {
                    take(root.first + i, to + i, "root");
                }
            }
            let free = |roles: &[Role], c: u64| roles[usize::try_from(c).unwrap()] == Role::Free;
            for (extent, to) in &plan.packed {
                assert_eq!(extent.offset % 512, to % 512, "seed {seed}");
                assert!(
                    (to / 512..(to + extent.bytes).div_ceil(512)).all(|c| free(&roles, c)),
                    "seed {seed}: packed"
                );
                // No other data lie there, unless they did before.
                for (other, place) in plan.packed.iter().filter(|(other, _)| other != extent) {
                    let apart = place + other.bytes <= *to || to + extent.bytes <= *place;
                    let alike = other.offset.wrapping_sub(extent.offset) == place.wrapping_sub(*to);
                    assert!(apart || alike, "seed {seed}: {extent:?} to {to}, {other:?} to {place}");
                }
            }
            for (extent, to) in &plan.packed {
                for c in to / 512..(to + extent.bytes).div_ceil(512) {
                    roles[usize::try_from(c).unwrap()] = Role::Packed;
                }
            }
            let mut references: BTreeMap<u64, u64> = BTreeMap::new();
            for (extent, to) in &plan.packed {
                let times = layout.packed.iter().find(|(other, _)| other == extent).unwrap().1;
                for c in to / 512..(to + extent.bytes).div_ceil(512) {
                    *references.entry(c).or_insert(0) += times;
                }
            }
            assert!(references.values().all(|&sum| sum <= MOST_REFERENCES), "seed {seed}");
            for (_, cluster) in &plan.new_blocks {
                assert!(free(&roles, *cluster), "seed {seed}: block");
                roles[usize::try_from(*cluster).unwrap()] = Role::Block;
            }
            for role in SINGLE {
                for (from, to) in plan.singles.of(role) {
                    assert_eq!(roles[usize::try_from(from).unwrap()], role, "seed {seed}");
                    assert!(free(&roles, to) && to < plan.end, "seed {seed}: {role:?}");
                    roles[usize::try_from(to).unwrap()] = role;
                    roles[usize::try_from(from).unwrap()] = Role::Free;
                }
            }
            let behind = roles.iter().skip(usize::try_from(plan.end).unwrap());
            assert!(
                behind.clone().all(|r| matches!(r, Role::Free | Role::Packed | Role::Block)),
                "seed {seed}"
            );
            assert_outcome(&plan, &layout, seed);
            let kept = layout.packed.iter().filter(|(e, _)| e.end() > plan.end * 512).count();
            assert!(kept == plan.packed.len() || !plan.moves(), "seed {seed}");
            moved += plan.copied(512);
            aside += plan.aside.len();
            packed += plan.packed.len();
        }
        assert!(moved > 1000 && aside > 5 && packed > 100, "{moved} {aside} {packed}");
    }

    /// What is foreseen of a plan: nothing is lost, and a last plan leaves nothing to do.
    fn assert_outcome(plan: &Plan, layout: &Layout, seed: u64) {
        let after = plan.outcome(layout.clone());
        assert!(after.end() <= plan.end, "seed {seed}");
        for role in [Role::Data, Role::Table, Role::Bits, Role::Fixed] {
            let count = |layout: &Layout| layout.roles.iter().filter(|r| **r == role).count();
            assert_eq!(count(&after), count(layout), "seed {seed}: {role:?}");
        }
        let blocks = after.roles.iter().filter(|r| **r == Role::Block).count();
        assert_eq!(blocks, after.blocks.iter().flatten().count(), "seed {seed}");
        assert_eq!(after.roots.len(), layout.roots.len(), "seed {seed}");
        for (extent, _) in &after.packed {
            let touched = extent.offset / 512..extent.end().div_ceil(512);
            let roles = touched.map(|c| after.roles.get(usize::try_from(c).unwrap()));
            assert!(roles.into_iter().all(|r| r == Some(&Role::Packed)), "seed {seed}: {extent:?}");
        }
        let len = layout.end() * 512;
        let plans = Plan::all(layout.clone(), len);
        let (mut last, mut len) = (layout.clone(), len);
        for plan in plans {
            len = plan.length(512, len);
            last = plan.outcome(last);
        }
        let more = Plan::of(&last);
        assert!(more.length(512, len) == len && !more.moves(), "seed {seed}: {more:?}");
    }

    /// Single clusters fill every hole.
    #[test]
    fn the_end_is_as_many_clusters_as_are_used() {
        let roles = [
            Role::Fixed,
            Role::Root,
            Role::Block,
            Role::Free,
            Role::Data,
            Role::Free,
            Role::Free,
            Role::Table,
        ];
        let root = Root { what: RootKind::Refcounts, first: 1, clusters: 1 };
        let layout = Layout {
            roles: roles.to_vec(),
            roots: vec![root],
            packed: Vec::new(),
            most_references: MOST_REFERENCES,
            blocks: vec![Some(2)],
            per_block: 64,
            per_table_cluster: 64,
            cluster: 512,
            most: 1 << 20,
        };
        let plan = Plan::of(&layout);
        assert_eq!((plan.end, plan.copied(512)), (5, 1));
        assert!(plan.singles.of(Role::Table).eq([(7, 3)]));
    }
}
