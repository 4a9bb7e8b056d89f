//! Times as people and tools read them: RFC 3339 in UTC. The time goes in; no clock is read here.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAY_SECONDS: u64 = 86_400;
/// Of the last second of the year 9999: what RFC 3339 can write.
const LATEST_SECONDS: u64 = 253_402_300_799;

/// `2026-11-29T07:04:35Z`.
pub fn seconds(time: SystemTime) -> String {
    format!("{}Z", date_and_time(since_1970(time).as_secs()))
}

/// `2026-11-29T07:04:35.120Z`.
pub fn milliseconds(time: SystemTime) -> String {
    let since = since_1970(time);
    let whole = date_and_time(since.as_secs());
    format!("{whole}.{:03}Z", since.subsec_millis())
}

/// A clock before 1970 is not set, and reads as its beginning.
fn since_1970(time: SystemTime) -> Duration {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.min(Duration::from_secs(LATEST_SECONDS))
}

fn date_and_time(seconds: u64) -> String {
    let (year, month, day) = date(seconds / DAY_SECONDS);
    let of_day = seconds % DAY_SECONDS;
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01.
fn date(days: u64) -> (u64, u64, u64) {
    // Years that begin in March end with the day that leap years add; 400 of them have equally many days. The first day
    // here is 0000-03-01.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = match month_from_march {
        0..=9 => month_from_march + 3,
        _ => month_from_march - 9,
    };
    let year = 400 * era + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn times_are_written_in_utc() {
        // As GNU date writes them: date -u -d @N +%FT%TZ
        for (time, written) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_799, "2000-02-29T23:59:59Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (LATEST_SECONDS, "9999-12-31T23:59:59Z"),
            (u32::MAX as u64, "2106-02-07T06:28:15Z"),
        ] {
            assert_eq!(seconds(at(time)), written);
        }
        let before = UNIX_EPOCH - Duration::from_secs(5);
        assert_eq!(seconds(before), "1970-01-01T00:00:00Z");
        let with_part = at(1_000_000_000) + Duration::from_micros(120_999);
        assert_eq!(milliseconds(with_part), "2001-09-09T01:46:40.120Z");
    }
}
