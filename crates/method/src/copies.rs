//! What adapter files hold more than once.

use engraft_nn::Sites;

use crate::Named;

/// The bias of a masked-word head has two names in files, `X.bias` and `X.decoder.bias`; the second is the one that is
/// added, and stays under the name of the model's site.
pub(crate) fn one_bias_a_head(mut tensors: Named, sites: &Sites) -> Named {
    for site in sites.iter() {
        let Some(stem) = site.path.strip_suffix(".bias") else { continue };
        let [outer, inner] =
            [&site.path, &format!("{stem}.decoder.bias")].map(|p| format!("base_model.model.{p}"));
        if tensors.iter().any(|(name, _)| *name == inner) {
            tensors.retain(|(name, _)| *name != outer);
            tensors
                .iter_mut()
                .filter(|(name, _)| *name == inner)
                .for_each(|(name, _)| name.clone_from(&outer));
        }
    }
    tensors
}

/// With `bias = "all"` peft also writes the biases of a replaced module as they were; they change nothing.
pub(crate) fn stale(key: &str) -> bool {
    key.contains(".modules_to_save.") || key.contains(".original_module.")
}
