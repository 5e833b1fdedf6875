//! Just enough of Rust's lexer to tell code from comments and literals.

/// `text` with every comment, string and character literal blanked; lines keep their numbers.
pub(crate) fn code_only(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let blank = blank_len(rest, first);
        let (skipped, after) = rest.split_at_checked(blank).unwrap_or((rest, ""));
        code.extend(skipped.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = after;
        if blank == 0 {
            code.push(first);
            rest = rest.get(first.len_utf8()..).unwrap_or_default();
        }
    }
    code
}

/// The identifiers, keywords and numbers of a line.
pub(crate) fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !is_word(c)).filter(|word| !word.is_empty())
}

pub(crate) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Length in bytes of the comment or literal that `rest` starts with; 0 if it starts with code.
fn blank_len(rest: &str, first: char) -> usize {
    match first {
        '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
        '/' if rest.starts_with("/*") => block_comment_len(rest),
        '"' => string_len(rest),
        'r' => raw_string_len(rest),
        '\'' => char_len(rest),
        _ => 0,
    }
}

fn block_comment_len(rest: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while let Some(here) = rest.get(at..).filter(|here| !here.is_empty()) {
        if here.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if here.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += here.chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

fn string_len(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// `r"…"` or `r##"…"##`; a leading `b` or `c` was passed as code.
fn raw_string_len(rest: &str) -> usize {
    let hashes = rest.chars().skip(1).take_while(|c| *c == '#').count();
    let Some(body) = rest.get(1 + hashes..).filter(|body| body.starts_with('"')) else {
        return 0;
    };
    let end = format!("\"{}", "#".repeat(hashes));
    let open = rest.len() - body.len() + 1;
    rest.get(open..).and_then(|inner| inner.find(&end)).map_or(rest.len(), |at| open + at + end.len())
}

/// A character literal, which a lifetime is not.
fn char_len(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    let (_, first) = chars.next().unwrap_or_default();
    if first == '\\' {
        let escaped = chars.next();
        return escaped.and_then(|_| chars.find(|(_, c)| *c == '\'')).map_or(rest.len(), |(at, _)| at + 1);
    }
    match chars.next() {
        Some((at, '\'')) => at + 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_is_left() {
        let cases = [
            ("plain", "a b", "a b"),
            ("line comment", "a // b\nc", "a     \nc"),
            ("nested comment", "a /* b /* c */ d */ e", "a                   e"),
            ("string", r#"a "b \" c" d"#, "a          d"),
            ("string over lines", "\"a\nb\" c", "  \n   c"),
            ("raw string", r##"a r#"b " c"# d"##, "a            d"),
            ("raw string with backslash", r#"a r"\" d"#, "a      d"),
            ("byte string", r#"b"x" d"#, "b    d"),
            ("character", "'a' b", "    b"),
            ("quote character", r"'\'' b", "     b"),
            ("double quote character", "'\"' b", "    b"),
            ("wide character", "'é' b", "    b"),
            ("lifetime", "&'a T", "&'a T"),
            ("raw identifier", "r#type b", "r#type b"),
            ("open string", "a \"b", "a   "),
            ("open comment", "a /* b", "a     "),
            ("division", "a / b", "a / b"),
        ];
        for (name, text, want) in cases {
            assert_eq!(code_only(text), want, "{name}");
        }
    }

    #[test]
    fn words_have_underscores() {
        let found: Vec<&str> = words("forbid(unsafe_code) fn x2").collect();
        assert_eq!(found, ["forbid", "unsafe_code", "fn", "x2"]);
    }
}
