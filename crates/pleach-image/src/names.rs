//! File names inside images: plain local paths, and nothing else.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A backing file name that is not followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// A `json:` pseudo name or a protocol.
    #[error(
        "backing file name \"{name}\" is not a plain path ({what}); names of this kind are never followed"
    )]
    NotAPath {
        /// The name, escaped.
        name: String,
        /// What it looks like.
        what: String,
    },
    /// An empty name.
    #[error("the backing file name is empty")]
    Empty,
}

/// The path that `name`, read from the image at `image`, means: relative names are relative to the directory of the
/// image as it was named (spec: backing file name).
///
/// # Errors
/// [`NameError::NotAPath`] for `json:…` and `scheme:…` names; a file really named `a:b` must be called `./a:b`.
pub fn backing_path(image: &Path, name: &[u8]) -> Result<PathBuf, NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    let scheme = name.iter().take_while(|&&b| b != b'/').position(|&b| b == b':');
    if let Some(colon) = scheme {
        let what = escape(name.get(..=colon).unwrap_or(name));
        return Err(NameError::NotAPath { name: escape(name), what });
    }
    let directory = image.parent().unwrap_or(Path::new(""));
    Ok(directory.join(OsStr::from_bytes(name)))
}

/// Whether a character shows as itself and changes nothing around it.
pub fn is_printable(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Bytes from an image as printable text: UTF-8 is kept, controls and everything else become `\xNN`.
pub fn escape(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() || c == '\\' {
                out.extend(c.escape_default());
            } else {
                out.push(c);
            }
        }
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_absolute_and_refused() {
        let image = Path::new("dir/overlay.qcow2");
        let cases: [(&[u8], Option<&str>); 9] = [
            (b"base.raw", Some("dir/base.raw")),
            (b"../base.raw", Some("dir/../base.raw")),
            (b"/abs/base.raw", Some("/abs/base.raw")),
            (b"./a:b", Some("dir/./a:b")),
            (b"sub/a:b", Some("dir/sub/a:b")),
            (b"json:{\"driver\":\"raw\"}", None),
            (b"nbd://host/x", None),
            (b"a:b", None),
            (b"", None),
        ];
        for (name, want) in cases {
            assert_eq!(backing_path(image, name).ok(), want.map(PathBuf::from), "{}", escape(name));
        }
    }

    #[test]
    fn escaping() {
        assert_eq!(escape("grün\n".as_bytes()), "grün\\n");
        assert_eq!(escape(b"\xff\x1b[0m"), "\\xff\\u{1b}[0m");
    }
}
