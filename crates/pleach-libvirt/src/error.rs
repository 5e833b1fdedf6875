//! What a document is refused for.

/// Why a document was refused, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct DocumentError {
    /// Byte offset in the document.
    pub offset: usize,
    /// The line of that offset, counted from 1.
    pub line: usize,
    /// What is wrong there.
    pub problem: Problem,
}

impl DocumentError {
    pub(crate) fn at(text: &[u8], offset: usize, problem: Problem) -> Self {
        let before = text.get(..offset).unwrap_or(text);
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
        Self { offset, line, problem }
    }

    /// A stable word for the kind of problem; messages may change, these do not.
    pub fn code(&self) -> &'static str {
        match self.problem {
            Problem::TooLong { .. } => "too-long",
            Problem::TooDeep { .. } => "too-deep",
            Problem::Encoding { .. } => "encoding",
            Problem::Malformed { .. } => "malformed",
            Problem::Dtd => "dtd",
            Problem::Entity { .. } => "entity",
            Problem::WrongRoot { .. } => "wrong-root",
            Problem::Missing { .. } => "missing",
            Problem::Value { .. } => "value",
            Problem::Disks { .. } => "disks",
        }
    }
}

/// What is wrong with a document. Values from it are quoted and escaped, so a message is one printable line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// Longer than libvirt itself reads.
    #[error("the document has {len} bytes; at most {most} are read")]
    TooLong {
        /// Its length.
        len: usize,
        /// The limit.
        most: usize,
    },
    /// Elements inside elements, deeper than libvirt's XML parser goes.
    #[error("elements are nested more than {most} deep")]
    TooDeep {
        /// The limit.
        most: usize,
    },
    /// Bytes that are not UTF-8, or a declaration of another encoding.
    #[error("{found} is not UTF-8, the one encoding that is read")]
    Encoding {
        /// The encoding that is declared, or what the bytes are.
        found: String,
    },
    /// Not well-formed XML.
    #[error("not well-formed: {why}")]
    Malformed {
        /// Which rule is broken.
        why: String,
    },
    /// A document type declaration: it could define entities and name other files, and libvirt writes none.
    #[error("a document type declaration (<!DOCTYPE) is not read; remove it")]
    Dtd,
    /// A reference to an entity that only a document type declaration could define.
    #[error("the entity {name:?} is not defined; only amp, lt, gt, quot, apos and character numbers are")]
    Entity {
        /// The name, without `&` and `;`.
        name: String,
    },
    /// Another kind of document.
    #[error("the document is a <{found}>, not a <{wanted}>")]
    WrongRoot {
        /// The element at its root.
        found: String,
        /// The element that was asked for.
        wanted: &'static str,
    },
    /// An element or attribute that must be there, and not be empty, is not.
    #[error("{what} is missing, or empty")]
    Missing {
        /// The element or attribute, and where it belongs.
        what: String,
    },
    /// A value that is not allowed.
    #[error("{what} is {value:?}; {allowed}")]
    Value {
        /// The element or attribute.
        what: String,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// The list of disks does not fit the disks of the domain.
    #[error("{why}")]
    Disks {
        /// How.
        why: String,
    },
}
