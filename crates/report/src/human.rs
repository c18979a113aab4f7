//! Numbers as a person reads them: bytes in binary units, counts with a suffix, durations as `1m48s`.
//!
//! Machine-readable output keeps raw units (bytes, seconds); these are for tables, progress lines and charts only.

/// Bytes in binary units with three significant digits: `17 B`, `512 KiB`, `2.41 GiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // 999.5 would print as 1000: it belongs to the next unit.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{} {}", three_digits(value), UNITS[unit]) }
}

/// A count or a rate with a decimal suffix and two or three significant digits: `940`, `3.1k`, `541k`, `2.4M`.
pub fn count(count: f64) -> String {
    if !count.is_finite() {
        return non_finite(count).to_string();
    }
    const SUFFIXES: [&str; 6] = ["", "k", "M", "G", "T", "P"];
    let mut value = count.abs();
    let mut suffix = 0;
    while value >= 999.5 && suffix + 1 < SUFFIXES.len() {
        value /= 1000.0;
        suffix += 1;
    }
    let sign = if count < 0.0 { "-" } else { "" };
    let whole = suffix == 0 && value.fract() == 0.0;
    let digits = if whole || value >= 99.95 {
        format!("{value:.0}")
    } else {
        trim_zeros(&format!("{value:.1}")).to_string()
    };
    format!("{sign}{digits}{}", SUFFIXES[suffix])
}

/// Seconds as the two largest units: `0.8s`, `48s`, `1m48s`, `2h05m`, `3d04h`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "unknown".to_string();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1}s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d{:02}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// A value with `digits` significant digits, in the shorter of plain and exponent form: `1.92`, `0.934`, `2e-4`.
pub fn number(value: f64, digits: usize) -> String {
    if !value.is_finite() {
        return non_finite(value).to_string();
    }
    if value == 0.0 {
        return "0".to_string();
    }
    let digits = digits.clamp(1, 17);
    let scientific = format!("{value:.*e}", digits - 1);
    // The formatted exponent, not log10 of the value: rounding may carry into the next decade.
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let power: i32 = exponent.parse().unwrap_or(0);
    if !(-3..7).contains(&power) {
        return format!("{}e{exponent}", trim_zeros(mantissa));
    }
    let decimals = (digits as i32 - 1 - power).max(0) as usize;
    trim_zeros(&format!("{value:.decimals$}")).to_string()
}

/// A share in per cent: `0.11%`, `34%`.
pub fn percent(share: f64) -> String {
    format!("{}%", number(share * 100.0, 2))
}

fn non_finite(value: f64) -> &'static str {
    if value.is_nan() {
        "NaN"
    } else if value > 0.0 {
        "inf"
    } else {
        "-inf"
    }
}

fn three_digits(value: f64) -> String {
    let decimals = if value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    trim_zeros(&format!("{value:.decimals$}")).to_string()
}

/// Drops the zeros that end a decimal fraction, and the point if nothing follows it.
pub(crate) fn trim_zeros(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_change_unit_before_they_need_a_fourth_digit() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "0.98 KiB");
        assert_eq!(bytes(2_587_000_000), "2.41 GiB");
        assert_eq!(bytes(u64::MAX), "16 EiB");
    }

    #[test]
    fn counts() {
        for (value, text) in
            [(0.0, "0"), (940.0, "940"), (3100.0, "3.1k"), (540_672.0, "541k"), (2.4e6, "2.4M")]
        {
            assert_eq!(count(value), text);
        }
        assert_eq!(count(0.25), "0.2");
        assert_eq!(count(999.6), "1k");
        assert_eq!(count(-3100.0), "-3.1k");
        assert_eq!(count(f64::NAN), "NaN");
    }

    #[test]
    fn durations() {
        for (seconds, text) in [
            (0.84, "0.8s"),
            (9.96, "10s"),
            (48.0, "48s"),
            (59.6, "1m00s"),
            (108.0, "1m48s"),
            (7500.0, "2h05m"),
        ] {
            assert_eq!(duration(seconds), text);
        }
        assert_eq!(duration(273_600.0), "3d04h");
        assert_eq!(duration(f64::INFINITY), "unknown");
    }

    #[test]
    fn numbers_keep_significant_digits_and_no_more() {
        for (value, text) in
            [(2e-4, "2e-4"), (0.0312, "0.0312"), (1.9204, "1.92"), (9.999, "10"), (0.9999, "1")]
        {
            assert_eq!(number(value, 3), text);
        }
        assert_eq!(number(123_456.0, 3), "123456");
        assert_eq!(number(-0.5, 3), "-0.5");
        assert_eq!(number(1.5e9, 3), "1.5e9");
        assert_eq!(number(f64::NEG_INFINITY, 3), "-inf");
        assert_eq!(percent(0.001_094), "0.11%");
    }
}
