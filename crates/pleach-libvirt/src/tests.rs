//! Documents that are read, refused and changed.

use crate::{
    DiskList, DiskMode, Memory, NewDisk, Snapshot, Source, SourceKind, State, lineage, problems,
    redefine_script,
};

/// A record with everything in it, laid out as libvirt lays it out.
const FULL: &str = "\u{feff}<?xml version='1.0' encoding='UTF-8'?>
<!-- written by hand -->

<domainsnapshot>
  <name>a &amp; b</name>
  <state>shutoff</state>
  <parent>
    <name>root</name>
  </parent>
  <creationTime>1700000000</creationTime>
  <memory snapshot='no'/>
  <disks>
    <disk name='vda' snapshot='external' type='file'>
      <driver type='qcow2'/>
      <source file='/i/a.top'/>
    </disk>
    <disk name='hdc' snapshot='no'/>
  </disks>
  <domain type='kvm'>
    <name>vm</name>
    <uuid>1b4e28ba-2fa1-11d2-883f-0016d3cca427</uuid>
    <metadata>
      <own:note xmlns:own=\"urn:x\"><![CDATA[ <raw> ]]></own:note>
    </metadata>
    <devices>
      <disk type='file' device='disk'>
        <driver name='qemu' type='qcow2'/>
        <source file='/i/a.qcow2'/>
        <backingStore type='file'>
          <format type='qcow2'/>
          <source file='/i/base.qcow2'/>
          <backingStore/>
        </backingStore>
        <target dev='vda' bus='virtio'/>
      </disk>
      <disk type='file' device='cdrom'>
        <target dev='hdc' bus='ide'/>
        <readonly/>
      </disk>
    </devices>
  </domain>
  <cookie><x/></cookie>
  <active>1</active>
</domainsnapshot>
";

fn full() -> Snapshot {
    Snapshot::parse(FULL.as_bytes()).unwrap()
}

/// A record of that name and parent, with more elements.
fn record(name: &str, parent: &str, more: &str) -> Snapshot {
    let parent =
        if parent.is_empty() { String::new() } else { format!("<parent><name>{parent}</name></parent>") };
    let text = format!(
        "<domainsnapshot><name>{name}</name><state>shutoff</state>{parent}<creationTime>1</creationTime>{more}\
         </domainsnapshot>"
    );
    Snapshot::parse(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn a_full_record_is_read() {
    let snapshot = full();
    let facts = snapshot.facts();
    assert_eq!(snapshot.text(), FULL);
    assert_eq!(snapshot.name(), "a & b");
    assert_eq!((facts.state, facts.created), (Some(State::Shutoff), Some(1_700_000_000)));
    assert_eq!((facts.parent.as_deref(), facts.current), (Some("root"), Some(true)));
    assert_eq!(facts.memory, Memory::No);
    assert!(facts.is_external());
    let disks = facts.disks.as_deref().unwrap();
    assert_eq!(disks[0].overlay, Source { kind: SourceKind::File, path: Some("/i/a.top".into()) });
    assert_eq!(disks[0].format.as_deref(), Some("qcow2"));
    let domain = facts.domain.as_ref().unwrap();
    assert!(
        FULL[domain.span.clone()].starts_with("<domain type")
            && FULL[domain.span.clone()].ends_with("</domain>")
    );
    assert_eq!(domain.disk("vda").unwrap().backing.len(), 1);
    assert!(domain.disk("hdc").unwrap().read_only);
    assert_eq!(&FULL[facts.cookie.clone().unwrap()], "<cookie><x/></cookie>");
    snapshot.check_redefine().unwrap();
    let kept = crate::storage("a & b", facts);
    assert_eq!(kept, [("vda".into(), pleach_lineage::Storage::External { file: "/i/a.qcow2".into() })]);
}

#[test]
fn what_is_refused_and_what_for() {
    let own_dtd = "<!DOCTYPE domainsnapshot [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><domainsnapshot>&a;</domainsnapshot>";
    let deep = format!("<domainsnapshot>{}", "<a>".repeat(300));
    let twice = "<domainsnapshot><name>a</name><state a='1' a='2'>shutoff</state></domainsnapshot>";
    let state = |word: &str| {
        format!(
            "<domainsnapshot><name>a</name><state>{word}</state><creationTime>1</creationTime></domainsnapshot>"
        )
    };
    let time = |number: &str| {
        format!(
            "<domainsnapshot><name>a</name><state>running</state><creationTime>{number}</creationTime></domainsnapshot>"
        )
    };
    let rest = |more: &str| {
        format!(
            "<domainsnapshot><name>a</name><state>shutoff</state><creationTime>1</creationTime>{more}</domainsnapshot>"
        )
    };
    let disk = |disk: &str| rest(&format!("<disks>{disk}</disks>"));
    // A name, a document, the code, a part of the message.
    let cases: &[(&str, String, &str, &str)] = &[
        ("nothing", String::new(), "malformed", "no element"),
        ("text", "snapshot".into(), "malformed", "outside the root"),
        ("two roots", "<domainsnapshot/><a/>".into(), "malformed", "second element"),
        ("no end", "<domainsnapshot><a>".into(), "malformed", "<a> has no end"),
        ("wrong end", "<domainsnapshot></a>".into(), "malformed", "</a>"),
        ("cut tag", "<domainsnapshot".into(), "malformed", ""),
        (
            "bare ampersand",
            "<domainsnapshot>a & b</domainsnapshot>".into(),
            "malformed",
            "reference not closed",
        ),
        ("bad number", "<domainsnapshot>&#0;</domainsnapshot>".into(), "malformed", "character number"),
        ("no quotes", "<domainsnapshot a=b/>".into(), "malformed", "quotes"),
        ("attribute twice", twice.into(), "malformed", "the attribute a is there twice"),
        ("control character", "<domainsnapshot>\u{1}</domainsnapshot>".into(), "malformed", "U+0001"),
        ("late declaration", " <?xml version='1.0'?><domainsnapshot/>".into(), "malformed", "declaration"),
        ("an entity from outside", own_dtd.into(), "dtd", "DOCTYPE"),
        (
            "an undefined entity",
            "<domainsnapshot>&a;</domainsnapshot>".into(),
            "entity",
            "\"a\" is not defined",
        ),
        ("encoding", "<?xml version='1.0' encoding='latin1'?><domainsnapshot/>".into(), "encoding", "latin1"),
        ("too deep", deep, "too-deep", "256"),
        ("too long", format!("<domainsnapshot>{}", " ".repeat(1 << 20)), "too-long", "1048576"),
        ("a domain", "<domain/>".into(), "wrong-root", "<domain>, not a <domainsnapshot>"),
        ("no name", "<domainsnapshot/>".into(), "missing", "<name>"),
        ("empty name", "<domainsnapshot><name/></domainsnapshot>".into(), "missing", "<name>"),
        ("no state", "<domainsnapshot><name>a</name></domainsnapshot>".into(), "missing", "<state>"),
        ("nostate", state("nostate"), "value", "\"nostate\"; may be one of running"),
        ("blanks around the time", time(" 1 "), "value", "without blanks"),
        ("a time too large", time("9223372036854775808"), "value", "whole number"),
        ("active", rest("<active>yes</active>"), "value", "<active> is \"yes\""),
        ("memory mode", rest("<memory snapshot='manual'/>"), "value", "no, internal or external"),
        ("memory when off", rest("<memory snapshot='internal'/>"), "disks", "offline or disk-only"),
        ("memory without file", rest("<memory snapshot='external'/>"), "disks", "require a filename"),
        ("memory with file", rest("<memory snapshot='no' file='/m'/>"), "disks", "requires external"),
        ("disk without name", disk("<disk/>"), "missing", "name of a <disk>"),
        (
            "disk mode",
            disk("<disk name='a' snapshot='default'/>"),
            "value",
            "no, internal, external or manual",
        ),
        ("disk type", disk("<disk name='a' type='dir'/>"), "value", "file, block or network"),
        ("relative path", disk("<disk name='a'><source file='x'/></disk>"), "value", "absolute"),
        ("format", disk("<disk name='a'><driver type='zip'/></disk>"), "value", "\"zip\"; may be one of raw"),
        (
            "path inside",
            disk("<disk name='a' snapshot='internal'><source file='/x'/></disk>"),
            "disks",
            "external",
        ),
        ("no target", rest("<domain type='x'><devices><disk/></devices></domain>"), "missing", "target"),
        (
            "two targets",
            rest(
                "<domain type='x'><devices><disk><target dev='a'/></disk><disk><target dev='a'/></disk></devices></domain>",
            ),
            "disks",
            "two disks \"a\"",
        ),
    ];
    for (case, text, code, part) in cases {
        let error = Snapshot::parse(text.as_bytes()).map(|_| ()).unwrap_err();
        assert_eq!(error.code(), *code, "{case}: {error}");
        assert!(error.to_string().contains(part), "{case}: {error}");
        assert!(!error.to_string().contains('\n'), "{case}: {error:?}");
    }
    let error = Snapshot::parse(b"<domainsnapshot>\n\xff</domainsnapshot>").map(|_| ()).unwrap_err();
    assert_eq!((error.code(), error.line, error.offset), ("encoding", 2, 17));
}

#[test]
fn requests_may_leave_things_out() {
    for text in [
        "<domainsnapshot/>",
        "<domainsnapshot><state>bogus</state><creationTime>x</creationTime></domainsnapshot>",
        "<domainsnapshot><disks><disk name='/dev/x'/><disk name='vda'><source/></disk></disks></domainsnapshot>",
        "<domainsnapshot><memory file='/m'/></domainsnapshot>",
    ] {
        let request =
            Snapshot::parse_request(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(request.facts().state, None, "{text}");
        assert!(Snapshot::parse(text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn text_is_what_a_reader_gets() {
    let name = |text: &str| record(text, "", "").name().to_owned();
    assert_eq!(name("a&#x41;&#66;<!-- no -->&lt;<![CDATA[&lt;]]>"), "aAB<&lt;");
    assert_eq!(name("a\r\nb\rc"), "a\nb\nc");
    assert_eq!(name("<b>in</b>side"), "inside");
    let disk = record("a", "", "<disks><disk name='a\nb&#10;c'/></disks>");
    assert_eq!(disk.facts().disks.as_deref().unwrap()[0].name, "a b\nc");
}

#[test]
fn a_change_touches_nothing_else() {
    type Change = fn(&mut Snapshot) -> Result<(), crate::DocumentError>;
    // A name, a change, what goes, what comes.
    let cases: &[(&str, Change, &str, &str)] = &[
        ("name", |s| s.set_name("x<y"), "<name>a &amp; b</name>", "<name>x&lt;y</name>"),
        ("the same name", |s| s.set_name("a & b"), "", ""),
        ("parent", |s| s.set_parent(Some("o'k")), "<name>root</name>", "<name>o&apos;k</name>"),
        ("root", |s| s.set_parent(None), "\n  <parent>\n    <name>root</name>\n  </parent>", ""),
        ("not current", |s| s.set_current(Some(false)), "<active>1<", "<active>0<"),
        ("open", |s| s.set_current(None), "\n  <active>1</active>", ""),
        (
            "description",
            |s| s.set_description(Some("new")),
            "</name>\n  <state>",
            "</name>\n  <description>new</description>\n  <state>",
        ),
        ("time", |s| s.set_created(-5), "1700000000", "-5"),
        ("state", |s| s.set_state(State::Crashed), "<state>shutoff<", "<state>crashed<"),
        (
            "renamed files",
            |s| s.rename_files(|path| (path == "/i/base.qcow2").then(|| "/i/b&w".into())),
            "/i/base.qcow2",
            "/i/b&amp;w",
        ),
        (
            "disks",
            |s| {
                let overlay = Source { kind: SourceKind::File, path: Some("/n".into()) };
                let external = NewDisk {
                    name: "vda".into(),
                    mode: DiskMode::External,
                    overlay: Some((overlay, "qcow2".into())),
                };
                let no = NewDisk { name: "hdc".into(), mode: DiskMode::No, overlay: None };
                s.set_disks(DiskList::Disks, Some(&[external, no]))
            },
            "/i/a.top",
            "/n",
        ),
    ];
    for (case, change, old, new) in cases {
        let mut snapshot = full();
        change(&mut snapshot).unwrap();
        let want = if old.is_empty() { FULL.to_owned() } else { FULL.replacen(old, new, 1) };
        assert_eq!(snapshot.text(), want, "{case}");
        assert_eq!(Snapshot::parse(want.as_bytes()).unwrap().facts(), snapshot.facts(), "{case}");
    }
}

#[test]
fn a_change_taken_back_leaves_the_document_as_it_was() {
    for text in [
        "<domainsnapshot><name>a</name><state>running</state><creationTime>1</creationTime></domainsnapshot>",
        "<domainsnapshot>\n\t<name>a</name>\n\t<state>running</state>\n\t<creationTime>1</creationTime>\n</domainsnapshot>\n",
    ] {
        let mut snapshot = Snapshot::parse(text.as_bytes()).unwrap();
        snapshot.set_parent(Some("p")).unwrap();
        snapshot.set_description(Some("d")).unwrap();
        snapshot.set_current(Some(true)).unwrap();
        let facts = snapshot.facts();
        assert_eq!((facts.parent.as_deref(), facts.description.as_deref()), (Some("p"), Some("d")));
        assert_eq!(facts.current, Some(true));
        snapshot.set_description(None).unwrap();
        snapshot.set_parent(None).unwrap();
        snapshot.set_current(None).unwrap();
        assert_eq!(snapshot.text(), text);
    }
    let mut request = Snapshot::parse_request(b"<domainsnapshot/>").unwrap();
    request.set_name("n").unwrap();
    assert_eq!(request.text(), "<domainsnapshot>\n  <name>n</name>\n</domainsnapshot>");
}

#[test]
fn a_frozen_file_moves_and_its_list_of_backing_files_goes() {
    let mut snapshot = full();
    snapshot.set_frozen("vda", "/i/a.qcow2", Some("qcow2")).unwrap();
    assert_eq!(snapshot.text(), FULL, "nothing to change");
    snapshot.set_frozen("vda", "/i/merged", Some("raw")).unwrap();
    let disk = snapshot.facts().domain.as_ref().unwrap().disk("vda").unwrap().clone();
    assert_eq!((disk.source.path.as_deref(), disk.format.as_deref()), (Some("/i/merged"), Some("raw")));
    assert!(disk.backing.is_empty() && !snapshot.text().contains("backingStore"));
    assert!(snapshot.set_frozen("vdz", "/x", None).is_err());
    assert!(snapshot.set_frozen("hdc", "/x", None).is_err(), "an empty drive");
}

#[test]
fn what_cannot_be_written_is_refused_and_changes_nothing() {
    let mut snapshot = full();
    for result in [
        snapshot.set_name("a\u{1}"),
        snapshot.set_name(""),
        snapshot.set_parent(Some("\u{0}")),
        snapshot.rename_files(|_| Some("relative".into())),
        snapshot.set_domain("<domain>"),
        snapshot.set_domain("<!DOCTYPE a><domain/>"),
    ] {
        assert!(result.is_err());
    }
    assert_eq!(snapshot.text(), FULL);
}

#[test]
fn redefining_wants_a_domain_and_a_name_that_is_a_file_name() {
    let domain = "<domain type='x'><devices><disk><source file='/a'/><target dev='vda'/></disk>\
                  <disk><source file='/b'/><target dev='vdb'/></disk></devices></domain>";
    let with = |disks: &str| format!("<disks>{disks}</disks>{domain}");
    let long = "n".repeat(248);
    let cases: &[(&str, &str, String, &str)] = &[
        ("fine", "a", domain.into(), ""),
        ("listed by path", "a", with("<disk name='/a' snapshot='internal'/>"), ""),
        ("no domain", "a", String::new(), "<domain type=…>"),
        ("domain of old", "a", "<domain><uuid>x</uuid></domain>".into(), "<domain type=…>"),
        ("slash", "a/b", domain.into(), "'/'"),
        ("dot", ".a", domain.into(), "starts with"),
        ("long", &long, domain.into(), "247"),
        ("unknown disk", "a", with("<disk name='vdz' snapshot='internal'/>"), "no disk named \"vdz\""),
        (
            "twice",
            "a",
            with("<disk name='vda' snapshot='internal'/><disk name='/a' snapshot='internal'/>"),
            "twice",
        ),
        (
            "too many",
            "a",
            with("<disk name='vda'/><disk name='vdb'/><disk name='vdc'/>"),
            "too many disk snapshot requests",
        ),
        ("one left out", "a", with("<disk name='vda' snapshot='no'/>"), "must use snapshot mode 'internal'"),
        (
            "one left out of an external one",
            "a",
            with("<disk name='vda' snapshot='no'/><disk name='vdb'><source file='/c'/></disk>"),
            "",
        ),
    ];
    for (case, name, more, part) in cases {
        let said = record(name, "", more)
            .check_redefine()
            .map_or_else(|error| error.to_string(), |()| String::new());
        assert!(said.contains(part) && said.is_empty() == part.is_empty(), "{case}: {said}");
    }
}

#[test]
fn records_become_a_tree_or_are_refused() {
    let current = "<active>1</active>";
    let good = [record("c", "a", current), record("b", "a", ""), record("a", "", "<active>0</active>")];
    let tree = lineage(&good).unwrap();
    let names: Vec<_> = tree.depth_first().map(|(depth, id)| (depth, tree[id].name.as_str())).collect();
    assert_eq!(names, [(0, "a"), (1, "b"), (1, "c")]);
    assert_eq!(tree.current(), tree.find("c"));

    let cases: &[(&str, Vec<Snapshot>, &str)] = &[
        ("twice", vec![record("a", "", ""), record("a", "", "")], "two snapshots"),
        ("no parent", vec![record("a", "z", "")], "\"z\" of \"a\" is not among"),
        ("own parent", vec![record("a", "a", "")], "[\"a\"]"),
        ("circle", vec![record("x", "b", ""), record("a", "b", ""), record("b", "a", "")], "[\"a\", \"b\"]"),
        ("two current", vec![record("a", "", current), record("b", "", current)], "all claim"),
    ];
    for (case, snapshots, part) in cases {
        let found = problems(snapshots);
        assert_eq!(found.len(), 1, "{case}: {found:?}");
        assert!(found[0].to_string().contains(part), "{case}: {}", found[0]);
        assert_eq!(lineage(snapshots).unwrap_err(), found, "{case}");
    }
    assert_eq!(problems(&[record("a/b", "", "")]).len(), 1);
    assert!(lineage(&[record("a/b", "", "")]).is_ok(), "any name will do for a tree");
}

#[test]
fn the_script_has_parents_first_and_one_current() {
    let snapshots = [record("it's", "root", "<active>1</active>"), record("root", "", "")];
    let script = redefine_script("my vm", &snapshots, &["it's.xml".into(), "root.xml".into()]).unwrap();
    let lines: Vec<&str> = script.lines().filter(|line| line.starts_with("virsh")).collect();
    assert_eq!(
        lines,
        [
            "virsh snapshot-create --domain \"$domain\" --xmlfile ./root.xml --redefine",
            r#"virsh snapshot-create --domain "$domain" --xmlfile './it'\''s.xml' --redefine --current"#,
        ]
    );
    assert!(script.contains("domain='my vm'"));
}
