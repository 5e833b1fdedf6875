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
