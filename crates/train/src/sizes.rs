//! Sizes of pictures against the model, known from headers and settings before anything is decoded.

use engraft_data::Images;
use engraft_nn::ModelInfo;
use engraft_recipe::{Problem, Recipe};

/// The most bytes that the pixels of one micro-batch may take.
const BATCH_BYTES_MAX: u128 = 4 << 30;

/// What keeps the pictures of `key` from being read by the model.
pub(crate) fn misfit(recipe: &Recipe, key: &str, images: &Images, info: &ModelInfo) -> Option<Problem> {
    let (model, trained) = (&info.architecture, info.picture?);
    // Pictures that do not agree with each other were refused before.
    let [channels, height, width] = images.shape().ok()?;
    let keys = images.processor().map(|processor| processor.size_keys());
    let made = if keys.is_some() { "the processor makes" } else { "the data hold" };
    let (right, help) = match keys {
        Some(keys) => (
            format!("{{\"height\": {}, \"width\": {}}}", trained.height, trained.width),
            format!("set {keys} of the model's preprocessor_config.json to "),
        ),
        None => (format!("{} × {}", trained.height, trained.width), "make pixel_values of ".into()),
    };
    if channels != trained.channels {
        let title = format!(
            "{made} pictures of {channels} channels, and {model} reads {} (`num_channels` in config.json)",
            trained.channels
        );
        return Some(recipe.problem_at(key, title));
    }
    let expected = match info.any_size {
        None if (height, width) != (trained.height, trained.width) => {
            format!("{} × {} only (`image_size` in config.json)", trained.height, trained.width)
        }
        Some((high, wide)) if height < high || width < wide => {
            format!("{high} × {wide} at least (`patch_size` in config.json)")
        }
        _ => return too_large(recipe, images.len(), [channels, height, width]),
    };
    let title = format!("{made} pictures of {height} × {width} pixels, and {model} reads {expected}");
    Some(recipe.problem_at(key, title).help(help + &right))
}

/// A micro-batch whose pixels alone would fill the memory.
fn too_large(recipe: &Recipe, count: usize, [channels, height, width]: [usize; 3]) -> Option<Problem> {
    let batch = recipe.train.batch_size.min(count);
    let bytes = [batch, channels, height, width].iter().fold(4u128, |bytes, n| bytes * *n as u128);
    let title = format!(
        "{batch} pictures of {channels} × {height} × {width} numbers take {} GiB a micro-batch, and it may take {}",
        bytes >> 30,
        BATCH_BYTES_MAX >> 30
    );
    let help =
        "make train.batch_size smaller, or the pictures (crop_size or size in preprocessor_config.json)";
    (bytes > BATCH_BYTES_MAX).then(|| recipe.problem_at("train.batch_size", title).help(help))
}
