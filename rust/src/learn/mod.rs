//! How an adapter learns: what feedback means, and the update rules that follow from it.

pub mod accumulate;
pub mod bandit;
pub mod basis;
pub mod batch;
pub mod consolidate;
pub mod feedback;
mod gathered;
pub mod learner;
pub mod nlms;
pub mod optim;
mod optim_state;
pub mod regularizer;
pub mod replay_memory;
mod replay_state;
pub mod rls;
pub mod settings;
pub mod step;
pub mod train;
pub mod update;

pub use feedback::{Feedback, TargetLoss};
pub use learner::Learner;
pub use optim::{Method, OptimSettings, Optimizer};
pub use regularizer::{Regularizer, Samples};
pub use replay_memory::{ReplayMemory, ReplaySettings};
pub use settings::{Instant, Rule, Train};
pub use step::StepResult;
pub use update::{StepOptions, StepOutcome};
