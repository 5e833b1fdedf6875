//! Any bytes: never a panic; what is read is written byte for byte; a change reads back as what was put in, and taken back leaves the document.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use pleach_libvirt::{DiskList, DomainDocument, Facts, Snapshot, export, import, lineage, problems, verify};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(document) = DomainDocument::parse(bytes) {
        assert_eq!(document.text().as_bytes(), bytes);
    }
    if let Ok(request) = Snapshot::parse_request(bytes) {
        assert_eq!(request.text().as_bytes(), bytes);
        changes(request);
    }
    if let Ok(snapshot) = Snapshot::parse(bytes) {
        assert_eq!(snapshot.text().as_bytes(), bytes);
        let again = Snapshot::parse(snapshot.text().as_bytes()).expect("it was read");
        assert_eq!(again.facts(), snapshot.facts());
        let _ = snapshot.check_redefine();
        alone(&snapshot);
        changes(snapshot);
    }
});

/// A tree of one document.
fn alone(snapshot: &Snapshot) {
    let all = std::slice::from_ref(snapshot);
    let is_fine = problems(all).iter().all(|one| one.to_string().contains("not allowed"));
    assert_eq!(lineage(all).is_ok(), is_fine);
    verify(all, snapshot.facts().domain.as_ref(), &BTreeMap::new());
    let Ok(record) = import("tree", all, None, |_| true) else { return };
    let Ok(exported) = export(&record, None, |_| None) else { return };
    let [written] = exported.snapshots.as_slice() else { panic!("one document a snapshot") };
    let (old, new) = (snapshot.facts(), written.facts());
    assert_eq!((&old.name, old.state, old.created), (&new.name, new.state, new.created));
    assert_eq!((&old.description, &old.memory), (&new.description, &new.memory));
}

/// Facts without what moves when the text does.
fn settled(facts: &Facts) -> Facts {
    let mut facts = facts.clone();
    facts.cookie = None;
    for domain in facts.domain.iter_mut().chain(&mut facts.inactive_domain) {
        domain.span = 0..0;
    }
    facts
}

fn changes(mut snapshot: Snapshot) {
    let before = settled(snapshot.facts());
    if snapshot.set_name("<new> & 'other'").is_ok() {
        assert_eq!(snapshot.name(), "<new> & 'other'");
        match &before.name {
            Some(name) => snapshot.set_name(name).expect("it had that name"),
            None => return,
        }
    }
    if snapshot.set_description(Some("text\r\n\t")).is_ok() {
        assert_eq!(snapshot.facts().description.as_deref(), Some("text\r\n\t"));
        let _ = snapshot.set_description(before.description.as_deref());
    }
    if snapshot.set_parent(Some("p]]>")).is_ok() {
        let _ = snapshot.set_parent(before.parent.as_deref());
    }
    let after = settled(snapshot.facts());
    assert_eq!((&after.name, &after.state, &after.memory), (&before.name, &before.state, &before.memory));
    assert_eq!((&after.disks, &after.domain), (&before.disks, &before.domain));
    let _ = snapshot.set_current(Some(true));
    let _ = snapshot.rename_files(|path| Some(format!("{path}&")));
    let _ = snapshot.forget_backing("vda");
    let _ = snapshot.set_frozen("vda", "/x", Some("raw"));
    let _ = snapshot.set_disks(DiskList::RevertDisks, Some(&[]));
    let _ = snapshot.set_disks(DiskList::Disks, None);
    let text = snapshot.text().to_owned();
    assert!(Snapshot::parse_request(text.as_bytes()).is_ok(), "a change left what cannot be read: {text}");
}
