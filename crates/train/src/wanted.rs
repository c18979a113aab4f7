//! What a recipe says of a method's sites, and the words where something of it matches nothing.

use std::collections::BTreeSet;

use engraft_method::{Chosen, FieldKind, Method, Settings};
use engraft_nn::{Adapter, LayerChoice, Matcher, Role, Site, Sites, TargetError, Targets};
use engraft_recipe::{self as recipe, MethodTable, Problem, Recipe, nearest};
use serde_json::Value;

use crate::optimizer::head;

/// The recipe's words as targets; `None` where it says nothing.
pub(crate) fn targets(
    recipe: &Recipe,
    table: &MethodTable,
    method: &dyn Method,
    default: Option<Targets>,
) -> std::result::Result<Option<Targets>, Vec<Problem>> {
    let matcher = match (&table.targets, &table.roles[..]) {
        (Some(targets), _) => Some(matcher(targets)),
        (None, []) => {
            let own = (method.by_layers() && table.layers.is_some()).then_some(Matcher::Own);
            default.as_ref().map(|d| d.matcher.clone()).or(own)
        }
        (None, roles) => Some(Matcher::Roles(parse_roles(recipe, table, roles)?)),
    };
    let says = table.targets.is_some()
        || !table.roles.is_empty()
        || table.exclude.is_some()
        || table.layers.is_some();
    let Some(matcher) = matcher.filter(|_| says) else { return Ok(None) };
    let patterns = table.layers_pattern.clone();
    let one_pattern = patterns.len() == 1;
    Ok(Some(Targets {
        matcher,
        exclude: table.exclude.as_ref().map(self::matcher),
        layers: table.layers.clone().map(|layers| LayerChoice {
            layers,
            patterns,
            one_layer: false,
            one_pattern,
        }),
        train_also: table.train_also.clone(),
    }))
}

/// What a recipe says of the sites of a method that has its own, each at its key.
pub(crate) fn unheeded(recipe: &Recipe, table: &MethodTable, method: &dyn Method) -> Vec<Problem> {
    let info = method.info();
    let says = [
        ("targets", table.targets.is_some()),
        ("roles", !table.roles.is_empty()),
        ("exclude", table.exclude.is_some()),
        ("layers", table.layers.is_some() && !method.by_layers()),
        ("layers_pattern", !table.layers_pattern.is_empty()),
    ];
    let own = ["leave_out", "blocks", "side_layers", "adapter_layers"];
    let own = own.into_iter().find(|key| info.fields.iter().any(|field| field.name == *key));
    let problem = |key: &str| {
        let title = format!("`{key}` says nothing to {}, which has sites of its own", info.title);
        let help = match own.filter(|_| key == "layers") {
            Some(own) => format!(
                "it has a setting of its own for layers: `{own}` (see `engraft methods {}`)",
                info.name
            ),
            None => format!("leave `{key}` out"),
        };
        recipe.problem_at(&format!("{}.{key}", table.at), title).help(help)
    };
    says.into_iter().filter(|(_, says)| *says).map(|(key, _)| problem(key)).collect()
}

fn matcher(targets: &recipe::Targets) -> Matcher {
    match targets {
        recipe::Targets::AllLinear => Matcher::AllLinear,
        recipe::Targets::Pattern(pattern) => Matcher::Regex(pattern.clone()),
        recipe::Targets::Names(names) => Matcher::Names(names.clone()),
    }
}

fn parse_roles(
    recipe: &Recipe,
    table: &MethodTable,
    roles: &[String],
) -> std::result::Result<Vec<Role>, Vec<Problem>> {
    let (mut found, mut problems) = (vec![], vec![]);
    for (index, name) in roles.iter().enumerate() {
        match Role::parse(name) {
            Some(role) => found.push(role),
            None => {
                let known: Vec<&str> = Role::ALL.iter().map(|(_, name)| *name).collect();
                let at = format!("{}.roles[{index}]", table.at);
                let problem = recipe.problem_at(&at, format!("there is no role `{name}`"));
                let near = nearest(name, known.iter().copied());
                let problem = match near {
                    Some(near) => problem.saying(format!("did you mean `{near}`?")),
                    None => problem,
                };
                problems.push(problem.note(format!("roles are {}", known.join(", "))));
            }
        }
    }
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}

/// The nearest name to `dead` that `paths` have: any stretch of one that has as many parts.
fn near<'p>(dead: &str, paths: impl IntoIterator<Item = &'p str>) -> Option<String> {
    let parts = dead.split('.').count();
    let mut names = BTreeSet::new();
    for path in paths {
        let path: Vec<&str> = path.split('.').collect();
        names.extend(path.windows(parts).map(|stretch| stretch.join(".")));
    }
    // A name that is there leads to nothing else that is wanted.
    let others = names.iter().map(String::as_str).filter(|name| *name != dead);
    nearest(dead, others).map(str::to_owned)
}

/// The sites with each set of names.
fn views(sites: &Sites) -> impl Iterator<Item = &Sites> {
    std::iter::once(sites).chain(sites.older().map(AsRef::as_ref))
}

/// The sites under both sets of names.
fn both(sites: &Sites) -> impl Iterator<Item = &Site> {
    views(sites).flat_map(Sites::iter)
}

/// How many blocks a stack has.
fn blocks(sites: &Sites) -> usize {
    sites.iter().filter_map(|s| s.layer).max().map_or(0, |last| last + 1)
}

/// The paths of the sites that the targets choose.
fn chosen<'s>(method: &dyn Method, targets: &Targets, sites: &'s Sites) -> Vec<&'s str> {
    let ids = method.resolve(targets, sites).map_or(vec![], |found| found.sites);
    ids.into_iter().map(|id| sites.get(id).path.as_str()).collect()
}

/// A name of `train_also` that the model does not have, with the nearest that it has.
pub(crate) fn dead_module(recipe: &Recipe, methods: &[MethodTable], dead: &str, sites: &Sites) -> Problem {
    let title = format!("`train_also` names `{dead}`, which {} does not have", recipe.model.value);
    let place = methods.iter().find_map(|m| Some((m, m.train_also.iter().position(|name| name == dead)?)));
    let at = place.map_or("method".into(), |(table, index)| format!("{}.train_also[{index}]", table.at));
    let problem = recipe.problem_at(&at, title);
    match near(dead, both(sites).map(|site| site.path.as_str())) {
        Some(near) => problem.saying(format!("did you mean `{near}`?")),
        None => problem.help(format!("`engraft inspect {}` lists its tensors", recipe.model.value)),
    }
}

/// A learning rate of the head where nothing of it is trained.
pub(crate) fn rate_without_head(recipe: &Recipe, adapter: &Adapter, sites: &Sites) -> Option<Problem> {
    if recipe.train.head_learning_rate.is_none() || !head(adapter, sites).is_empty() {
        return None;
    }
    let title = "`head_learning_rate` is for a head that is trained, and nothing of it is";
    let problem = recipe.problem_at("train.head_learning_rate", title);
    let Some(site) = sites.head().find(|site| site.is_weight() && site.role == Role::Head) else {
        return Some(problem.help("delete it: this model has no head"));
    };
    let shared = |other: &Site| other.id != site.id && other.tensor.is_some() && other.tensor == site.tensor;
    Some(match sites.iter().any(shared) {
        true => problem
            .note("the head is the table of tokens here, which learns at `learning_rate`")
            .help("delete it"),
        false => problem.help(format!("add `train_also = [\"{}\"]` to `[method]`, or delete it", site.path)),
    })
}

/// What narrows the targets and means nothing here: layers without a target, names of lists of layers, exclusions.
pub(crate) fn idle(
    recipe: &Recipe,
    table: &MethodTable,
    method: &dyn Method,
    targets: &Targets,
    sites: &Sites,
) -> Vec<Problem> {
    let whole = Targets { exclude: None, layers: None, train_also: vec![], ..targets.clone() };
    // Where the names themselves match nothing, that is what is told.
    let found = views(sites).find_map(|sites| Some((sites, method.resolve(&whole, sites).ok()?.sites)));
    let (all, Some((sites, found))) = (sites, found) else { return vec![] };
    let mut problems = dead_exclusions(recipe, table, targets, sites);
    if let Some(choice) = &targets.layers {
        let within = |layers: Vec<usize>, patterns: &[String]| {
            let layers = LayerChoice { layers, patterns: patterns.to_vec(), ..choice.clone() };
            method.resolve(&Targets { layers: Some(layers), ..whole.clone() }, sites).is_ok()
        };
        problems.extend(dead_layers(recipe, table, targets, choice, sites, &within));
    }
    if problems.is_empty() && views(all).all(|sites| method.resolve(targets, sites).is_err()) {
        let keys = [
            ("exclude", targets.exclude.is_some()),
            ("layers", targets.layers.is_some()),
            ("train_also", !targets.train_also.is_empty()),
        ];
        let keys: Vec<String> =
            keys.iter().filter(|(_, there)| *there).map(|(key, _)| format!("`{key}`")).collect();
        let leave = if keys.len() == 1 { "leaves" } else { "leave" };
        let title = format!("{} {leave} none of the {} targets", keys.join(" and "), found.len());
        problems.push(recipe.problem_at(&table.at, title));
    }
    if problems.is_empty() {
        problems = left_out(recipe, table, method, targets, sites);
    }
    problems
}

/// Names of targets that `layers` and `exclude` leave nothing of, beside others that they leave something of.
fn left_out(
    recipe: &Recipe,
    table: &MethodTable,
    method: &dyn Method,
    targets: &Targets,
    sites: &Sites,
) -> Vec<Problem> {
    let Matcher::Names(names) = &targets.matcher else { return vec![] };
    let keys = [("exclude", targets.exclude.is_some()), ("layers", targets.layers.is_some())];
    let keys: Vec<&str> = keys.iter().filter(|(_, there)| *there).map(|(key, _)| *key).collect();
    let mut problems = Vec::new();
    for (index, name) in names.iter().enumerate().filter(|_| !keys.is_empty()) {
        let matcher = Matcher::Names(vec![name.clone()]);
        let narrowed = Targets { matcher: matcher.clone(), train_also: vec![], ..targets.clone() };
        let whole = Targets { exclude: None, layers: None, ..narrowed.clone() };
        if method.resolve(&whole, sites).is_ok() && method.resolve(&narrowed, sites).is_err() {
            let title = format!("`{name}` is no target any more: `{}` leaves it out", keys.join("` and `"));
            problems.push(problem_in(recipe, &format!("{}.targets", table.at), index, title));
        }
    }
    problems
}

/// A problem at a place in a list, or at the key where it holds one value.
fn problem_in(recipe: &Recipe, key: &str, index: usize, title: String) -> Problem {
    let at = format!("{key}[{index}]");
    let at = if recipe.place(&at).is_some() { &at } else { key };
    recipe.problem_at(at, title)
}

/// The paths of all sites, and of the modules that they lie in.
fn paths(sites: &Sites) -> impl Iterator<Item = &str> {
    both(sites).flat_map(|s| [s.path.as_str(), s.path.rsplit_once('.').map_or("", |p| p.0)])
}

/// The names or patterns of `exclude` that mean no site, with their indices.
fn means_nothing(exclude: &Matcher, sites: &Sites) -> Vec<(usize, String)> {
    let single: Vec<(Matcher, &String)> = match exclude {
        Matcher::Names(names) => {
            names.iter().map(|name| (Matcher::Names(vec![name.clone()]), name)).collect()
        }
        Matcher::Regex(pattern) => vec![(exclude.clone(), pattern)],
        _ => vec![],
    };
    // What is no pattern is told when it is used.
    let dead = |matcher: &Matcher| !paths(sites).any(|path| matcher.means(path).unwrap_or(true));
    let all = single.into_iter().enumerate().filter(|(_, (matcher, _))| dead(matcher));
    all.map(|(index, (_, name))| (index, name.clone())).collect()
}

fn dead_exclusions(recipe: &Recipe, table: &MethodTable, targets: &Targets, sites: &Sites) -> Vec<Problem> {
    let key = format!("{}.exclude", table.at);
    let dead = targets.exclude.as_ref().map_or(vec![], |exclude| means_nothing(exclude, sites));
    let problem = |(index, name): (usize, String)| {
        let title = format!("`{key}` names `{name}`, which {} does not have", recipe.model.value);
        let problem = problem_in(recipe, &key, index, title);
        match near(&name, paths(sites)) {
            Some(near) => problem.saying(format!("did you mean `{near}`?")),
            None => problem.saying("leaves nothing out"),
        }
    };
    dead.into_iter().map(problem).collect()
}

/// What narrows the targets in the file of a loaded adapter and means nothing in this model: names left out, layers, patterns of
/// ranks and alphas.
pub(crate) fn idle_in_file(config: &Value, (method, targets): &Chosen, sites: &Sites) -> Vec<String> {
    let Some(targets) = targets.clone().or_else(|| method.default_targets(sites)) else { return vec![] };
    let mut notes = Vec::new();
    let dead = targets.exclude.as_ref().map_or(vec![], |exclude| means_nothing(exclude, sites));
    for (_, name) in dead {
        notes.push(format!("`exclude_modules` names `{name}`, which matches nothing in this model"));
    }
    let blocks = blocks(sites);
    for layer in targets.layers.iter().flat_map(|choice| &choice.layers).filter(|layer| **layer >= blocks) {
        let last = blocks.saturating_sub(1);
        notes.push(format!("`layers_to_transform` names {layer}, and the model's blocks are 0 to {last}"));
    }
    // A module may be named by its parameter.
    let of = |path: &str| [path.to_owned(), format!("{path}.weight")];
    let adapted: Vec<String> = chosen(method.as_ref(), &targets, sites).into_iter().flat_map(of).collect();
    let adapted: Vec<&str> = adapted.iter().map(String::as_str).collect();
    for (key, text) in idle_patterns(method.as_ref(), config.as_object(), &adapted) {
        notes.push(format!("`{key}` names `{text}`, which is no adapted module of this model"));
    }
    notes
}

/// Patterns of ranks and alphas that match none of the adapted modules, each at its key.
pub(crate) fn dead_patterns(
    recipe: &Recipe,
    table: &MethodTable,
    method: &dyn Method,
    targets: &Targets,
    sites: &Sites,
) -> Vec<Problem> {
    let adapted: Vec<&str> = views(sites).flat_map(|sites| chosen(method, targets, sites)).collect();
    let example = adapted.first().map_or(String::new(), |path| format!(", such as `{path}`"));
    let problem = |(key, text): (&str, &str)| {
        let title = format!("`{}.{key}` names `{text}`, which is no adapted module", table.at);
        let problem = recipe.problem_at(&format!("{}.{key}.\"{text}\"", table.at), title);
        problem
            .saying("matches nothing")
            .note(format!("a pattern is of the whole path of a module, or its end after a dot{example}"))
    };
    idle_patterns(method, Some(&table.settings), &adapted).into_iter().map(problem).collect()
}

/// The keys of a method's maps of patterns, each after its map's, that match none of `paths`.
fn idle_patterns<'s>(
    method: &dyn Method,
    settings: Option<&'s Settings>,
    paths: &[&str],
) -> Vec<(&'static str, &'s str)> {
    let fields = method.info().fields.iter();
    let maps = fields.filter(|field| matches!(field.kind, FieldKind::IntMap | FieldKind::FloatMap));
    let written = maps.filter_map(|field| Some((field.name, settings?.get(field.name)?.as_object()?)));
    let keys = written.flat_map(|(key, map)| map.keys().map(move |text| (key, text.as_str())));
    keys.filter(|(_, text)| {
        method.pattern(text).is_ok_and(|regex| !paths.iter().any(|path| regex.is_match(path)))
    })
    .collect()
}

fn dead_layers(
    recipe: &Recipe,
    table: &MethodTable,
    targets: &Targets,
    choice: &LayerChoice,
    sites: &Sites,
    within: &dyn Fn(Vec<usize>, &[String]) -> bool,
) -> Vec<Problem> {
    let (layers, patterns) = (format!("{}.layers", table.at), format!("{}.layers_pattern", table.at));
    let blocks = blocks(sites);
    let mut problems = Vec::new();
    for (index, pattern) in choice.patterns.iter().enumerate() {
        if within((0..blocks).collect(), std::slice::from_ref(pattern)) {
            continue;
        }
        let title = format!("`{patterns}` names `{pattern}`, which is no list of layers here");
        let problem = problem_in(recipe, &patterns, index, title);
        let lists: BTreeSet<&str> = sites.iter().filter_map(|site| list_of(&site.path)).collect();
        let lists: Vec<String> = lists.iter().map(|list| format!("`{list}`")).collect();
        problems.push(problem.note(format!("layers are in {}", lists.join(", "))));
    }
    if !problems.is_empty() {
        return problems;
    }
    let there: Vec<usize> = (0..blocks).filter(|&n| within(vec![n], &choice.patterns)).collect();
    for (index, layer) in choice.layers.iter().enumerate().filter(|(_, n)| !there.contains(n)) {
        if targets.matcher == Matcher::Own {
            let title = format!(
                "`{layers}` names {layer}, and the model's layers are 0 to {}",
                blocks.saturating_sub(1)
            );
            problems.push(problem_in(recipe, &layers, index, title));
            continue;
        }
        let title = format!("`{layers}` names {layer}, where no target lies");
        let problem = problem_in(recipe, &layers, index, title);
        problems.push(match (there.first(), there.last()) {
            (Some(first), Some(last)) if last - first + 1 == there.len() => {
                problem.saying(format!("targets lie in layers {first} to {last}"))
            }
            _ => problem.saying(format!("targets lie in layers {there:?}")),
        });
    }
    problems
}

/// What precedes the first number of a path.
fn list_of(path: &str) -> Option<&str> {
    let parts: Vec<&str> = path.split('.').collect();
    let number = parts.iter().position(|part| part.parse::<usize>().is_ok())?;
    parts.get(number.checked_sub(1)?).copied()
}

/// The error of names that match nothing among others that do: the same search for these alone, for its words.
pub(crate) fn partly_dead(
    method: &dyn Method,
    targets: &Targets,
    dead: Vec<String>,
    sites: &Sites,
) -> Option<engraft_nn::Error> {
    let matcher = match &targets.matcher {
        Matcher::Roles(_) => Matcher::Roles(dead.iter().filter_map(|name| Role::parse(name)).collect()),
        _ => Matcher::Names(dead),
    };
    let mut error = method.resolve(&Targets { matcher, ..targets.clone() }, sites).err()?;
    if let engraft_nn::Error::Targets(TargetError::Dead { all, .. }) = &mut error {
        *all = false;
    }
    Some(error)
}

/// The head's module, where the role of the head is all that was asked for and the model has one.
fn whole_head<'a>(names: &[String], note: &'a str) -> Option<&'a str> {
    let head = note.split(", ").find_map(|part| part.strip_prefix("role head is `"));
    head.filter(|_| names == ["head"])?.split('`').next()
}

/// The error of targets that match nothing: every dead name underlined, what the model has instead, what to write.
pub(crate) fn dead_targets(recipe: &Recipe, table: &MethodTable, error: engraft_nn::Error) -> Problem {
    let key = if table.targets.is_none() && !table.roles.is_empty() { "roles" } else { "targets" };
    let at = format!("{}.{key}", table.at);
    let engraft_nn::Error::Targets(TargetError::Dead { names, all, kind, total, note, suggestion, known }) =
        error
    else {
        return recipe.problem_at(&at, error.to_string());
    };
    if let Some(module) = whole_head(&names, &note) {
        let title =
            format!("the head is no target of `{at}` here: `{module}` is trained as a whole or not at all");
        let help = format!("leave `head` out, and set `train_also = [{module:?}]` to train it");
        return recipe.problem_at(&at, title).help(help);
    }
    let shown = |names: &[String]| names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    let model = &recipe.model.value;
    let title = match all {
        true => format!("`{at}` matches nothing in {model}"),
        false => format!("{} of `{at}` matches nothing in {model}", shown(&names)),
    };
    let mut problem = Problem::new(title);
    let listed = match (&table.targets, key) {
        (_, "roles") => table.roles.clone(),
        (Some(recipe::Targets::Names(names)), _) => names.clone(),
        _ => vec![],
    };
    let indices: Vec<usize> = (0..listed.len()).filter(|&i| names.contains(&listed[i])).collect();
    let count = format!("0 of {total} {kind}s");
    for (n, index) in indices.iter().enumerate() {
        if let Some(place) = recipe.place(&format!("{at}[{index}]")) {
            problem = problem.label(place, if n + 1 == indices.len() { count.as_str() } else { "" });
        }
    }
    if problem.labels.is_empty() {
        problem = recipe.problem_at(&at, problem.title).saying(count);
    }
    if let (Some(recipe::Targets::Pattern(pattern)), "targets") = (&table.targets, key) {
        if strsim::damerau_levenshtein(pattern, "all-linear") <= 2 {
            return problem.help("did you mean `targets = \"all-linear\"`?");
        }
        problem =
            problem.note("a string is a pattern that a whole path must match; a list holds names of modules");
    }
    let meant = |i: &usize| Some((near(&listed[*i], known.iter().map(String::as_str))?, listed[*i].clone()));
    // A role has a name of its own, which was read.
    let meant: Vec<(String, String)> =
        if key == "targets" { indices.iter().filter_map(meant).collect() } else { vec![] };
    with_names(problem, &names, &note, &suggestion, &meant)
}

/// What the model has: names near to those that match nothing, else the modules that nearly every recipe wants.
fn with_names(
    mut problem: Problem,
    names: &[String],
    note: &str,
    suggestion: &[String],
    meant: &[(String, String)],
) -> Problem {
    // All roles where the model has none of the usual ones.
    let parts: Vec<&str> = note.split(", ").collect();
    let crossed = names.iter().any(|name| name.starts_with("cross"));
    let usual = |part: &&str| match crossed {
        true => ["role cross.q ", "role cross.v "].iter().any(|r| part.starts_with(r)),
        false => ["role q ", "role v ", "role qkv "].iter().any(|r| part.starts_with(r)),
    };
    let few: Vec<&str> = parts.iter().copied().filter(usual).collect();
    let words = if few.is_empty() { note.to_owned() } else { few.join(", ") };
    if !words.is_empty() {
        problem = problem.note(format!("in this model {words}"));
    }
    match meant {
        [] => {}
        [(near, _)] if names.len() == 1 => return problem.help(format!("did you mean `{near}`?")),
        several => {
            let each = several.iter().map(|(near, name)| format!("`{near}` for `{name}`"));
            return problem.help(format!("did you mean {}?", each.collect::<Vec<_>>().join(", ")));
        }
    }
    if suggestion.is_empty() {
        return problem;
    }
    let list = suggestion.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>().join(", ");
    let roles = match few.iter().any(|r| r.starts_with("role qkv ")) {
        _ if crossed => "\"cross.q\", \"cross.v\"",
        true => "\"qkv\"",
        false => "\"q\", \"v\"",
    };
    problem.help(format!("write `targets = [{list}]`, or `roles = [{roles}]` for any model"))
}
