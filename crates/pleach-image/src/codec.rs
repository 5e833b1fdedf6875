//! Compressed clusters (spec: compressed clusters; deflate is raw, without any header).

use std::cell::RefCell;
use std::ops::RangeInclusive;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use pleach_format::{CompressionType, FormatError};
use zstd_safe::{CCtx, CParameter, DCtx, ResetDirective};

/// log2 of the deflate window: readers that were set up for 4 KiB must not meet longer distances.
const DEFLATE_WINDOW: u8 = 12;

/// Compresses clusters, one after another, with the working memory of the first: one a worker.
///
/// Equal clusters give equal bytes, whatever was compressed before.
pub struct Compressor {
    encoder: Encoder,
    /// Room for whatever becomes of a cluster.
    out: Vec<u8>,
}

enum Encoder {
    Deflate(Compress),
    Zstd(CCtx<'static>),
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.encoder {
            Encoder::Deflate(_) => "Compressor(Deflate)",
            Encoder::Zstd(_) => "Compressor(Zstd)",
        })
    }
}

impl Compressor {
    /// The levels that a type of compression has, fastest first.
    pub fn levels(compression: CompressionType) -> RangeInclusive<u32> {
        match compression {
            CompressionType::Deflate => 1..=9,
            CompressionType::Zstd => 1..=19,
        }
    }

    /// The level that is used unless another one is asked for. Deflate of zlib-rs at level 5 comes within 3 % of what zlib,
    /// which QEMU uses, makes of a cluster at its own default, in less than half the time; one more level costs a tenth, and
    /// gains nothing to speak of.
    pub fn default_level(compression: CompressionType) -> u32 {
        match compression {
            CompressionType::Deflate => 5,
            CompressionType::Zstd => 3,
        }
    }

    /// A compressor of that type and level; `None` means the default level.
    ///
    /// # Errors
    /// [`FormatError::OutOfRange`] for a level that is not one of [`levels`](Self::levels).
    pub fn new(compression: CompressionType, level: Option<u32>) -> Result<Self, FormatError> {
        let (levels, level) =
            (Self::levels(compression), level.unwrap_or_else(|| Self::default_level(compression)));
        let out_of_range = || FormatError::OutOfRange {
            field: "compression level",
            value: level.into(),
            min: (*levels.start()).into(),
            max: (*levels.end()).into(),
        };
        if !levels.contains(&level) {
            return Err(out_of_range());
        }
        let encoder = match compression {
            CompressionType::Deflate => Encoder::Deflate(Compress::new_with_window_bits(
                Compression::new(level),
                false,
                DEFLATE_WINDOW,
            )),
            CompressionType::Zstd => {
                let mut context = CCtx::create();
                let level = i32::try_from(level).map_err(|_| out_of_range())?;
                context.set_parameter(CParameter::CompressionLevel(level)).map_err(|_| out_of_range())?;
                Encoder::Zstd(context)
            }
        };
        Ok(Self { encoder, out: Vec::new() })
    }

    /// Compresses one whole cluster behind the end of `out`, and gives the number of bytes. `None`, and `out` as it was,
    /// if they would not be fewer than the cluster has: then it is stored plainly.
    pub fn append(&mut self, cluster: &[u8], out: &mut Vec<u8>) -> Option<usize> {
        // More than the worst case: zlib-rs panics if a block does not fit behind output that waits.
        self.out.resize(cluster.len() + cluster.len() / 8 + 1024, 0);
        let len = self.encode(cluster).filter(|&len| len < cluster.len())?;
        out.extend(self.out.get(..len)?);
        Some(len)
    }

    /// Compresses one whole cluster; `None` as in [`append`](Self::append).
    pub fn compress(&mut self, cluster: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        self.append(cluster, &mut out).map(|_| out)
    }

    /// Bytes written to the room.
    fn encode(&mut self, cluster: &[u8]) -> Option<usize> {
        let out = self.out.as_mut_slice();
        match &mut self.encoder {
            Encoder::Deflate(_) if is_noise(cluster) => None,
            Encoder::Deflate(stream) => {
                stream.reset();
                match stream.compress(cluster, out, FlushCompress::Finish) {
                    Ok(Status::StreamEnd) => usize::try_from(stream.total_out()).ok(),
                    Ok(_) | Err(_) => None,
                }
            }
            // One frame, with the size of its content in its header.
            Encoder::Zstd(context) => context.compress2(out, cluster).ok(),
        }
    }
}

/// Whether all byte values are about equally frequent in a cluster of some length, as in encrypted or compressed data:
/// deflate would work hard to find out that there is nothing to gain.
fn is_noise(cluster: &[u8]) -> bool {
    if cluster.len() < 16 << 10 {
        return false;
    }
    // A few bytes of every part tell most of what is not noise at once.
    let sample = cluster.chunks(cluster.len() / 16).filter_map(|part| part.get(..256));
    unevenness(sample) < 4 && unevenness(std::iter::once(cluster)) < 2
}

/// How far the numbers of byte values are from each other: about 1 for noise.
fn unevenness<'a>(parts: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut counts, mut len) = ([0u64; 256], 0);
    for part in parts {
        len += part.len() as u64;
        for &byte in part {
            if let Some(count) = counts.get_mut(usize::from(byte)) {
                *count += 1;
            }
        }
    }
    // For noise, the sum of the squared deviations is about 256 times the expected count.
    let expected = len / 256;
    counts.iter().map(|&count| count.abs_diff(expected).pow(2)).sum::<u64>() / (256 * expected).max(1)
}

/// How much of its input a cluster was, where that can be told.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// So many bytes, and what follows them is not needed.
    Exactly(usize),
    /// The cluster is full before its data end.
    Unknown,
}

/// Decompresses one cluster into `out`, which it must fill; `None` if it does not. What follows it in `input` is another
/// cluster's or nobody's.
pub(crate) fn unpack(compression: CompressionType, input: &[u8], out: &mut [u8]) -> Option<Taken> {
    match compression {
        CompressionType::Deflate => inflate(input, out),
        CompressionType::Zstd => unzstd(input, out),
    }
}

/// More output than fits is ignored, as QEMU does.
fn inflate(input: &[u8], out: &mut [u8]) -> Option<Taken> {
    let want = out.len() as u64;
    INFLATER.with_borrow_mut(|stream| {
        stream.reset(false);
        let status = stream.decompress(input, out, FlushDecompress::Finish).ok()?;
        let taken = match status {
            Status::StreamEnd => Taken::Exactly(usize::try_from(stream.total_in()).ok()?),
            Status::Ok | Status::BufError => Taken::Unknown,
        };
        (stream.total_out() == want).then_some(taken)
    })
}

thread_local! {
    /// To make one costs more than to inflate a cluster that is easy. Whoever takes one resets it first.
    static INFLATER: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static UNZSTD: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// zstd frames, which must fill `out` exactly.
fn unzstd(input: &[u8], out: &mut [u8]) -> Option<Taken> {
    UNZSTD.with_borrow_mut(|context| {
        context.reset(ResetDirective::SessionOnly).ok()?;
        unzstd_with(context, input, out)
    })
}

fn unzstd_with(context: &mut DCtx<'_>, input: &[u8], out: &mut [u8]) -> Option<Taken> {
    let mut from = zstd_safe::InBuffer::around(input);
    let mut to = zstd_safe::OutBuffer::around(out);
    while to.pos() < to.capacity() {
        let before = (from.pos(), to.pos());
        match context.decompress_stream(&mut to, &mut from) {
            Err(_) => return None,
            // Nothing moved: the input is at its end.
            Ok(_) if before == (from.pos(), to.pos()) => return None,
            // The last frame must end where the cluster does.
            Ok(0) if to.pos() == to.capacity() => return Some(Taken::Exactly(from.pos())),
            Ok(_) if to.pos() == to.capacity() => {
                return ends_here(context, from).then_some(Taken::Unknown);
            }
            Ok(_) => {}
        }
    }
    Some(Taken::Unknown)
}

/// Whether a frame whose output is complete ends without giving more.
fn ends_here(context: &mut DCtx<'_>, mut from: zstd_safe::InBuffer<'_>) -> bool {
    let mut more = [0; 1];
    let mut to = zstd_safe::OutBuffer::around(&mut more[..]);
    context.decompress_stream(&mut to, &mut from).is_ok_and(|left| left == 0 && to.pos() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deflate(bytes: &[u8], window: u8) -> Vec<u8> {
        let mut stream = flate2::Compress::new_with_window_bits(flate2::Compression::new(6), false, window);
        let mut out = vec![0; bytes.len() + 1000];
        stream.compress(bytes, &mut out, flate2::FlushCompress::Finish).unwrap();
        out.truncate(usize::try_from(stream.total_out()).unwrap());
        out
    }

    #[test]
    fn what_is_compressed_reads_back_and_does_not_depend_on_what_came_before() {
        let mut state = 7u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        for bits in [9, 12, 16, 18] {
            let len = 1usize << bits;
            let clusters: [Vec<u8>; 4] = [
                vec![0; len],
                (0..len).map(|i| (i * 3 % 77).to_be_bytes()[7]).collect(),
                (0..len).map(|i| if i % 5 < 2 { noise() } else { 7 }).collect(),
                (0..len).map(|_| noise()).collect(),
            ];
            for compression in [CompressionType::Deflate, CompressionType::Zstd] {
                let levels = Compressor::levels(compression);
                for level in [None, Some(*levels.start()), Some(*levels.end())] {
                    let name = format!("{compression:?} {level:?} {len}");
                    let mut used = Compressor::new(compression, level).unwrap();
                    for (n, cluster) in clusters.iter().enumerate() {
                        let mut out = vec![1, 2, 3];
                        let packed = used.append(cluster, &mut out);
                        let fresh = Compressor::new(compression, level).unwrap().compress(cluster);
                        let fits = n < 3;
                        assert_eq!(packed.is_some(), fits, "{name} cluster {n}");
                        assert_eq!(fresh.as_deref(), packed.map(|_| &out[3..]), "{name} cluster {n}");
                        assert_eq!(out.len(), 3 + packed.unwrap_or(0), "{name} cluster {n}");
                        if fits {
                            let mut back = vec![0xaa; len];
                            let taken = unpack(compression, &out[3..], &mut back);
                            assert!(
                                taken == Some(Taken::Exactly(out.len() - 3)) && back == *cluster,
                                "{name} cluster {n}"
                            );
                        }
                    }
                }
                assert!(Compressor::new(compression, Some(levels.end() + 1)).is_err());
                assert!(Compressor::new(compression, Some(0)).is_err());
            }
        }
    }

    /// Small clusters that hardly compress: the encoder once ran out of room in the middle of one.
    #[test]
    fn clusters_that_hardly_compress() {
        let mut state = 7u32;
        let mut noise = |of: usize| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as usize % of
        };
        for compression in [CompressionType::Deflate, CompressionType::Zstd] {
            for level in Compressor::levels(compression) {
                let mut compressor = Compressor::new(compression, Some(level)).unwrap();
                for _ in 0..200 {
                    let text = noise(513);
                    let cluster: Vec<u8> =
                        (0..512).map(|i| if i < text { b'a' } else { noise(256).to_be_bytes()[7] }).collect();
                    if let Some(packed) = compressor.compress(&cluster) {
                        let mut back = vec![0; 512];
                        assert!(packed.len() < 512);
                        let taken = unpack(compression, &packed, &mut back);
                        assert!(
                            taken == Some(Taken::Exactly(packed.len())) && back == cluster,
                            "{compression:?} {level}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn noise_is_told_from_what_compresses() {
        let mut state = 7u64;
        let mut noise = |bits: u32| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40 & ((1 << bits) - 1)).to_be_bytes()[7]
        };
        for len in [16 << 10, 64 << 10, 2 << 20] {
            let cluster: Vec<u8> = (0..len).map(|_| noise(8)).collect();
            assert!(is_noise(&cluster), "{len}");
            // Seven bits of eight, and noise with some text in it.
            let cluster: Vec<u8> = (0..len).map(|_| noise(7)).collect();
            assert!(!is_noise(&cluster), "{len}");
            let cluster: Vec<u8> = (0..len).map(|i| if i % 16 == 0 { b'e' } else { noise(8) }).collect();
            assert!(!is_noise(&cluster), "{len}");
        }
        assert!(!is_noise(&[0; 65536]) && !is_noise(&[]));
    }

    /// A reader with a window of 4 KiB, fed a few bytes at a time so that it really uses it.
    #[test]
    fn t20_write_window_stays_small() {
        let data: Vec<u8> = (0..65536u32).map(|i| (((i % 6007 * 31) >> 3) & 0x3f).to_be_bytes()[3]).collect();
        for level in Compressor::levels(CompressionType::Deflate) {
            let packed =
                Compressor::new(CompressionType::Deflate, Some(level)).unwrap().compress(&data).unwrap();
            let mut stream = Decompress::new_with_window_bits(false, DEFLATE_WINDOW);
            let mut back: Vec<u8> = Vec::new();
            let mut rest = packed.as_slice();
            while back.len() < data.len() {
                let mut few = [0; 100];
                let (read, wrote) = (stream.total_in(), stream.total_out());
                stream.decompress(&rest[..rest.len().min(50)], &mut few, FlushDecompress::None).unwrap();
                rest = &rest[usize::try_from(stream.total_in() - read).unwrap()..];
                back.extend(&few[..usize::try_from(stream.total_out() - wrote).unwrap()]);
            }
            assert!(back == data, "level {level}");
        }
    }

    #[test]
    fn zstd_frames_fill_the_cluster_exactly() {
        let data: Vec<u8> = (0..65536u32).map(|i| ((i * i) >> 7).to_be_bytes()[3]).collect();
        let pack = |part: &[u8]| {
            let mut packed = vec![0; zstd_safe::compress_bound(part.len())];
            let len = zstd_safe::compress(&mut packed[..], part, 3).unwrap();
            packed.truncate(len);
            packed
        };
        let mut out = vec![0; 65536];
        let mut one = pack(&data);
        let bytes = one.len();
        one.resize(one.len().next_multiple_of(512), 0);
        assert!(unzstd(&one, &mut out) == Some(Taken::Exactly(bytes)) && out == data);
        out.fill(0);
        let two = [pack(&data[..1000]), pack(&data[1000..])].concat();
        assert!(unzstd(&two, &mut out).is_some() && out == data, "two frames");
        assert!(unzstd(&one, &mut vec![0; 131_072]).is_none(), "shorter than a cluster");
        assert!(unzstd(&one, &mut vec![0; 32768]).is_none(), "longer than a cluster");
        assert!(unzstd(&one[..one.len() / 2], &mut out).is_none(), "cut");
        assert!(unzstd(&[0xff; 100], &mut [0; 512]).is_none());
    }

    #[test]
    fn exact_longer_shorter_and_garbage() {
        let data: Vec<u8> = (0..65536u32).map(|i| ((i * i) >> 7).to_be_bytes()[3]).collect();
        for window in [12, 15] {
            let mut packed = deflate(&data, window);
            let bytes = packed.len();
            packed.extend([0xaa; 300]);
            let mut out = vec![0; 65536];
            assert!(
                inflate(&packed, &mut out) == Some(Taken::Exactly(bytes)) && out == data,
                "window {window}"
            );
            let mut half = vec![0; 32768];
            assert!(
                inflate(&packed, &mut half) == Some(Taken::Unknown) && half == data[..32768],
                "longer than a cluster"
            );
            let mut double = vec![0; 131_072];
            assert!(inflate(&packed, &mut double).is_none(), "shorter than a cluster");
            assert!(inflate(&packed[..packed.len() / 2], &mut out).is_none(), "cut");
        }
        assert!(inflate(&[0xff; 100], &mut [0; 512]).is_none());
    }
}
