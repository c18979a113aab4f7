//! Ranks and widths that are more than a matrix can have: allowed, as in `peft`, and told.

use engraft_nn::{Kind, Site};

/// Why more than a matrix can have is of no use.
pub(crate) const IDLE: &str = "what is beyond costs time and memory and adds nothing";

/// (out, in) of a weight; rows and width of a table.
fn sizes(site: &Site) -> Option<(usize, usize)> {
    match site.kind {
        Kind::Linear { out, inn, .. } | Kind::Convolution { out, inn, .. } => Some((out, inn)),
        Kind::Embedding { rows, width } => Some((rows, width)),
        _ => None,
    }
}

/// The first of `targets` that is such with its (out, in), these, and how many others there are.
pub(crate) fn first_of<'s>(
    targets: &[&'s Site],
    such: impl Fn(&Site, (usize, usize)) -> bool,
) -> Option<(&'s Site, (usize, usize), String)> {
    let sized = |site: &&'s Site| Some((*site, sizes(site)?));
    let mut all = targets.iter().filter_map(sized).filter(|(site, sizes)| such(site, *sizes));
    let (site, sizes) = all.next()?;
    let more = match all.count() {
        0 => String::new(),
        more => format!(", and at {more} more"),
    };
    Some((site, sizes, more))
}

/// What is told of products whose rank, at the module of a path, is more than their weight's.
pub(crate) fn beyond_rank(targets: &[&Site], rank: impl Fn(&str) -> usize) -> Vec<String> {
    beyond(targets, "rank", rank, |(out, inn)| out.min(inn), IDLE)
}

/// What is told where `setting` asks for more at a module's path than a weight of such (out, in) can have; `then` says what happens
/// there.
pub(crate) fn beyond(
    targets: &[&Site],
    setting: &str,
    asked: impl Fn(&str) -> usize,
    most: impl Fn((usize, usize)) -> usize,
    then: &str,
) -> Vec<String> {
    let too_many = |site: &Site, sizes: (usize, usize)| asked(&site.path) > most(sizes);
    let Some((site, sizes, more)) = first_of(targets, too_many) else { return vec![] };
    let (path, (out, inn)) = (&site.path, sizes);
    vec![format!(
        "`{setting}` is {}, more than the {} that {path}, [{out}, {inn}], can have{more}: {then}",
        asked(path),
        most(sizes)
    )]
}

#[cfg(test)]
mod tests {
    use crate::METHODS;
    use crate::entry::FieldKind;
    use crate::testing::toy;
    use serde_json::{Map, json};

    /// Methods whose rank is none of a product, that reach more changes with every rank (a diagonal between fixed projections), or that
    /// refuse a rank that is too large.
    const OTHERS: [&str; 6] = ["peanut", "shira", "vera", "dvora", "pvera", "osf"];

    #[test]
    fn a_rank_that_no_weight_can_have_is_told_or_refused() {
        let (sites, info) = toy();
        let mut told = 0;
        let of_weights = METHODS.iter().filter(|entry| entry.usual_targets().is_some());
        for entry in of_weights.filter(|entry| !OTHERS.contains(&entry.info.name)) {
            let ranks = ["rank", "init_rank", "hybrid_rank"];
            let is_rank =
                |name: &str, kind: FieldKind| ranks.contains(&name) && matches!(kind, FieldKind::Int { .. });
            for field in entry.info.fields.iter().filter(|field| is_rank(field.name, field.kind)) {
                let set = |rank: usize| {
                    let mut settings = Map::from_iter([(field.name.to_owned(), json!(rank))]);
                    // What must hold for the rest to be read.
                    settings.extend(entry.info.name.eq("adalora").then(|| ("total_step".into(), json!(9))));
                    if ["kadaptation", "phm"].contains(&entry.info.name) {
                        settings.insert("n".into(), json!(2));
                    }
                    (entry.from_settings)(&settings)
                };
                for none in [json!(0), json!(-1)] {
                    let zero = field.name == "hybrid_rank" && none == json!(0);
                    let settings = Map::from_iter([(field.name.to_owned(), none)]);
                    assert!(zero || (entry.from_settings)(&settings).is_err(), "{}", entry.info.name);
                }
                let Ok(method) = set(40) else { continue };
                let targets: Vec<_> = sites
                    .iter()
                    .filter(|site| matches!(site.kind, engraft_nn::Kind::Linear { .. }))
                    .collect();
                let ids = targets.iter().map(|site| site.path.clone());
                let targeted = engraft_nn::Targets::names(ids.collect::<Vec<_>>());
                let doubts = method.doubts(&targets);
                let of_rank = |text: &String| text.starts_with(&format!("`{}` is 40", field.name));
                let refused =
                    || crate::attach(&[(set(40).unwrap(), Some(targeted))], &[], &sites, &info, 0).is_err();
                assert!(doubts.iter().any(of_rank) || refused(), "{}: {doubts:?}", entry.info.name);
                assert!(set(1).map_or(true, |method| !method.doubts(&targets).iter().any(of_rank)));
                told += usize::from(doubts.iter().any(of_rank));
            }
        }
        assert!(told > 25, "{told}");
    }
}
