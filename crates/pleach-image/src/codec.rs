//! Compressed clusters (spec: compressed clusters; deflate is raw, without any header).

use flate2::{Decompress, FlushDecompress, Status};

/// Inflates one cluster into `out`, which it must fill. More output than that is ignored, as QEMU does; what follows
/// the stream in `input` is another cluster's or nobody's.
pub(crate) fn inflate(input: &[u8], out: &mut [u8]) -> bool {
    let mut stream = Decompress::new(false);
    let want = out.len() as u64;
    match stream.decompress(input, out, FlushDecompress::Finish) {
        Ok(Status::StreamEnd | Status::Ok | Status::BufError) => stream.total_out() == want,
        Err(_) => false,
    }
}

/// Decompresses one cluster of zstd frames into `out`, which they must fill exactly; what follows in `input` is another
/// cluster's or nobody's.
pub(crate) fn unzstd(input: &[u8], out: &mut [u8]) -> bool {
    let mut context = zstd_safe::DCtx::create();
    let mut from = zstd_safe::InBuffer::around(input);
    let mut to = zstd_safe::OutBuffer::around(out);
    while to.pos() < to.capacity() {
        let before = (from.pos(), to.pos());
        match context.decompress_stream(&mut to, &mut from) {
            Err(_) => return false,
            // Nothing moved: the input is at its end.
            Ok(_) if before == (from.pos(), to.pos()) => return false,
            // The last frame must end where the cluster does.
            Ok(left) if to.pos() == to.capacity() => return left == 0 || ends_here(&mut context, from),
            Ok(_) => {}
        }
    }
    true
}

/// Whether a frame whose output is complete ends without giving more.
fn ends_here(context: &mut zstd_safe::DCtx<'_>, mut from: zstd_safe::InBuffer<'_>) -> bool {
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
        one.resize(one.len().next_multiple_of(512), 0);
        assert!(unzstd(&one, &mut out) && out == data);
        out.fill(0);
        let two = [pack(&data[..1000]), pack(&data[1000..])].concat();
        assert!(unzstd(&two, &mut out) && out == data, "two frames");
        assert!(!unzstd(&one, &mut vec![0; 131_072]), "shorter than a cluster");
        assert!(!unzstd(&one, &mut vec![0; 32768]), "longer than a cluster");
        assert!(!unzstd(&one[..one.len() / 2], &mut out), "cut");
        assert!(!unzstd(&[0xff; 100], &mut [0; 512]));
    }

    #[test]
    fn exact_longer_shorter_and_garbage() {
        let data: Vec<u8> = (0..65536u32).map(|i| ((i * i) >> 7).to_be_bytes()[3]).collect();
        for window in [12, 15] {
            let mut packed = deflate(&data, window);
            packed.extend([0xaa; 300]);
            let mut out = vec![0; 65536];
            assert!(inflate(&packed, &mut out) && out == data, "window {window}");
            let mut half = vec![0; 32768];
            assert!(inflate(&packed, &mut half) && half == data[..32768], "longer than a cluster");
            let mut double = vec![0; 131_072];
            assert!(!inflate(&packed, &mut double), "shorter than a cluster");
            assert!(!inflate(&packed[..packed.len() / 2], &mut out), "cut");
        }
        assert!(!inflate(&[0xff; 100], &mut [0; 512]));
    }
}
