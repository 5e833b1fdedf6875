//! Room for bytes that are read and written.

/// Memory starts at multiples of this: copying between a page and memory that starts a little behind the start of a page
/// takes some processors several times as long.
const PAGE: usize = 4096;

/// Some bytes that start with a page, and the room for as many as there ever were.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// `len` bytes to be overwritten; they are anything.
    pub(crate) fn fresh(&mut self, len: usize) -> &mut [u8] {
        if self.memory.len() < len + PAGE {
            self.memory = vec![0; len + PAGE];
            self.start = self.memory.as_ptr().align_offset(PAGE).min(PAGE);
        }
        self.len = len;
        self.memory.get_mut(self.start..self.start + len).unwrap_or_default()
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.memory.get(self.start..self.start + self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_starts_with_a_page_and_is_as_long_as_asked_for() {
        let mut buffer = Buffer::default();
        assert!(buffer.bytes().is_empty());
        for len in [1, 100_000, 5, 0, 100_001] {
            buffer.fresh(len).fill(7);
            assert_eq!(buffer.bytes(), vec![7; len]);
            assert!(buffer.bytes().as_ptr().addr().is_multiple_of(PAGE), "{len}");
        }
    }
}
