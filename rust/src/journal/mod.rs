//! A write-ahead journal: checksummed records in mapped segments.
