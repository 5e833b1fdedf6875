//! A document as elements with the places of everything in its text, so that a change touches nothing else.

use std::borrow::Cow;
use std::ops::Range;

use quick_xml::Reader;
use quick_xml::events::Event;

use crate::error::{DocumentError, Problem};

/// The longest document that is read, in bytes: libvirt reads no longer file.
pub const MOST_BYTES: usize = 1 << 20;
/// libvirt's XML parser goes no deeper.
pub(crate) const MOST_DEPTH: usize = 256;

/// An element, by its place in the order of start tags.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ElementId(usize);

/// A well-formed document without a document type declaration.
#[derive(Clone, Debug)]
pub(crate) struct Xml {
    text: String,
    elements: Vec<Element>,
    /// In the order of the text.
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug)]
struct Element {
    name: Range<usize>,
    attributes: Vec<Attribute>,
    whole: Range<usize>,
    /// Between the tags; `None` where one tag is both.
    inner: Option<Range<usize>>,
    children: Vec<ElementId>,
}

#[derive(Clone, Debug)]
struct Attribute {
    name: Range<usize>,
    /// Without the quotes.
    value: Range<usize>,
}

/// A piece of character data.
#[derive(Clone, Debug)]
struct Piece {
    span: Range<usize>,
    literal: bool,
}

impl Xml {
    /// Reads a whole document: UTF-8, well-formed, no document type declaration, within the limits.
    ///
    /// # Errors
    /// The first thing that is wrong, in the order of the text.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        if bytes.len() > MOST_BYTES {
            let problem = Problem::TooLong { len: bytes.len(), most: MOST_BYTES };
            return Err(DocumentError::at(bytes, MOST_BYTES, problem));
        }
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let found = if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
                "UTF-16"
            } else {
                "this byte"
            };
            DocumentError::at(bytes, error.valid_up_to(), Problem::Encoding { found: found.into() })
        })?;
        if let Some((at, c)) = text.char_indices().find(|&(_, c)| !is_char(c)) {
            let why = format!("the character U+{:04X} may not be in a document", u32::from(c));
            return Err(DocumentError::at(bytes, at, Problem::Malformed { why }));
        }
        let mut building = Building { text, xml: Vec::new(), pieces: Vec::new(), open: Vec::new() };
        building.run()?;
        Ok(Self { text: text.to_owned(), elements: building.xml, pieces: building.pieces })
    }

    /// The document, byte for byte.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The one element that is in no other.
    pub(crate) fn root(&self) -> ElementId {
        ElementId(0)
    }

    /// The name of an element, prefix included.
    pub(crate) fn name(&self, id: ElementId) -> &str {
        self.at(self.element(id).name.clone())
    }

    /// The place of a whole element, tags included.
    pub(crate) fn whole(&self, id: ElementId) -> Range<usize> {
        self.element(id).whole.clone()
    }

    /// The place between the tags; `None` where one tag is both.
    pub(crate) fn inner(&self, id: ElementId) -> Option<Range<usize>> {
        self.element(id).inner.clone()
    }

    /// The elements directly inside, in order.
    pub(crate) fn children(&self, id: ElementId) -> impl Iterator<Item = ElementId> + '_ {
        self.element(id).children.iter().copied()
    }

    /// The elements of that name directly inside, in order.
    pub(crate) fn named<'a>(&'a self, id: ElementId, name: &'a str) -> impl Iterator<Item = ElementId> + 'a {
        self.children(id).filter(move |&child| self.name(child) == name)
    }

    /// The first element of that name directly inside.
    pub(crate) fn child(&self, id: ElementId, name: &str) -> Option<ElementId> {
        self.named(id, name).next()
    }

    /// The value of an attribute, references resolved.
    pub(crate) fn attribute(&self, id: ElementId, name: &str) -> Option<String> {
        Some(unescaped(self.at(self.attribute_place(id, name)?), true).into_owned())
    }

    /// The place of an attribute's value, without the quotes.
    pub(crate) fn attribute_place(&self, id: ElementId, name: &str) -> Option<Range<usize>> {
        let attributes = &self.element(id).attributes;
        Some(attributes.iter().find(|one| self.at(one.name.clone()) == name)?.value.clone())
    }

    /// Where a further attribute can be inserted: behind the last one.
    pub(crate) fn attribute_end(&self, id: ElementId) -> usize {
        let element = self.element(id);
        element.attributes.last().map_or(element.name.end, |last| last.value.end + 1)
    }

    /// All character data inside, that of inner elements included, references resolved.
    pub(crate) fn content(&self, id: ElementId) -> String {
        let Some(inner) = self.inner(id) else { return String::new() };
        let from = self.pieces.partition_point(|piece| piece.span.start < inner.start);
        let pieces = self.pieces.iter().skip(from).take_while(|piece| piece.span.start < inner.end);
        let mut text = String::new();
        for piece in pieces {
            let raw = self.at(piece.span.clone());
            text.push_str(&if piece.literal { line_ends(raw) } else { unescaped(raw, false) });
        }
        text
    }

    /// An error at the start tag of an element.
    pub(crate) fn error(&self, id: ElementId, problem: Problem) -> DocumentError {
        DocumentError::at(self.text.as_bytes(), self.element(id).whole.start, problem)
    }

    fn element(&self, id: ElementId) -> &Element {
        self.elements.get(id.0).expect("ids come from this document")
    }

    fn at(&self, span: Range<usize>) -> &str {
        self.text.get(span).expect("places come from this document")
    }
}

struct Building<'a> {
    text: &'a str,
    xml: Vec<Element>,
    pieces: Vec<Piece>,
    /// The elements that have not ended yet, outermost first, and where their content starts.
    open: Vec<(ElementId, usize)>,
}

impl<'a> Building<'a> {
    fn run(&mut self) -> Result<(), DocumentError> {
        // The byte order mark is no part of the document.
        let base = if self.text.starts_with('\u{feff}') { 3 } else { 0 };
        let mut reader = Reader::from_str(self.text.get(base..).unwrap_or_default());
        reader.config_mut().enable_all_checks(true);
        let mut start = base;
        loop {
            let event = reader.read_event();
            let at = |position: u64| base + usize::try_from(position).unwrap_or(usize::MAX);
            let event = event.map_err(|error| {
                self.malformed(at(reader.error_position()).max(start), &error.to_string())
            })?;
            let end = at(reader.buffer_position());
            match event {
                Event::Start(_) => self.start(start..end, false)?,
                Event::Empty(_) => self.start(start..end, true)?,
                Event::End(_) => self.end(start..end),
                Event::Text(_) => self.character_data(start..end, start..end, false)?,
                Event::GeneralRef(_) => self.character_data(start..end, start..end, false)?,
                Event::CData(_) => {
                    let inner = start + "<![CDATA[".len()..end - "]]>".len();
                    self.character_data(start..end, inner, true)?;
                }
                Event::Comment(_) => {}
                Event::PI(_) => self.instruction(start..end)?,
                Event::Decl(decl) => {
                    if start != base {
                        return Err(self.malformed(start, "an XML declaration stands at the very start only"));
                    }
                    let encoding =
                        decl.encoding().transpose().map_err(|e| self.malformed(start, &e.to_string()))?;
                    if let Some(found) = encoding
                        && !["utf-8", "us-ascii"].iter().any(|known| found.eq_ignore_ascii_case(known))
                    {
                        return Err(self.error(start, Problem::Encoding { found: found.into_owned() }));
                    }
                    let version = decl.version().map_err(|e| self.malformed(start, &e.to_string()))?;
                    if version != "1.0" {
                        return Err(self.malformed(start, "the version of XML is not 1.0"));
                    }
                }
                Event::DocType(_) => return Err(self.error(start, Problem::Dtd)),
                Event::Eof => break,
            }
            start = end;
        }
        if let Some(&(id, _)) = self.open.last() {
            let element = self.xml.get(id.0);
            let (name, at) = element.map_or(("", 0), |one| (self.slice(one.name.clone()), one.whole.start));
            return Err(self.malformed(at, &format!("<{name}> has no end")));
        }
        if self.xml.is_empty() {
            return Err(self.malformed(start, "there is no element"));
        }
        Ok(())
    }

    fn start(&mut self, span: Range<usize>, empty: bool) -> Result<(), DocumentError> {
        if self.open.is_empty() && !self.xml.is_empty() {
            return Err(self.malformed(span.start, "there is a second element at the root"));
        }
        if self.open.len() >= MOST_DEPTH {
            return Err(self.error(span.start, Problem::TooDeep { most: MOST_DEPTH }));
        }
        let (name, attributes) = self.tag(span.clone(), empty)?;
        let id = ElementId(self.xml.len());
        if let Some(parent) = self.open.last().and_then(|(parent, _)| self.xml.get_mut(parent.0)) {
            parent.children.push(id);
        }
        let inner = (!empty).then_some(span.end..span.end);
        self.xml.push(Element { name, attributes, whole: span.clone(), inner, children: Vec::new() });
        if !empty {
            self.open.push((id, span.end));
        }
        Ok(())
    }

    fn end(&mut self, span: Range<usize>) {
        // That there is one to end, and of that name, is among the reader's checks.
        let Some((id, content)) = self.open.pop() else { return };
        if let Some(element) = self.xml.get_mut(id.0) {
            element.whole.end = span.end;
            element.inner = Some(content..span.start);
        }
    }

    /// The name and the attributes of a start tag that spans `span`.
    fn tag(&self, span: Range<usize>, empty: bool) -> Result<(Range<usize>, Vec<Attribute>), DocumentError> {
        let end = span.end - if empty { 2 } else { 1 };
        let name = self.name(span.start + 1..end)?;
        let mut attributes: Vec<Attribute> = Vec::new();
        let mut at = name.end;
        loop {
            let next = self.skip_blanks(at..end);
            if next == end {
                break;
            }
            if next == at {
                return Err(self.malformed(at, "a blank is missing before an attribute"));
            }
            let name = self.name(next..end)?;
            at = self.skip_blanks(name.end..end);
            if self.byte(at, end) != Some(b'=') {
                return Err(self.malformed(at, "an attribute has no value"));
            }
            at = self.skip_blanks(at + 1..end);
            let quote = self.byte(at, end).filter(|byte| matches!(byte, b'"' | b'\''));
            let quote = quote.ok_or_else(|| self.malformed(at, "an attribute's value has no quotes"))?;
            let rest = self.slice(at + 1..end);
            let len = rest.find(char::from(quote));
            let len = len.ok_or_else(|| self.malformed(at, "an attribute's value has no end"))?;
            let value = at + 1..at + 1 + len;
            if let Some(place) = self.slice(value.clone()).find('<') {
                return Err(self.malformed(value.start + place, "a '<' in an attribute must be written &lt;"));
            }
            self.check_references(value.clone())?;
            at = value.end + 1;
            attributes.push(Attribute { name, value });
        }
        let mut names: Vec<&str> = attributes.iter().map(|one| self.slice(one.name.clone())).collect();
        names.sort_unstable();
        if let Some(twice) =
            names.windows(2).find_map(|pair| (pair.first() == pair.last()).then(|| pair.first()))
        {
            let why = format!("the attribute {} is there twice", twice.copied().unwrap_or_default());
            return Err(self.malformed(span.start, &why));
        }
        Ok((name, attributes))
    }

    /// The name that starts where `span` starts.
    fn name(&self, span: Range<usize>) -> Result<Range<usize>, DocumentError> {
        let text = self.slice(span.clone());
        let len = text.find(|c: char| !is_name(c)).unwrap_or(text.len());
        let first = text.chars().next();
        if len == 0 || first.is_some_and(|c| c.is_ascii_digit() || matches!(c, '-' | '.' | '\u{b7}')) {
            return Err(self.malformed(span.start, "a name is missing here"));
        }
        Ok(span.start..span.start + len)
    }

    fn skip_blanks(&self, span: Range<usize>) -> usize {
        let text = self.slice(span.clone());
        span.start + text.len() - text.trim_start_matches(BLANKS).len()
    }

    fn character_data(
        &mut self,
        whole: Range<usize>,
        span: Range<usize>,
        literal: bool,
    ) -> Result<(), DocumentError> {
        let text = self.slice(span.clone());
        if self.open.is_empty() {
            if literal || !text.trim_matches(BLANKS).is_empty() {
                return Err(self.malformed(whole.start, "there is text outside the root element"));
            }
            return Ok(());
        }
        if !literal {
            if let Some(place) = text.find("]]>") {
                return Err(self.malformed(span.start + place, "]]> in text must be written ]]&gt;"));
            }
            self.check_references(span.clone())?;
        }
        self.pieces.push(Piece { span, literal });
        Ok(())
    }

    fn instruction(&self, span: Range<usize>) -> Result<(), DocumentError> {
        let name = self.name(span.start + 2..span.end)?;
        if self.slice(name).eq_ignore_ascii_case("xml") {
            return Err(self.malformed(span.start, "an XML declaration stands at the very start only"));
        }
        Ok(())
    }

    fn check_references(&self, span: Range<usize>) -> Result<(), DocumentError> {
        for (place, _) in self.slice(span.clone()).match_indices('&') {
            let at = span.start + place;
            let rest = self.slice(at + 1..span.end);
            let name = rest.split_once(';').map(|(name, _)| name);
            let name = name.ok_or_else(|| self.malformed(at, "a '&' in text must be written &amp;"))?;
            if resolved(name).is_some() {
                continue;
            }
            if name.starts_with('#') {
                return Err(self.malformed(at, "a character number is not that of an allowed character"));
            }
            if name.is_empty() || !name.chars().all(is_name) {
                return Err(self.malformed(at, "a '&' in text must be written &amp;"));
            }
            return Err(self.error(at, Problem::Entity { name: name.into() }));
        }
        Ok(())
    }

    fn byte(&self, at: usize, end: usize) -> Option<u8> {
        (at < end).then(|| self.text.as_bytes().get(at).copied())?
    }

    fn slice(&self, span: Range<usize>) -> &'a str {
        self.text.get(span).unwrap_or_default()
    }

    fn malformed(&self, offset: usize, why: &str) -> DocumentError {
        // One printable line, whatever the parser quotes.
        let why = why.escape_debug().to_string().replace("\\'", "'").replace("\\\"", "\"");
        self.error(offset.min(self.text.len()), Problem::Malformed { why })
    }

    fn error(&self, offset: usize, problem: Problem) -> DocumentError {
        DocumentError::at(self.text.as_bytes(), offset, problem)
    }
}

const BLANKS: [char; 4] = [' ', '\t', '\n', '\r'];

/// Whether a character may be in a document, as itself or by number.
pub(crate) fn is_char(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{10000}'..)
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, ':' | '_' | '-' | '.' | '\u{b7}') || c >= '\u{c0}'
}

/// What a reference, without `&` and `;`, stands for.
fn resolved(name: &str) -> Option<char> {
    let number = |digits: &str, radix| {
        let all = !digits.is_empty() && digits.chars().all(|c| c.is_digit(radix));
        all.then(|| u32::from_str_radix(digits, radix).ok())?.and_then(char::from_u32).filter(|&c| is_char(c))
    };
    match name {
        "amp" => Some('&'),
        "lt" => Some('<'),
        "gt" => Some('>'),
        "quot" => Some('"'),
        "apos" => Some('\''),
        _ => match name.strip_prefix("#x") {
            Some(digits) => number(digits, 16),
            None => number(name.strip_prefix('#')?, 10),
        },
    }
}

fn line_ends(raw: &str) -> Cow<'_, str> {
    if raw.contains('\r') { raw.replace("\r\n", "\n").replace('\r', "\n").into() } else { raw.into() }
}

/// Text as a reader gets it; in an attribute, line ends and tabs that are not written as numbers are blanks.
fn unescaped(raw: &str, attribute: bool) -> Cow<'_, str> {
    let raw = line_ends(raw);
    let is_plain = |c: char| c != '&' && !(attribute && matches!(c, '\n' | '\t'));
    if raw.chars().all(is_plain) {
        return raw;
    }
    let mut text = String::with_capacity(raw.len());
    let mut rest = raw.as_ref();
    while let Some(c) = rest.chars().next() {
        rest = rest.get(c.len_utf8()..).unwrap_or_default();
        if c == '&' {
            let (name, after) = rest.split_once(';').unwrap_or((rest, ""));
            text.extend(resolved(name));
            rest = after;
        } else {
            text.push(if is_plain(c) { c } else { ' ' });
        }
    }
    text.into()
}

/// Text in the form that libvirt writes it in, for content and for attributes in quotes of either kind.
///
/// # Errors
/// [`Problem::Value`] if it has a character that no document can have.
pub(crate) fn escaped(what: &str, text: &str) -> Result<String, Problem> {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\r' => out.push_str("&#13;"),
            c if is_char(c) => out.push(c),
            c => {
                return Err(Problem::Value {
                    what: what.into(),
                    value: text.into(),
                    allowed: format!(
                        "XML cannot carry the character U+{:04X}; choose another value",
                        u32::from(c)
                    ),
                });
            }
        }
    }
    Ok(out)
}

/// As [`escaped`], for attributes, in which line ends and tabs are blanks unless they are numbers.
pub(crate) fn escaped_attribute(what: &str, text: &str) -> Result<String, Problem> {
    Ok(escaped(what, text)?.replace('\n', "&#10;").replace('\t', "&#9;"))
}
