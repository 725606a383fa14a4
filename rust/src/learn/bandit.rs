//! Bottleneck LinUCB: which of some arms to choose, learned from scalar rewards.
