//! Tests that look inside.
pub(super) fn at_point() {}
