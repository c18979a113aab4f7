//! Rotary settings in both forms of `config.json`, and the tables made from them.
//!
//! `transformers` 4 writes `rope_theta` and `rope_scaling` (`type` or `rope_type` inside), 5 writes `rope_parameters` with
//! everything inside. Tables are kept between forwards; with `dynamic` scaling the frequencies depend on the longest
//! position of the batch once it exceeds the trained length, and the tables are then made for it alone.

use std::sync::Mutex;

use engraft_nn::Result;
use engraft_nn::rotary::{RopeScaling, Rotary};
use engraft_tensor::Tensor;

use crate::config::Config;

/// cos and sin [positions, dim/2].
pub(crate) type Tables = (Tensor, Tensor);

/// Rotary embedding of a model.
pub(crate) struct Rope {
    rotary: Rotary,
    /// The trained length, where `config.json` names it.
    original: Option<usize>,
    kept: Mutex<Option<Tables>>,
}

impl Rope {
    /// The settings of a model with heads of `dim` and `positions` trained positions.
    pub fn read(c: &mut Config<'_>, dim: usize, positions: usize) -> Rope {
        let base = ["rope_scaling", "rope_parameters"].into_iter().find(|key| c.get(key).is_some());
        let key = |name: &str| format!("{}.{name}", base.unwrap_or("rope_parameters"));
        if c.get(&key("full_attention")).is_some() || c.get(&key("sliding_attention")).is_some() {
            c.problem(format!(
                "`{}` differs between layers, which no known model of this family has",
                key("")
            ));
        }
        let factor = c.number(&key("partial_rotary_factor")).or_else(|| c.number("partial_rotary_factor"));
        if factor.is_some_and(|f| f != 1.0) {
            c.problem("`partial_rotary_factor` must be 1 for this family");
        }
        if dim < 2 || !dim.is_multiple_of(2) {
            c.problem(format!("the width of a head must be even to be rotated, found {dim}"));
        }
        let inner = c.number(&key("rope_theta"));
        let theta = inner.or_else(|| c.number("rope_theta")).unwrap_or(10_000.0);
        let scaling = Self::scaling(c, &key, positions, dim);
        let named = c.count("original_max_position_embeddings");
        let original = named.or_else(|| c.count(&key("original_max_position_embeddings")));
        Rope { rotary: Rotary { theta, dim, scaling }, original, kept: Mutex::new(None) }
    }

    /// Positions that a model with `positions` in its `config.json` is made for. `dynamic` and `linear` stretch the trained
    /// length, which `dynamic` keeps there; `yarn` and `llama3` write the stretched length themselves.
    pub fn reach(&self, positions: usize) -> usize {
        let stretched = |factor: f64, from: usize| (from as f64 * factor.max(1.0)) as usize;
        match (&self.rotary.scaling, self.original) {
            (RopeScaling::Dynamic { factor, original }, _) => stretched(*factor, *original),
            (RopeScaling::Linear { factor }, Some(original)) => positions.max(stretched(*factor, original)),
            _ => positions,
        }
    }

    fn scaling(
        c: &mut Config<'_>,
        key: &dyn Fn(&str) -> String,
        positions: usize,
        dim: usize,
    ) -> RopeScaling {
        let named = c.text(&key("rope_type"));
        let kind = named.or_else(|| c.text(&key("type"))).unwrap_or("default");
        let factor = c.number(&key("factor"));
        let outer = c.count("original_max_position_embeddings");
        let original =
            outer.or_else(|| c.count(&key("original_max_position_embeddings"))).unwrap_or(positions);
        let mut needed = |value: Option<f64>, name: &str| {
            if value.is_none() {
                c.problem(format!("`{}` is missing, which rotary scaling `{kind}` needs", key(name)));
            }
            value.unwrap_or(1.0)
        };
        match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: needed(factor, "factor") },
            "dynamic" => {
                let factor = needed(factor, "factor");
                if dim == 2 {
                    c.problem("rotary scaling `dynamic` needs heads wider than 2");
                }
                RopeScaling::Dynamic { factor, original: positions }
            }
            "llama3" => {
                let factor = needed(factor, "factor");
                let (low, high) = (c.number(&key("low_freq_factor")), c.number(&key("high_freq_factor")));
                if !matches!((low, high), (Some(low), Some(high)) if high > low) {
                    c.problem(format!("`{}` must be above `low_freq_factor`", key("high_freq_factor")));
                }
                RopeScaling::Llama3 { factor, low: low.unwrap_or(1.0), high: high.unwrap_or(4.0), original }
            }
            "yarn" => {
                let mscale = c.number(&key("mscale")).zip(c.number(&key("mscale_all_dim")));
                RopeScaling::Yarn {
                    factor: factor.unwrap_or(positions as f64 / original as f64),
                    original,
                    beta_fast: c.number(&key("beta_fast")).unwrap_or(32.0),
                    beta_slow: c.number(&key("beta_slow")).unwrap_or(1.0),
                    attention_factor: c.number(&key("attention_factor")),
                    mscale,
                    truncate: c.flag(&key("truncate"), true),
                }
            }
            other => {
                let known = "default, linear, dynamic, llama3, yarn";
                c.problem(format!("rotary scaling `{other}` is not there; known are {known}"));
                RopeScaling::None
            }
        }
    }

    /// Tables that reach `positions`, at least.
    pub fn tables(&self, positions: usize) -> Result<Tables> {
        let mut rows = positions.next_power_of_two();
        if let RopeScaling::Dynamic { original, .. } = self.rotary.scaling {
            if positions > original {
                return self.rotary.tables(positions);
            }
            rows = rows.min(original);
        }
        let mut kept = self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match &*kept {
            Some(tables) if tables.0.dim(0) >= positions => Ok(tables.clone()),
            _ => {
                let tables = self.rotary.tables(rows)?;
                *kept = Some(tables.clone());
                Ok(tables)
            }
        }
    }
}
