//! libvirt's own in-memory driver is the judge: it keeps trees as `pleach-lineage` does, its documents are read
//! as the trees they came from, and it takes back what was written.
//!
//! Needs `virsh` (no daemon, no network, no root); without it the tests say so and pass. `PLEACH_LONG=1` runs
//! more and longer sequences, `PLEACH_SEED=…` one sequence again.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::Path;

use pleach_libvirt::{Snapshot, lineage, redefine_script};
use pleach_lineage::{DeleteMode, Kind, Lineage, Node};
use pleach_testkit::virsh::{self, Session, Tree};
use pleach_testkit::{OnFailure, Rng, WorkDir, chosen_seed, long_mode};

const THREADS: usize = 4;

/// A machine with two disks and an empty drive.
const DOMAIN: &str = "<domain type='test'>
    <name>vm</name>
    <uuid>5a3f0d0e-6c2b-4a57-9f4e-0f6f1d2c3b4a</uuid>
    <memory unit='MiB'>16</memory>
    <vcpu>1</vcpu>
    <os>
      <type arch='x86_64'>hvm</type>
    </os>
    <devices>
      <disk type='file' device='disk'>
        <driver name='qemu' type='qcow2'/>
        <source file='/images/system.qcow2'/>
        <target dev='vda' bus='virtio'/>
      </disk>
      <disk type='file' device='disk'>
        <driver name='qemu' type='qcow2'/>
        <source file='/images/data.qcow2'/>
        <target dev='vdb' bus='virtio'/>
      </disk>
      <disk type='file' device='cdrom'>
        <target dev='sda' bus='sata'/>
        <readonly/>
      </disk>
    </devices>
  </domain>";

fn shown(tree: &Lineage) -> Tree {
    let name = |id| tree.get(id).map(|node: &Node| node.name.clone());
    let parents = tree.ids().map(|id| (tree[id].name.clone(), tree.parent(id).and_then(name))).collect();
    (parents, tree.current().and_then(name))
}

fn document(name: &str, parent: Option<&str>) -> String {
    let parent = parent.map(|name| format!("<parent><name>{name}</name></parent>")).unwrap_or_default();
    format!(
        "<domainsnapshot><name>{name}</name><state>shutoff</state>{parent}<creationTime>1000000000</creationTime>\
         {DOMAIN}</domainsnapshot>"
    )
}

/// One random operation, done to the tree and written down for libvirt.
fn step(rng: &mut Rng, tree: &mut Lineage, dir: &Path, session: &mut Session, number: usize) -> String {
    let names: Vec<String> = tree.ids().map(|id| tree[id].name.clone()).collect();
    let any = |rng: &mut Rng| {
        if names.is_empty() || rng.chance(5) { "nowhere".to_owned() } else { rng.pick(&names).clone() }
    };
    let fresh = format!("s{number}");
    let roll = rng.below(100);
    if roll < 45 {
        let name = if rng.chance(4) { any(rng) } else { fresh };
        if let Ok(id) = tree.insert(Node { parent: tree.current(), ..Node::new(&name, Kind::Snapshot) }) {
            tree.set_current(Some(id)).unwrap();
        }
        session.add(&format!("snapshot-create-as vm {name}"));
        format!("create {name}")
    } else if roll < 62 {
        let name = any(rng);
        if let Some(id) = tree.find(&name) {
            tree.revert(id).unwrap();
        }
        session.add(&format!("snapshot-revert vm {name}"));
        format!("revert {name}")
    } else if roll < 80 {
        let name = any(rng);
        let (mode, flag) = *rng.pick(&[
            (DeleteMode::Single, ""),
            (DeleteMode::Single, ""),
            // The test driver has no flag for metadata alone: the hierarchy is the same.
            (DeleteMode::Metadata, ""),
            (DeleteMode::Children, " --children"),
            (DeleteMode::ChildrenOnly, " --children-only"),
        ]);
        if let Some(id) = tree.find(&name) {
            tree.delete(id, mode).unwrap();
        }
        session.add(&format!("snapshot-delete vm {name}{flag}"));
        format!("delete {name} {mode:?}")
    } else if roll < 86 {
        let name = any(rng);
        if let Some(id) = tree.find(&name) {
            tree.set_current(Some(id)).unwrap();
        }
        session.add(&format!("snapshot-current vm {name}"));
        format!("current {name}")
    } else {
        let name = if rng.chance(30) { fresh } else { any(rng) };
        let parent = rng.chance(75).then(|| any(rng));
        let current = rng.chance(30);
        fs::write(dir.join(format!("{number}.xml")), document(&name, parent.as_deref())).unwrap();
        let flag = if current { " --current" } else { "" };
        session.add(&format!("snapshot-create vm {number}.xml --redefine{flag}"));
        if let Some(id) = redefined(tree, &name, parent.as_deref())
            && current
        {
            tree.set_current(Some(id)).unwrap();
        }
        format!("redefine {name} on {parent:?}, current: {current}")
    }
}

fn redefined(tree: &mut Lineage, name: &str, parent: Option<&str>) -> Option<pleach_lineage::NodeId> {
    let parent = match parent {
        None => None,
        Some(parent) => Some(tree.find(parent)?),
    };
    let node = Node { parent, ..Node::new(name, Kind::Snapshot) };
    match tree.find(name) {
        None => tree.insert(node).ok(),
        Some(id) => tree.redefine(id, node).ok().map(|_| id),
    }
}

/// One sequence: equal after every step; then the documents, read as a tree; then given to another machine.
fn sequence(seed: u64, steps: usize) {
    let _seed = OnFailure::print_seed(seed, "test_driver");
    let mut rng = Rng::new(seed);
    let dir = WorkDir::new("virsh");
    let mut tree = Lineage::new();
    let mut session = Session::new(&dir, DOMAIN);
    let mut wanted = Vec::new();
    for number in 0..steps {
        let what = step(&mut rng, &mut tree, &dir, &mut session, number);
        session.ask();
        wanted.push((what, shown(&tree)));
    }
    let names: Vec<String> = tree.depth_first().map(|(_, id)| tree[id].name.clone()).collect();
    for name in &names {
        session.add(&format!("snapshot-dumpxml vm {name}; echo '#'"));
    }
    let (answers, stderr) = session.run(&dir);
    let mut answers = answers.into_iter();
    for (number, (what, want)) in wanted.iter().enumerate() {
        let got = virsh::tree(&answers.next().unwrap_or_default());
        assert_eq!(&got, want, "after step {number}, {what}\n{stderr}");
    }

    let mut snapshots: Vec<Snapshot> = names
        .iter()
        .zip(answers)
        .map(|(name, text)| {
            Snapshot::parse(text.as_bytes()).unwrap_or_else(|error| panic!("{name}: {error}"))
        })
        .collect();
    assert_eq!(snapshots.len(), names.len(), "a document a snapshot");
    for snapshot in &mut snapshots {
        snapshot.check_redefine().unwrap_or_else(|error| panic!("{error}\n{}", snapshot.text()));
        let is_current = tree.current().is_some_and(|id| tree[id].name == snapshot.name());
        snapshot.set_current(Some(is_current)).unwrap();
    }
    let read = lineage(&snapshots).unwrap();
    assert_eq!(shown(&read), shown(&tree));
    give_to_libvirt(&snapshots, &shown(&tree));
}

/// Runs the commands of the script in a new machine: the same tree, the same current one, no complaint.
fn give_to_libvirt(snapshots: &[Snapshot], want: &Tree) {
    let dir = WorkDir::new("virsh-again");
    let files: Vec<String> = (0..snapshots.len()).map(|place| format!("record {place}.xml")).collect();
    for (snapshot, file) in snapshots.iter().zip(&files) {
        fs::write(dir.join(file), snapshot.text()).unwrap();
    }
    let script = redefine_script("vm", snapshots, &files).unwrap();
    let mut session = Session::new(&dir, DOMAIN);
    let mut commands = script.lines().filter_map(|line| line.strip_prefix("virsh "));
    commands.by_ref().for_each(|command| {
        session.add(&command.replace("\"$domain\"", "vm"));
    });
    session.ask();
    let (answers, stderr) = session.run(&dir);
    let complaints: Vec<&str> = stderr.lines().filter(|line| !line.contains("no current snapshot")).collect();
    assert!(complaints.is_empty(), "{stderr}\n{script}");
    assert_eq!(&virsh::tree(&answers[0]), want, "{script}");
}

#[test]
fn random_sequences_give_libvirts_trees() {
    if !virsh::available() {
        return;
    }
    let (sequences, steps) = if long_mode() { (200, 120) } else { (60, 30) };
    let seeds = chosen_seed().map_or(0..sequences, |seed| seed..seed + 1);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let seeds = seeds.clone().skip(thread).step_by(THREADS);
            scope.spawn(move || seeds.for_each(|seed| sequence(seed, steps)));
        }
    });
}
