//! Sizes in and out.

/// `1.2 GiB`, or the exact number of bytes.
pub(crate) fn show(bytes: u64, exact: bool) -> String {
    if exact || bytes < 1024 {
        return if exact { bytes.to_string() } else { format!("{bytes} B") };
    }
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    // Tenths, rounded to nearest, without floating point.
    let tenths = |unit: usize| (u128::from(bytes) * 10 + (1 << (10 * unit + 9))) >> (10 * (unit + 1));
    while tenths(unit) >= 10240 && unit + 1 < units.len() {
        unit += 1;
    }
    let value = tenths(unit);
    format!("{}.{} {}", value / 10, value % 10, units.get(unit).copied().unwrap_or("EiB"))
}

/// Reads `10G`, `10GiB`, `1048576`, `64k`: powers of 1024.
pub(crate) fn parse(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        "e" | "eb" | "eib" => 60,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_and_out() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1_048_575, "1.0 MiB"),
            (1 << 30, "1.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (bytes, want) in cases {
            assert_eq!(show(bytes, false), want);
            assert_eq!(show(bytes, true), bytes.to_string());
        }
        for (text, want) in [
            ("10G", Some(10 << 30)),
            ("10GiB", Some(10 << 30)),
            ("1048576", Some(1 << 20)),
            ("64k", Some(65536)),
            ("16E", None),
            ("x", None),
            ("1x", None),
            ("-1", None),
        ] {
            assert_eq!(parse(text), want, "{text}");
        }
    }
}
