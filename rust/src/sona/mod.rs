//! The three loops over one adapter: instant, background and deep.
