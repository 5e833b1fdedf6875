//! What describes the command line: shells take the completions, and each verb has a page of the manual.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::process::Command;

use pleach_testkit::{Tool, WorkDir};

const PLEACH: &str = env!("CARGO_BIN_EXE_pleach");

#[test]
fn bash_reads_its_completions_and_every_shell_gets_some() {
    let tool = Tool::new(PLEACH);
    let dir = WorkDir::new("completions");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = tool.succeed(&["completions", shell]).stdout;
        assert!(script.contains("libvirt") && script.contains("pleach"), "{shell}");
        fs::write(dir.join(shell), script).unwrap();
    }
    let read = Command::new("bash").arg("-n").arg(dir.join("bash")).status().unwrap();
    assert!(read.success());
    let asked = "source ./bash; COMP_WORDS=(pleach libv); COMP_CWORD=1; _pleach pleach libv pleach; echo ${COMPREPLY[@]}";
    let answer = Command::new("bash").args(["-c", asked]).current_dir(&*dir).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&answer.stdout).trim(), "libvirt");
    assert_eq!(tool.run(&["completions", "tcsh"]).code, Some(2));
}

#[test]
fn every_verb_has_a_page() {
    let tool = Tool::new(PLEACH);
    let dir = WorkDir::new("man");
    let pages = dir.join("man1");
    tool.succeed(&["man", &pages.display().to_string()]);
    let help = tool.succeed(&["--help"]).stdout;
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let mut count = 0;
    for line in commands.lines().take_while(|line| !line.is_empty()) {
        // A verb stands two blanks in; what it does may go on below.
        let Some(verb) = line.strip_prefix("  ").filter(|rest| !rest.starts_with(' ')) else { continue };
        let verb = verb.split_whitespace().next().unwrap();
        let page = fs::read_to_string(pages.join(format!("pleach-{verb}.1")))
            .unwrap_or_else(|e| panic!("{verb}: {e}"));
        assert!(page.contains(".SH SYNOPSIS"), "{verb}");
        count += 1;
    }
    assert!(count > 15, "{help}");
    assert!(pages.join("pleach.1").exists() && pages.join("pleach-libvirt-import.1").exists());
}
