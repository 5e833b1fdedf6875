//! Words of a line: plain where they can be, in quotes where not.

use alloc::borrow::Cow;
use alloc::string::String;

use smallvec::SmallVec;

/// The words of a line.
pub(super) type Words<'a> = SmallVec<[Cow<'a, str>; 6]>;

/// Whether a byte stands for itself outside quotes.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(byte, b'.' | b'_' | b'/' | b'+' | b':' | b'@' | b'%' | b'=' | b',' | b'-')
}

/// Writes one word.
pub(super) fn put(out: &mut String, word: &str) {
    if !word.is_empty() && word.bytes().all(is_plain) {
        out.push_str(word);
        return;
    }
    out.push('"');
    for c in word.chars() {
        match c {
            '"' | '\\' | '\n' | '\r' | '\t' => out.extend(c.escape_default()),
            c if c.is_control() => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// The words of one line.
pub(super) fn words(line: &str) -> Result<Words<'_>, &'static str> {
    let mut found = Words::new();
    let mut rest = line.trim_start_matches(' ');
    while !rest.is_empty() {
        let (word, left) = match rest.strip_prefix('"') {
            Some(quoted) => unquote(quoted).map(|(word, left)| (Cow::Owned(word), left))?,
            None => {
                let end = rest.find(' ').unwrap_or(rest.len());
                let (word, left) = rest.split_at(end);
                if word.contains('"') {
                    return Err("a quote inside a word");
                }
                (Cow::Borrowed(word), left)
            }
        };
        if !left.is_empty() && !left.starts_with(' ') {
            return Err("a blank is missing behind a quote");
        }
        found.push(word);
        rest = left.trim_start_matches(' ');
    }
    Ok(found)
}

/// The word that a quote has begun, and what is behind its end.
fn unquote(text: &str) -> Result<(String, &str), &'static str> {
    let mut word = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((word, text.get(at + 1..).unwrap_or_default())),
            '\\' => match chars.next().map(|(_, c)| c) {
                Some('n') => word.push('\n'),
                Some('r') => word.push('\r'),
                Some('t') => word.push('\t'),
                Some(c @ ('"' | '\\')) => word.push(c),
                Some('u') => {
                    let digits: String =
                        chars.by_ref().map(|(_, c)| c).skip(1).take_while(|&c| c != '}').collect();
                    let code = u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32);
                    word.push(code.ok_or("an escape that is no character")?);
                }
                _ => return Err("an unknown escape"),
            },
            c => word.push(c),
        }
    }
    Err("a quote that does not end")
}
