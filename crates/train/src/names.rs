//! Names of classes: those of the data against those that the model's head was trained on.

use engraft_data::{Dataset, Labels};
use engraft_nn::{Role, Sites};
use engraft_recipe::nearest;

use crate::{Error, Result};

/// Gives the classes the numbers that the model's head has for them, where it knows them all. Where it knows none they
/// keep their own.
///
/// # Errors
/// It knows some: a name is misspelt, or the classes are others.
pub(crate) fn settle(data: &mut Dataset, known: &[String]) -> Result<()> {
    let Some(found) = &data.labels else { return Ok(()) };
    let numbers: Vec<Option<usize>> =
        found.iter().map(|name| known.iter().position(|own| own == name)).collect();
    let unknown = unknown(found, known);
    if unknown.len() == found.len() {
        return Ok(());
    }
    if !unknown.is_empty() {
        return Err(Error::Setup(format!(
            "expected classes of the model's `id2label` ({}), found {} beside {} of them; rename these, or list all classes of \
             the data in data.labels if they are others",
            shown(known),
            unknown.join(", "),
            found.len() - unknown.len()
        )));
    }
    for example in &mut data.examples {
        if let Labels::Class(class) = &mut example.labels
            && let Some(Some(number)) = numbers.get(*class as usize)
        {
            *class = *number as u32;
        }
    }
    data.labels = Some(known.to_vec());
    Ok(())
}

/// What to tell where the head of the model stays although the classes are called otherwise.
pub(crate) fn kept_head(names: &[String], known: &[String], sites: &Sites) -> Option<String> {
    if names.len() != known.len() || names == known {
        return None;
    }
    let unknown = unknown(names, known);
    let what = match unknown.is_empty() {
        true => "the classes are the model's in another order".to_owned(),
        false => format!("the model does not know the labels {}", unknown.join(", ")),
    };
    let head = sites.iter().find(|site| site.role == Role::Head && site.is_weight());
    let train = head
        .map_or(String::new(), |site| format!(", and train_also = [{:?}] trains it for these", site.path));
    Some(format!(
        "{what}; its head of {} classes is kept as it is and means its own in their order ({}){train}",
        known.len(),
        shown(known)
    ))
}

/// The names that are not among `known`, with the nearest.
fn unknown(names: &[String], known: &[String]) -> Vec<String> {
    let own = || known.iter().map(String::as_str);
    let unknown = names.iter().filter(|name| !known.contains(name));
    unknown
        .map(|name| match nearest(name, own()) {
            Some(near) => format!("`{name}` (did you mean `{near}`?)"),
            None => format!("`{name}`"),
        })
        .collect()
}

/// The names, ten at most.
fn shown(names: &[String]) -> String {
    let first: Vec<String> = names.iter().take(10).map(|name| format!("`{name}`")).collect();
    let more = if names.len() > 10 { format!(" and {} more", names.len() - 10) } else { String::new() };
    first.join(", ") + &more
}
