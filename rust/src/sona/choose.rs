//! Choices among named arms, learned from scalar rewards (bottleneck LinUCB on the first module).

use serde::{Deserialize, Serialize};

use super::records::kind;
use super::{Inner, Sona};
use crate::error::{Error, Result};
use crate::journal::Record;
use crate::learn::bandit::{BanditSettings, Choice, LiveBandit, Rewarded};

#[derive(Serialize, Deserialize)]
struct Asked {
    module: usize,
    arms: Vec<String>,
    arm: String,
    propensity: f64,
}

#[derive(Serialize, Deserialize)]
struct Earned {
    choice: u64,
    reward: f64,
}

impl Sona {
    /// Chooses one of some named arms for an input; what the choice earns is told by [`Sona::reward`].
    ///
    /// # Errors
    /// No arms, an arm twice, too many, a non-finite x: nothing changes then. A journal that cannot be written: the
    /// choice is made, and lost with the process.
    pub fn choose(&self, module: usize, x: &[f32], arms: &[&str]) -> Result<Choice> {
        let mut bandit = self.bandit();
        // A must not move between the choice and its record.
        let mut inner = self.inner();
        self.choose_under(&mut bandit, &mut inner, module, x, arms, None)
    }

    fn choose_under(
        &self,
        bandit: &mut Option<LiveBandit>,
        inner: &mut Inner,
        module: usize,
        x: &[f32],
        arms: &[&str],
        as_made: Option<(&str, f64)>,
    ) -> Result<Choice> {
        if let Some(b) = bandit.as_ref().filter(|b| b.module() != module) {
            let (got, want) = (&self.lora.names()[module], &self.lora.names()[b.module()]);
            return Err(Error::config("module", got, format!("{want}, as in the first choice")));
        }
        let mut made = None;
        let live = match bandit {
            Some(live) => live,
            None => {
                let settings = BanditSettings { seed: self.settings.seed, ..BanditSettings::default() };
                made.insert(LiveBandit::new(&self.lora, module, settings)?)
            }
        };
        let mut choice = live.choose(&self.lora, x, arms)?;
        if let Some((arm, propensity)) = as_made {
            // Other weights would choose otherwise, but this arm was shown, and it is what the reward is for.
            live.assign(choice.id, arm, propensity);
            (choice.name, choice.propensity) = (arm.to_string(), propensity);
        }
        if let Some(made) = made {
            *bandit = Some(made);
        }
        let arms = arms.iter().map(ToString::to_string).collect();
        let asked = Asked { module, arms, arm: choice.name.clone(), propensity: choice.propensity };
        let head = serde_json::to_vec(&asked).map_err(|e| Error::format("journal", e.to_string()))?;
        let len = (head.len() as u32).to_le_bytes();
        inner.record(kind::CHOICE, &[&len, &head, bytemuck::cast_slice(x)])?;
        Ok(choice)
    }

    /// Says what a choice earned.
    ///
    /// # Errors
    /// A choice that is unknown or settled, a reward that is not finite: nothing changes then. A journal that cannot be
    /// written: the reward is taken, and lost with the process.
    pub fn reward(&self, choice: u64, reward: f64) -> Result<Rewarded> {
        let mut bandit = self.bandit();
        let Some(bandit) = bandit.as_mut() else {
            return Err(Error::config("choice", choice, "one that choose returned: nothing was chosen yet"));
        };
        let done = bandit.reward(choice, reward)?;
        let earned = serde_json::to_vec(&Earned { choice, reward }).unwrap_or_default();
        self.inner().record(kind::REWARD, &[&earned])?;
        Ok(done)
    }

    /// Choices with their rewards, for off-policy evaluation: `(arm, propensity, reward)`.
    pub fn choices(&self) -> Vec<(String, f64, f64)> {
        let bandit = self.bandit();
        let Some(b) = bandit.as_ref() else { return Vec::new() };
        b.log().map(|l| (b.bandit().arm_name(l.arm).to_string(), l.propensity, l.reward)).collect()
    }

    pub(super) fn apply_choice(&self, record: &Record) -> Result<()> {
        let bad = |e: String| Error::format("journal", format!("record {}: {e}", record.id));
        if record.kind == kind::REWARD {
            let earned: Earned = serde_json::from_slice(&record.payload).map_err(|e| bad(e.to_string()))?;
            return self.reward(earned.choice, earned.reward).map(drop);
        }
        let (asked, x): (Asked, &[u8]) = super::records::unpack(&record.payload)?;
        let x: Vec<f32> = x.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
        let arms: Vec<&str> = asked.arms.iter().map(String::as_str).collect();
        if asked.module >= self.lora.names().len() {
            return Err(bad("a module that the loop lacks".into()));
        }
        let (mut bandit, mut inner) = (self.bandit(), self.inner());
        let made = Some((asked.arm.as_str(), asked.propensity));
        self.choose_under(&mut bandit, &mut inner, asked.module, &x, &arms, made).map(drop)
    }
}
