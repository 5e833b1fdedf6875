//! `pleach libvirt`: documents become a catalog and come back byte for byte; what changed in the tree, and only
//! that, changes in them; libvirt's test driver takes them.
//!
//! `PLEACH_LONG=1` runs more and longer sequences, `PLEACH_SEED=…` one sequence again.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;

use pleach_testkit::files::contents;
use pleach_testkit::oracle::qemu_img;
use pleach_testkit::virsh::{self, Session, Tree};
use pleach_testkit::{OnFailure, Outcome, Rng, Tool, WorkDir, chosen_seed, long_mode};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

fn pleach(args: &[&str]) -> Outcome {
    Tool::new(PLEACH).run(args)
}

fn succeed(args: &[&str]) -> String {
    Tool::new(PLEACH).succeed(args).stdout
}

/// A machine's definition with one disk, things of other people in it, and a backing file listed.
fn domain(file: &Path, backing: &str) -> String {
    format!(
        "<domain type='test'>
    <name>vm</name>
    <uuid>5a3f0d0e-6c2b-4a57-9f4e-0f6f1d2c3b4a</uuid>
    <metadata>
      <x:y xmlns:x=\"urn:other\"   odd='a&#10;b'><![CDATA[<kept>]]></x:y>
    </metadata>
    <memory unit='MiB'>16</memory>
    <vcpu>1</vcpu>
    <os>
      <type arch='x86_64'>hvm</type>
    </os>
    <devices>
      <disk type='file' device='disk'>
        <driver name='qemu' type='qcow2'/>
        <source file='{}'/>{backing}
        <target dev='vda' bus='virtio'/>
      </disk>
      <disk type='file' device='cdrom'>
        <target dev='sda' bus='sata'/>
        <readonly/>
      </disk>
    </devices>
  </domain>",
        file.display()
    )
}

struct Record<'a> {
    name: &'a str,
    parent: &'a str,
    /// What is in `<disk …>` of vda.
    disk: String,
    frozen: String,
    backing: String,
    current: bool,
}

fn document(dir: &Path, record: &Record) -> String {
    let parent = match record.parent {
        "" => String::new(),
        name => format!("  <parent>\n    <name>{name}</name>\n  </parent>\n"),
    };
    format!(
        "<!-- libvirt wrote this -->\n\n<domainsnapshot>\n  <name>{}</name>\n  <state>shutoff</state>\n{parent}  \
         <creationTime>1700000000</creationTime>\n  <memory snapshot='no'/>\n  <disks>\n    <disk name='vda' {}\n    \
         <disk name='sda' snapshot='no'/>\n  </disks>\n  {}\n  <cookie>\n    <opaque/>\n  </cookie>\n  \
         <active>{}</active>\n</domainsnapshot>\n",
        record.name,
        record.disk,
        domain(&dir.join(&record.frozen), &record.backing),
        u8::from(record.current),
    )
}

fn external(dir: &Path, overlay: &str) -> String {
    format!(
        "snapshot='external' type='file'>\n      <driver type='qcow2'/>\n      <source file='{}'>\n        \
         <seclabel model='dac' relabel='no'/>\n      </source>\n    </disk>",
        dir.join(overlay).display()
    )
}

/// Images and documents of: internal i in A; a (A, external) on it; b (B) on a, current, with C active; and c, which
/// is in no use, on a.
fn machine(dir: &Path) {
    let path = |name: &str| dir.join(name).display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", &path("A.qcow2"), "4M"]);
    qemu_img(&["snapshot", "-c", "i", &path("A.qcow2")]);
    for (over, base) in [("B.qcow2", "A.qcow2"), ("C.qcow2", "B.qcow2"), ("D.qcow2", "A.qcow2")] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &path(base), &path(over)]);
    }
    let backing = format!(
        "\n        <backingStore type='file'>\n          <format type='qcow2'/>\n          <source file='{}'/>\n          \
         <backingStore/>\n        </backingStore>",
        path("A.qcow2")
    );
    let record = |name, parent, disk, frozen: &str, backing: &str, current| Record {
        name,
        parent,
        disk,
        frozen: frozen.into(),
        backing: backing.into(),
        current,
    };
    let docs = [
        record("i", "", "snapshot='internal'/>".into(), "A.qcow2", "", false),
        record("a &amp; 1", "i", external(dir, "B.qcow2"), "A.qcow2", "", false),
        record("b", "a &amp; 1", external(dir, "C.qcow2"), "B.qcow2", &backing, true),
        record("c", "a &amp; 1", external(dir, "gone.qcow2"), "D.qcow2", &backing, false),
    ];
    fs::create_dir(dir.join("xml")).unwrap();
    for record in &docs {
        let file = format!("{}.xml", record.name.replace("&amp;", "&"));
        fs::write(dir.join("xml").join(file), document(dir, record)).unwrap();
    }
    fs::write(dir.join("vm.xml"), domain(&dir.join("C.qcow2"), "") + "\n").unwrap();
}

fn import(dir: &Path) -> String {
    let path = |name: &str| dir.join(name).display().to_string();
    succeed(&["libvirt", "import", &path("xml"), "--domain", &path("vm.xml")])
}

#[test]
fn what_is_imported_is_exported_byte_for_byte() {
    let dir = WorkDir::new("libvirt");
    let path = |name: &str| dir.join(name).display().to_string();
    machine(&dir);
    assert!(import(&dir).contains("imported 4 snapshots of \"vm\"; current is \"b\""));
    let catalog = fs::read_to_string(dir.join(".pleach/vm.tree")).unwrap();
    for line in
        ["tree vm", "current b", "  active C.qcow2", "  internal vda A.qcow2 i 1", "  external vda D.qcow2"]
    {
        assert!(catalog.lines().any(|one| one == line), "{line}\n{catalog}");
    }
    succeed(&["libvirt", "export", &path("B.qcow2"), &path("out")]);
    for file in fs::read_dir(dir.join("xml")).unwrap() {
        let name = file.unwrap().file_name();
        let read = |part: &str| fs::read_to_string(dir.join(part).join(&name)).unwrap();
        assert_eq!(read("out"), read("xml"), "{name:?}");
    }
    assert_eq!(fs::read(dir.join("out/domain/vm.xml")).unwrap(), fs::read(dir.join("vm.xml")).unwrap());

    // And the other way round: the same catalog, from what was exported.
    fs::remove_file(dir.join(".pleach/vm.tree")).unwrap();
    succeed(&["libvirt", "import", &path("out")]);
    assert_eq!(fs::read_to_string(dir.join(".pleach/vm.tree")).unwrap(), catalog);
    // There is one already, and it stays.
    let again = pleach(&["libvirt", "import", &path("out")]);
    assert_eq!(again.code, Some(2), "{again}");
    let full = pleach(&["libvirt", "export", &path("."), &path("out")]);
    assert_eq!(full.code, Some(1), "{full}");
}

/// Changes the text of a catalog, and its checksum.
fn edit(dir: &Path, change: impl Fn(&str) -> String) {
    let path = dir.join(".pleach/vm.tree");
    let text = fs::read_to_string(&path).unwrap();
    let (body, _) = text.trim_end().rsplit_once('\n').unwrap();
    let body = change(body) + "\n";
    let record = format!("{body}crc32 {:08x}\n", crc32(body.as_bytes()));
    fs::write(path, record).unwrap();
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[test]
fn what_changed_in_the_tree_changes_in_the_documents() {
    let dir = WorkDir::new("libvirt-edit");
    let path = |name: &str| dir.join(name).display().to_string();
    machine(&dir);
    import(&dir);
    // a was deleted, and B merged into A, which keeps its name; then the tree went back to c; a snapshot of pleach's
    // own was taken there.
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &path("D.qcow2"), &path("E.qcow2")]);
    fs::rename(dir.join("A.qcow2"), dir.join("M.qcow2")).unwrap();
    edit(&dir, |text| {
        let start = text.find("snapshot \"a & 1\"").unwrap();
        let end = text.find("snapshot b\n").unwrap();
        let text = format!("{}{}", &text[..start], &text[end..]);
        let text = text.replace("  parent \"a & 1\"", "  parent i").replace("current b", "current mine");
        let text = text.replace("vda A.qcow2", "vda M.qcow2").replace("vda B.qcow2", "vda M.qcow2");
        let text = text.replace("active C.qcow2", "active E.qcow2");
        let mine = "snapshot mine\n  parent c\n  created 1800000000\n  description \"of ours\"\n  external vda D.qcow2\n";
        let text = text.replace("  external vda D.qcow2", "  external vda F.qcow2");
        text.replace("libvirt-domain ", &format!("{mine}libvirt-domain "))
    });
    succeed(&["libvirt", "export", &path("."), &path("out")]);
    let old = |name: &str| fs::read_to_string(dir.join("xml").join(name)).unwrap();
    let new = |name: &str| fs::read_to_string(dir.join("out").join(name)).unwrap();
    assert!(!dir.join("out/a & 1.xml").exists());
    assert_eq!(new("i.xml"), old("i.xml").replace("A.qcow2", "M.qcow2"));
    let b = old("b.xml")
        .replace("a &amp; 1", "i")
        .replace("<active>1", "<active>0")
        .replace("B.qcow2", "M.qcow2");
    let start = b.find("\n        <backingStore type").unwrap();
    let end = b.find("        </backingStore>").unwrap() + "        </backingStore>".len();
    // Nothing stands on it, and its overlay is nobody's.
    assert_eq!(new("b.xml"), format!("{}{}", &b[..start], &b[end..]));
    let mine = new("mine.xml");
    for part in
        ["<name>mine</name>", "<name>c</name>", "<description>of ours</description>", "<![CDATA[<kept>]]>"]
    {
        assert!(mine.contains(part), "{part}\n{mine}");
    }
    assert!(mine.contains("<active>1</active>") && mine.contains(&path("E.qcow2")), "{mine}");
    assert!(new("c.xml").contains(&path("D.qcow2")), "the overlay of c is the file of its child");
    assert!(fs::read_to_string(dir.join("out/domain/vm.xml")).unwrap().contains(&path("E.qcow2")));
    assert_eq!(
        test_driver(&dir, "out"),
        libvirt_tree(&[("i", ""), ("b", "i"), ("c", "i"), ("mine", "c")], "mine")
    );
}

fn libvirt_tree(parents: &[(&str, &str)], current: &str) -> Option<Tree> {
    let parent = |name: &str| Some(name.to_owned()).filter(|name| !name.is_empty());
    let parents = parents.iter().map(|(name, of)| ((*name).to_owned(), parent(of)));
    virsh::available().then(|| (parents.collect(), Some(current.to_owned())))
}

/// The tree that libvirt's test driver makes of an exported directory by its script, run as it is.
fn test_driver(dir: &Path, exported: &str) -> Option<Tree> {
    if !virsh::available() {
        return None;
    }
    let domain = fs::read_to_string(dir.join(exported).join("domain/vm.xml")).unwrap();
    let mut session = Session::new(dir, &domain);
    // The driver's memory is that of one process, so the script's calls are collected, and made by one.
    let calls = dir.join("calls");
    let bin = dir.join("bin");
    fs::create_dir(&bin).unwrap();
    let fake = "#!/bin/sh\nfor word in \"$@\"; do printf \"'%s' \" \"$word\"; done >>\"$CALLS\"\necho \\; >>\"$CALLS\"\n";
    fs::write(bin.join("virsh"), fake).unwrap();
    fs::set_permissions(bin.join("virsh"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let paths = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut script = Command::new("sh");
    script.arg(dir.join(exported).join("redefine.sh")).env("PATH", paths).env("CALLS", &calls);
    assert!(script.status().unwrap().success());
    for call in fs::read_to_string(&calls).unwrap().lines() {
        session.add(call.trim_end_matches([' ', ';']));
    }
    session.ask();
    let (answers, complaints) = session.run(&dir.join(exported));
    assert_eq!(complaints, "");
    Some(virsh::tree(&answers[0]))
}

#[test]
fn libvirt_takes_an_imported_tree_back() {
    let dir = WorkDir::new("libvirt-virsh");
    machine(&dir);
    import(&dir);
    succeed(&["libvirt", "export", &dir.display().to_string(), &dir.join("out").display().to_string()]);
    let want = libvirt_tree(&[("i", ""), ("a & 1", "i"), ("b", "a & 1"), ("c", "a & 1")], "b");
    assert_eq!(test_driver(&dir, "out"), want);
}

/// Parents by name, and the current one, as `pleach tree` says.
fn pleachs_tree(image: &str) -> Tree {
    let document = Tool::new(PLEACH).json(&["tree", image, "--json"]);
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    let nodes = document["nodes"].as_array().unwrap().iter().filter(|node| node["kind"] == "snapshot");
    (
        nodes.map(|node| (text(&node["name"]).unwrap(), text(&node["parent"]))).collect(),
        text(&document["current"]),
    )
}

/// The names in an image's snapshot table, as stock QEMU lists them.
fn table(image: &str) -> Vec<String> {
    let document = qemu_img(&["info", "-U", "--output=json", image]);
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    let all = document["snapshots"].as_array().cloned().unwrap_or_default();
    let mut names: Vec<String> = all.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// One random operation: done to real images, and written down for libvirt.
fn operation(rng: &mut Rng, target: &str, kind: &str, tree: &Tree, number: usize) -> String {
    let names: Vec<&String> = tree.0.keys().collect();
    if names.is_empty() || rng.chance(45) {
        succeed(&["snapshot", target, &format!("s{number}"), kind]);
        return format!("snapshot-create-as vm s{number}");
    }
    let name = *rng.pick(&names);
    if rng.chance(45) {
        succeed(&["revert", target, name, "--discard", "--yes"]);
        return format!("snapshot-revert vm {name}");
    }
    let mut flags = vec!["", "--children-only"];
    // To delete a root and all that stands on it is to delete the machine's disk.
    flags.extend(tree.0[name].is_some().then_some("--children"));
    let flag = *rng.pick(&flags);
    let mut args = vec!["delete", target, name, "--yes"];
    args.extend(Some(flag).filter(|flag| !flag.is_empty()));
    succeed(&args);
    format!("snapshot-delete vm {name} {flag}")
}

#[test]
fn verbs_on_real_images_make_the_trees_that_libvirt_makes() {
    if !virsh::available() {
        return;
    }
    let (sequences, steps) = if long_mode() { (60, 40) } else { (4, 12) };
    for seed in chosen_seed().map_or(0..sequences, |seed| seed..seed + 1) {
        let _seed = OnFailure::print_seed(seed, "libvirt");
        let mut rng = Rng::new(seed);
        let dir = WorkDir::new("libvirt-verbs");
        let image = dir.join("A.qcow2").display().to_string();
        qemu_img(&["create", "-q", "-f", "qcow2", &image, "1M"]);
        succeed(&["init", "vm", "--disk", &format!("vda={image}")]);
        let target = dir.display().to_string();
        let kind = if seed % 2 == 0 { "--internal" } else { "--external" };
        let mut trees = vec![pleachs_tree(&target)];
        let mut commands = Vec::new();
        for number in 0..steps {
            commands.push(operation(&mut rng, &target, kind, trees.last().unwrap(), number));
            trees.push(pleachs_tree(&target));
            let (tree, done) = (trees.last().unwrap(), commands.last().unwrap());
            let is_listed = || table(&image).iter().eq(tree.0.keys());
            assert!(kind == "--external" || is_listed(), "the image after {done}: {tree:?}");
        }
        fs::write(dir.join("vm.xml"), domain(Path::new(&image), "")).unwrap();
        for (place, tree) in libvirts_trees(&dir, &commands).into_iter().enumerate() {
            assert_eq!(trees[place + 1], tree, "after step {place}, {}", commands[place]);
        }
        if !trees.last().unwrap().0.is_empty() {
            let (out, vm) = (dir.join("out").display().to_string(), dir.join("vm.xml").display().to_string());
            succeed(&["libvirt", "export", &target, &out, "--domain", &vm]);
            assert_eq!(test_driver(&dir, "out").as_ref(), trees.last());
            let found = pleach(&["libvirt", "verify", &out, "--json"]).json();
            let is_bad = |one: &&serde_json::Value| {
                ["loses data", "differs"].iter().any(|bad| one["severity"] == *bad)
            };
            let bad: Vec<_> = found["findings"].as_array().unwrap().iter().filter(is_bad).collect();
            assert!(bad.is_empty(), "{kind} {commands:?}: {bad:#?}");
        }
    }
}

/// The trees of libvirt's test driver, after each command.
fn libvirts_trees(dir: &Path, commands: &[String]) -> Vec<Tree> {
    let mut session = Session::new(dir, &fs::read_to_string(dir.join("vm.xml")).unwrap());
    for command in commands {
        session.add(command);
        session.ask();
    }
    let (answers, complaints) = session.run(dir);
    assert_eq!(answers.len(), commands.len(), "{complaints}");
    answers.iter().map(|answer| virsh::tree(answer)).collect()
}

#[test]
fn images_that_are_not_what_the_documents_say_are_found() {
    let dir = WorkDir::new("libvirt-verify");
    let path = |name: &str| dir.join(name).display().to_string();
    machine(&dir);
    let (xml, vm) = (path("xml"), path("vm.xml"));
    let findings = |code: i32| {
        let outcome = pleach(&["libvirt", "verify", &xml, "--domain", &vm, "--json"]);
        assert_eq!(outcome.code, Some(code), "{outcome}");
        let all = outcome.json()["findings"].as_array().unwrap().clone();
        let shown = |one: &serde_json::Value| {
            let name = one["snapshot"].as_str().unwrap_or_default();
            format!("{} {name}", one["code"].as_str().unwrap())
        };
        let serious = all.iter().filter(|one| one["severity"] != "refuses");
        serious.map(shown).map(|one| one.trim().to_owned()).collect::<Vec<_>>()
    };
    // Three files stand on A, in which i is: going back to i would rewrite it below them.
    let sound = ["revert-rewrites-backing-file i".to_owned()];
    assert_eq!(findings(4), sound);

    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &path("B.qcow2"), &path("U.qcow2")]);
    qemu_img(&["snapshot", "-c", "inside", &path("B.qcow2")]);
    qemu_img(&["snapshot", "-d", "i", &path("A.qcow2")]);
    fs::remove_file(dir.join("D.qcow2")).unwrap();
    let found = findings(4);
    for want in
        ["untracked-overlay", "internal-missing i", "revert-rewrites-backing-file i", "file-missing c"]
    {
        assert!(found.iter().any(|one| one == want), "{want}: {found:?}");
    }
    let text = pleach(&["libvirt", "verify", &xml]);
    assert!(text.stdout.contains("loses data") && text.stdout.contains("U.qcow2"), "{text}");
    assert!(text.stderr.contains("--domain"), "{text}");

    // A catalog is looked at as what it would be exported as.
    qemu_img(&["create", "-q", "-f", "qcow2", &path("S.qcow2"), "1M"]);
    qemu_img(&["snapshot", "-c", "s", &path("S.qcow2")]);
    fs::create_dir(dir.join("one")).unwrap();
    let single = Record {
        name: "s",
        parent: "",
        disk: "snapshot='internal'/>".into(),
        frozen: "S.qcow2".into(),
        backing: String::new(),
        current: true,
    };
    fs::write(dir.join("one/s.xml"), document(&dir, &single)).unwrap();
    fs::write(dir.join("one/vm.xml"), domain(&dir.join("S.qcow2"), "")).unwrap();
    succeed(&["libvirt", "import", &path("one"), "--name", "single"]);
    let outcome = pleach(&["libvirt", "verify", &path(".pleach/single.tree")]);
    assert_eq!(outcome.code, Some(0), "{outcome}");
    assert!(
        outcome.stdout.contains("snapshots: 1; ways to lose data: 0; crashes: 0; differences: 0"),
        "{outcome}"
    );
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_written() {
    let dir = WorkDir::new("libvirt-refused");
    let path = |name: &str| dir.join(name).display().to_string();
    let write = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
    let snapshot = |name: &str, parent: &str| {
        format!(
            "<domainsnapshot><name>{name}</name><state>shutoff</state><creationTime>1</creationTime>{parent}\
             <domain type='x'><name>vm</name></domain></domainsnapshot>"
        )
    };
    write("cut.xml", "<domainsnapshot>\n<name>");
    write(
        "bomb.xml",
        "<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><domainsnapshot>&b;</domainsnapshot>",
    );
    write("checkpoint.xml", "<domaincheckpoint/>");
    write("orphan.xml", &snapshot("o", "<parent><name>nobody</name></parent>"));
    write("fine.xml", &snapshot("f", ""));
    write("again.xml", &snapshot("f", ""));
    // A name, the arguments, the exit code, a part of the message.
    let cases: &[(&str, &[&str], i32, &str)] = &[
        ("not there", &["nothing.xml"], 7, "nothing.xml"),
        ("cut", &["cut.xml"], 1, "line 2: not well-formed"),
        ("entity", &["bomb.xml"], 1, "document type declaration"),
        ("checkpoint", &["checkpoint.xml"], 1, "<domaincheckpoint>, not a <domainsnapshot>"),
        ("no parent", &["orphan.xml"], 1, "the parent \"nobody\" of \"o\""),
        ("twice", &["fine.xml", "again.xml"], 1, "two snapshots are named \"f\""),
        ("no directory", &["fine.xml"], 2, "--into DIR"),
        ("not a name", &["fine.xml", "--name=a/b", "--into", "."], 2, "a/b"),
    ];
    let before = contents(&dir);
    for (case, args, code, part) in cases {
        let full: Vec<String> =
            args.iter().map(|one| if one.ends_with(".xml") { path(one) } else { (*one).into() }).collect();
        let mut all = vec!["libvirt".to_owned(), "import".to_owned()];
        all.extend(full);
        let outcome = Tool::new(PLEACH).run(&all);
        assert_eq!(outcome.code, Some(*code), "{case}: {outcome}");
        assert!(outcome.stderr.contains(part), "{case}: {outcome}");
    }
    assert_eq!(contents(&dir), before);

    // A tree that libvirt has no place for.
    succeed(&["libvirt", "import", &path("fine.xml"), "--into", &path(".")]);
    edit(&dir, |text| text.replace("snapshot f\n", "snapshot a/b\n"));
    let outcome = pleach(&["libvirt", "export", &path("."), &path("out")]);
    assert_eq!(outcome.code, Some(8), "{outcome}");
    assert!(outcome.stderr.contains("a/b") && !dir.join("out").exists(), "{outcome}");
}
