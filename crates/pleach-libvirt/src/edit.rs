//! Changes to a document as splices of its text.

use std::ops::Range;

use crate::xml::{ElementId, Xml};

/// What to put in place of which bytes.
pub(crate) type Splice = (Range<usize>, String);

impl Xml {
    /// The text with splices made, which must not overlap.
    pub(crate) fn spliced(&self, mut splices: Vec<Splice>) -> String {
        splices.sort_by_key(|(span, _)| (span.start, span.end));
        let mut text = String::with_capacity(self.text().len() + 256);
        let mut at = 0;
        for (span, new) in splices {
            text.push_str(self.text().get(at..span.start).unwrap_or_default());
            text.push_str(&new);
            at = span.end;
        }
        text.push_str(self.text().get(at..).unwrap_or_default());
        text
    }

    /// Takes an element out, with the blanks before it and its line end.
    pub(crate) fn removal(&self, at: ElementId) -> Splice {
        let span = self.whole(at);
        let before = self.text().get(..span.start).unwrap_or_default();
        let line = before.trim_end_matches([' ', '\t']);
        let start = if line.ends_with('\n') { line.len() - 1 } else { span.start };
        (start..span.end, String::new())
    }
}
