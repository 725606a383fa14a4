//! How an adapter learns: what feedback means, and the update rules that follow from it.

pub mod accumulate;
pub mod basis;
pub mod feedback;
pub mod learner;
pub mod nlms;
pub mod rls;
pub mod settings;
pub mod step;

pub use feedback::{Feedback, TargetLoss};
pub use learner::Learner;
pub use settings::{Instant, Rule, Train};
pub use step::StepResult;
