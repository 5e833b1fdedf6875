//! A small JSON reader, for `cargo metadata`.

/// A JSON value; numbers and the three words keep their text.
#[derive(Debug, PartialEq)]
pub(crate) enum Json {
    Word(String),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Reads the value that `text` starts with; `None` if it is not JSON.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        value(&mut text.chars().peekable())
    }

    /// A member of an object.
    pub(crate) fn get(&self, name: &str) -> Option<&Self> {
        let Self::Object(members) = self else { return None };
        members.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    pub(crate) fn text(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    pub(crate) fn list(&self) -> Option<&[Self]> {
        if let Self::List(list) = self { Some(list) } else { None }
    }
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

fn value(chars: &mut Chars<'_>) -> Option<Json> {
    skip_space(chars);
    match chars.peek()? {
        '"' => string(chars).map(Json::Text),
        '[' => items(chars, ']', value).map(Json::List),
        '{' => items(chars, '}', member).map(Json::Object),
        _ => word(chars).map(Json::Word),
    }
}

fn member(chars: &mut Chars<'_>) -> Option<(String, Json)> {
    let name = string(chars)?;
    skip_space(chars);
    chars.next_if_eq(&':')?;
    Some((name, value(chars)?))
}

/// Comma-separated items up to `end`; the opening bracket comes first.
fn items<T>(chars: &mut Chars<'_>, end: char, item: fn(&mut Chars<'_>) -> Option<T>) -> Option<Vec<T>> {
    chars.next();
    let mut found = Vec::new();
    skip_space(chars);
    if chars.next_if_eq(&end).is_some() {
        return Some(found);
    }
    loop {
        skip_space(chars);
        found.push(item(chars)?);
        skip_space(chars);
        match chars.next()? {
            ',' => {}
            c if c == end => return Some(found),
            _ => return None,
        }
    }
}

fn string(chars: &mut Chars<'_>) -> Option<String> {
    chars.next_if_eq(&'"')?;
    let mut text = String::new();
    loop {
        match chars.next()? {
            '"' => return Some(text),
            '\\' => text.push(escaped(chars)?),
            c => text.push(c),
        }
    }
}

/// What follows a backslash. Halves of surrogate pairs become U+FFFD: no name we look for has any.
fn escaped(chars: &mut Chars<'_>) -> Option<char> {
    Some(match chars.next()? {
        'n' => '\n',
        't' => '\t',
        'r' => '\r',
        'b' => '\u{8}',
        'f' => '\u{c}',
        'u' => {
            let digits: String = chars.by_ref().take(4).collect();
            char::from_u32(u32::from_str_radix(&digits, 16).ok()?).unwrap_or('\u{fffd}')
        }
        c => c,
    })
}

fn word(chars: &mut Chars<'_>) -> Option<String> {
    let mut word = String::new();
    while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || "+-.".contains(*c)) {
        word.push(c);
    }
    (!word.is_empty()).then_some(word)
}

fn skip_space(chars: &mut Chars<'_>) {
    while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_cargo_writes() {
        let json = Json::parse(
            r#"{"packages": [{"name":"a\"b\u0041","rust_version":null},{"n":-1.5e+3}], "x":{}, "y":[]}"#,
        )
        .unwrap();
        let packages = json.get("packages").and_then(Json::list).unwrap();
        assert_eq!(packages[0].get("name").and_then(Json::text), Some("a\"bA"));
        assert_eq!(packages[0].get("rust_version"), Some(&Json::Word("null".into())));
        assert_eq!(packages[1].get("n"), Some(&Json::Word("-1.5e+3".into())));
        assert_eq!(json.get("x"), Some(&Json::Object(vec![])));
        assert_eq!(json.get("y"), Some(&Json::List(vec![])));
    }

    #[test]
    fn refuses_what_is_not_json() {
        for text in ["", "{", "[1", "[1 2]", "{\"a\"}", "\"open", "{1:2}"] {
            assert_eq!(Json::parse(text), None, "{text}");
        }
    }
}
