//! Where a method may sit, and chances that are drawn once for a whole site.

use engraft_nn::{Error, Kind, Mode, Pass, Result, Site};
use engraft_tensor::Tensor;
use engraft_tensor::cpu::random::Key;
use engraft_tensor::ops::Unary;

/// (out, in) of a linear layer; an error at tables and convolutions, which `title` has no form for.
pub(crate) fn linear(site: &Site, title: &str) -> Result<(usize, usize)> {
    match site.kind {
        Kind::Linear { out, inn, .. } => Ok((out, inn)),
        _ => {
            let message = format!("{title} changes linear layers; leave this module out of the targets");
            Err(Error::Site { path: site.path.clone(), message })
        }
    }
}

/// W as it is before any patch.
pub(crate) fn frozen(site: &Site) -> Result<Tensor> {
    match &site.value {
        engraft_nn::Value::Weight(w) => engraft_nn::Base::dense(w.as_ref()),
        _ => Err(Error::Site { path: site.path.clone(), message: "expected a weight, found none".into() }),
    }
}

/// An error at `site` that says what does not fit.
pub(crate) fn unfit<T>(site: &Site, message: impl Into<String>) -> Result<T> {
    Err(Error::Site { path: site.path.clone(), message: message.into() })
}

/// Whether the method is left out at `site` in this pass: with probability `p` in training, for all rows at once.
pub(crate) fn left_out(cx: &Pass, p: f32, site: &Site) -> bool {
    match cx.mode() {
        Mode::Train { seed, step, micro } if p > 0.0 => {
            let stream = step << 40 ^ micro << 28 ^ (site.id.0 as u64) << 8 ^ 0xff;
            // A seed of its own, so that the streams of elementwise dropout stay apart.
            Key { seed: seed ^ 0x6d6f_6475_6c65, stream }.uniform(0) < p
        }
        _ => false,
    }
}

/// Which of `out` outputs stay in this pass, as ones and zeros [out], or `None` where all do. With `scaled` they are
/// divided by the share that stays.
pub(crate) fn kept_outputs(
    cx: &Pass,
    p: f32,
    scaled: bool,
    out: usize,
    site: &Site,
) -> Result<Option<Tensor>> {
    if p == 0.0 || cx.mode() == Mode::Eval {
        return Ok(None);
    }
    let kept = cx.dropout(&Tensor::full(1.0, [out]), p, site.id, 7)?.scale(1.0 - p)?;
    if !scaled {
        return Ok(Some(kept));
    }
    // The small number changes no share that is not zero.
    Ok(Some(kept.div(&kept.mean()?.unary(Unary::Shift(1e-12))?)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::orthogonal::drop_blocks;
    use crate::testing::{site_id, toy};
    use engraft_nn::Layout;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn a_chance_of_one_leaves_out_everything() {
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, "layers.0.attn.q"));
        for step in 0..20 {
            let mode = Mode::Train { seed: 1, step, micro: 0 };
            let cx = Pass::new(Layout::new(&[3], vec![0, 1, 2]).unwrap(), None).training(mode);
            assert!(left_out(&cx, 1.0, site) && !left_out(&cx, 0.0, site));
            for scaled in [false, true] {
                let kept = kept_outputs(&cx, 1.0, scaled, 5, site).unwrap().unwrap();
                assert_eq!(kept.to_vec().unwrap(), [0.0; 5]);
            }
            let one = drop_blocks(&sample(&[4, 2, 2], 1), 1.0, site, &cx, 0).unwrap();
            close(&one, &Tensor::from_vec([1.0, 0.0, 0.0, 1.0].repeat(4), [4, 2, 2]).unwrap(), 1e-6);
        }
    }
}
