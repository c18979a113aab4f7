//! Which sites a method uses: `peft`'s rules for names, roles that hold for every architecture, layers, exclusions.

use crate::builder::module_contains;
use crate::{Kind, Pattern, Role, Site, SiteId, Sites};

/// How sites are named.
#[derive(Clone, Debug, PartialEq)]
pub enum Matcher {
    /// Every linear layer but the head.
    AllLinear,
    /// A path equal to a name, or ending in `.name`.
    Names(Vec<String>),
    /// A pattern that the whole path matches.
    Regex(String),
    /// What the sites do.
    Roles(Vec<Role>),
    /// What a method that has sites of its own changes in the chosen layers.
    Own,
}

impl Matcher {
    /// Whether names or a pattern mean the path; what else there is means none.
    ///
    /// # Errors
    /// A pattern that is not one.
    pub fn means(&self, path: &str) -> Result<bool, TargetError> {
        Ok(match self {
            Matcher::Names(names) => names.iter().any(|name| names_path(name, path)),
            Matcher::Regex(pattern) => whole(pattern)?.is_match(path),
            Matcher::AllLinear | Matcher::Roles(_) | Matcher::Own => false,
        })
    }
}

/// Which layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerChoice {
    /// Numbers of the layers.
    pub layers: Vec<usize>,
    /// Patterns of the list of layers in the path, of which the first that matches counts; by default whatever precedes the
    /// first number.
    pub patterns: Vec<String>,
    /// A file had a number in the place of the list of layers.
    pub one_layer: bool,
    /// A file had a text in the place of the list of patterns.
    pub one_pattern: bool,
}

/// The choice of sites of one method.
#[derive(Clone, Debug, PartialEq)]
pub struct Targets {
    /// How sites are named.
    pub matcher: Matcher,
    /// Names or a pattern (`Names` or `Regex`) of what is left out.
    pub exclude: Option<Matcher>,
    /// Which layers; all if absent.
    pub layers: Option<LayerChoice>,
    /// Modules that are trained as a whole and therefore not targets.
    pub train_also: Vec<String>,
}

/// Why targets do not fit a model.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// A pattern is not one.
    #[error("`{pattern}` is not a valid pattern: {message}")]
    Pattern {
        /// What was given.
        pattern: String,
        /// What the parser says.
        message: String,
    },
    /// What names or roles match is all left out again.
    #[error(
        "{} {} {count} module{} of this model, and what is excluded and the chosen layers leave none of them",
        few(names),
        if names.len() == 1 { "matches" } else { "match" },
        if *count == 1 { "" } else { "s" }
    )]
    LeftOut {
        /// What was asked for.
        names: Vec<String>,
        /// How many modules that is.
        count: usize,
    },
    /// Names or roles match no site.
    #[error("nothing among {total} {kind}s matches {}; in this model {note}", few(names))]
    Dead {
        /// Names that match nothing.
        names: Vec<String>,
        /// Whether everything is dead, or only these among live ones, which were searched for alone.
        all: bool,
        /// What was searched: "linear weight", "norm".
        kind: &'static str,
        /// How many there are.
        total: usize,
        /// Which roles the model has and how their modules are called.
        note: Box<str>,
        /// Module names of queries and values here, those of the cross-attention where that was asked for.
        suggestion: Vec<String>,
        /// Paths of all that names could mean.
        known: Box<[String]>,
    },
}

/// Most names that a message lists.
const LISTED: usize = 8;

/// Names in a row, the first ones alone where they are many.
pub fn few(names: &[String]) -> String {
    let listed = names[..names.len().min(LISTED)].join(", ");
    match names.len().saturating_sub(LISTED) {
        0 => listed,
        more => format!("{listed} … and {more} more"),
    }
}

/// Chosen sites, and names among live ones that matched nothing.
#[derive(Debug, PartialEq)]
pub struct Resolution {
    /// In model order.
    pub sites: Vec<SiteId>,
    /// Names or roles that matched nothing.
    pub dead: Vec<String>,
}

impl Targets {
    /// Names of modules, nothing excluded.
    pub fn names<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Targets {
        Matcher::Names(names.into_iter().map(Into::into).collect()).into()
    }

    /// Roles, nothing excluded.
    pub fn roles(roles: &[Role]) -> Targets {
        Matcher::Roles(roles.to_vec()).into()
    }

    /// The weight sites chosen; an error if there is none.
    pub fn resolve(&self, sites: &Sites) -> Result<Resolution, TargetError> {
        if self.matcher == Matcher::Own {
            return self.own(sites);
        }
        let mut dead = self.wanted();
        let pattern = self.regex()?;
        let excluded = self.excluded()?;
        let layers = self.layer_filter()?;
        let (mut chosen, mut count, mut narrowed) = (Vec::new(), 0, false);
        let in_full =
            |path: &str| matches!(&self.matcher, Matcher::Names(names) if names.iter().any(|n| n == path));
        for site in sites.iter().filter(|s| s.is_weight()) {
            let Some(hit) = self.hit(site, pattern.as_ref()) else { continue };
            count += 1;
            // Several names may name one module, as an end and the whole path do.
            let named = matches!(&self.matcher, Matcher::Names(_));
            dead.retain(|d| if named { !names_path(d, &site.path) } else { d != &hit });
            // As in `peft`, a module that is named by its whole path is chosen in whichever layer it is.
            let out = excluded(&site.path) || !(in_full(&site.path) || layers(&site.path));
            narrowed |= out;
            if !out && !self.train_also.iter().any(|m| module_contains(m, &site.path)) {
                chosen.push(site.id);
            }
        }
        if chosen.is_empty() {
            if dead.is_empty() && narrowed {
                return Err(TargetError::LeftOut { names: self.wanted(), count });
            }
            let names = if dead.is_empty() { self.wanted() } else { dead };
            return Err(dead_error(sites, names));
        }
        Ok(Resolution { sites: chosen, dead })
    }

    /// Everything in the chosen layers of each stack; an error where the model has none of them.
    fn own(&self, sites: &Sites) -> Result<Resolution, TargetError> {
        let chosen = |layer: usize| self.layers.as_ref().is_none_or(|choice| choice.layers.contains(&layer));
        let inside: Vec<&Site> = sites.iter().filter(|s| s.layer.is_some()).collect();
        let found: Vec<SiteId> =
            inside.iter().filter(|s| s.layer.is_some_and(chosen)).map(|s| s.id).collect();
        if found.is_empty() {
            return Err(TargetError::LeftOut { names: self.wanted(), count: inside.len() });
        }
        Ok(Resolution { sites: found, dead: Vec::new() })
    }

    /// What was asked for, to report what matched nothing.
    fn wanted(&self) -> Vec<String> {
        match &self.matcher {
            Matcher::AllLinear => vec!["all-linear".into()],
            Matcher::Own => vec!["what the method changes".into()],
            Matcher::Names(names) => names.clone(),
            Matcher::Regex(pattern) => vec![pattern.clone()],
            Matcher::Roles(roles) => roles.iter().map(|r| r.name().into()).collect(),
        }
    }

    /// The wish that a site fulfils.
    fn hit(&self, site: &Site, pattern: Option<&Pattern>) -> Option<String> {
        match &self.matcher {
            Matcher::AllLinear => {
                let linear = matches!(site.kind, Kind::Linear { .. }) && site.role != Role::Head;
                linear.then(|| "all-linear".into())
            }
            Matcher::Names(names) => names.iter().find(|n| names_path(n, &site.path)).cloned(),
            Matcher::Regex(text) => pattern.is_some_and(|p| p.is_match(&site.path)).then(|| text.clone()),
            Matcher::Roles(roles) => roles.contains(&site.role).then(|| site.role.name().into()),
            Matcher::Own => None,
        }
    }

    fn regex(&self) -> Result<Option<Pattern>, TargetError> {
        match &self.matcher {
            Matcher::Regex(pattern) => Ok(Some(whole(pattern)?)),
            _ => Ok(None),
        }
    }

    fn excluded(&self) -> Result<impl Fn(&str) -> bool, TargetError> {
        let (names, pattern) = match &self.exclude {
            Some(Matcher::Names(names)) => (names.clone(), None),
            Some(Matcher::Regex(pattern)) => (vec![], Some(whole(pattern)?)),
            _ => (vec![], None),
        };
        Ok(move |path: &str| {
            names.iter().any(|n| names_path(n, path)) || pattern.as_ref().is_some_and(|p| p.is_match(path))
        })
    }

    fn layer_filter(&self) -> Result<impl Fn(&str) -> bool, TargetError> {
        let choice = match &self.layers {
            None => None,
            Some(choice) => {
                let list = |text: &String| compile(text, &format!(r"^(?:|.*?\.){text}\.(?P<number>\d+)\."));
                let lists = match &choice.patterns[..] {
                    [] => vec![compile("", r"^.*?\.[^.]*\.(?P<number>\d+)\.")?],
                    patterns => patterns.iter().map(list).collect::<Result<_, _>>()?,
                };
                Some((lists, choice.layers.clone()))
            }
        };
        Ok(move |path: &str| match &choice {
            None => true,
            Some((lists, layers)) => {
                lists.iter().find_map(|list| list.number(path)).is_some_and(|n| layers.contains(&n))
            }
        })
    }
}

impl From<Matcher> for Targets {
    fn from(matcher: Matcher) -> Self {
        Targets { matcher, exclude: None, layers: None, train_also: Vec::new() }
    }
}

fn names_path(name: &str, path: &str) -> bool {
    path == name || path.strip_suffix(name).is_some_and(|head| head.ends_with('.'))
}

/// The pattern that a text makes in its surroundings.
fn compile(text: &str, surrounded: &str) -> Result<Pattern, TargetError> {
    Pattern::anywhere(surrounded).map_err(|message| TargetError::Pattern { pattern: text.into(), message })
}

/// Python's `re.fullmatch`.
fn whole(pattern: &str) -> Result<Pattern, TargetError> {
    Pattern::whole(pattern).map_err(|message| TargetError::Pattern { pattern: pattern.into(), message })
}

/// "role q is `query` (12)" for the roles that the model has, and the module names of q and v.
fn dead_error(sites: &Sites, names: Vec<String>) -> TargetError {
    let linear: Vec<&Site> = sites.of_kind(|k| matches!(k, Kind::Linear { .. })).collect();
    let known: Vec<&Site> = sites.iter().filter(|s| s.is_weight()).collect();
    let (kind, listed) = match &linear[..] {
        // A method whose targets name other modules searches these alone.
        [] if known.iter().any(|s| s.role == Role::Norm) => ("norm", &known),
        [] => ("module", &known),
        _ => ("linear weight", &linear),
    };
    let (mut notes, mut suggestion) = (Vec::new(), Vec::new());
    let usual = match names.iter().any(|name| name.starts_with("cross")) {
        true => [Role::CrossQ, Role::CrossV, Role::CrossV],
        false => [Role::Q, Role::V, Role::Qkv],
    };
    for (role, name) in Role::ALL {
        let mut modules: Vec<(&str, usize)> = Vec::new();
        for site in listed.iter().filter(|s| s.role == *role) {
            match modules.iter_mut().find(|(m, _)| *m == site.module()) {
                Some((_, count)) => *count += 1,
                None => modules.push((site.module(), 1)),
            }
        }
        for (module, count) in modules {
            notes.push(format!("role {name} is `{module}` ({count})"));
            if usual.contains(role) {
                suggestion.push(module.to_string());
            }
        }
    }
    TargetError::Dead {
        names,
        all: true,
        kind,
        total: listed.len(),
        note: notes.join(", ").into(),
        suggestion,
        known: known.into_iter().map(|s| s.path.clone()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sites() -> Sites {
        let mut s = Sites::default();
        for layer in 0..3 {
            for (name, role) in
                [("self_attn.q_proj", Role::Q), ("self_attn.v_proj", Role::V), ("mlp.down_proj", Role::Down)]
            {
                let kind = Kind::Linear { out: 4, inn: 4, transposed: false };
                s.add(format!("model.layers.{layer}.{name}"), role, Some(layer), kind);
            }
        }
        s.add("lm_head", Role::Head, None, Kind::Linear { out: 9, inn: 4, transposed: false });
        s.add("model.embed_tokens", Role::Embed, None, Kind::Embedding { rows: 9, width: 4 });
        s
    }

    fn paths(t: &Targets) -> Vec<String> {
        let s = sites();
        t.resolve(&s).unwrap().sites.iter().map(|&id| s.get(id).path.clone()).collect()
    }

    #[test]
    fn names_patterns_roles() {
        assert_eq!(paths(&Targets::names(["q_proj"])).len(), 3);
        assert_eq!(paths(&Targets::names(["self_attn.q_proj", "lm_head"])).len(), 4);
        assert_eq!(paths(&Matcher::AllLinear.into()).len(), 9);
        assert_eq!(paths(&Matcher::Regex(r".*\.1\..*_proj".into()).into()).len(), 3);
        assert_eq!(paths(&Targets::roles(&[Role::Q, Role::Embed])).len(), 4);
        assert_eq!(paths(&Targets::names(["embed_tokens"])), ["model.embed_tokens"]);
    }

    #[test]
    fn layers_and_exclusions() {
        let mut t = Targets::names(["q_proj", "v_proj"]);
        t.layers = Some(LayerChoice { layers: vec![0, 2], ..LayerChoice::default() });
        assert_eq!(paths(&t).len(), 4);
        t.exclude = Some(Matcher::Names(vec!["v_proj".into()]));
        assert_eq!(paths(&t), ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]);
        t.exclude = Some(Matcher::Regex(r"model\.layers\.0.*".into()));
        t.layers.as_mut().unwrap().patterns = vec!["x".into(), "layers".into()];
        assert_eq!(paths(&t).len(), 2);
        t.train_also = vec!["layers.2".into()];
        let message = t.resolve(&sites()).unwrap_err().to_string();
        assert!(
            message.starts_with("q_proj, v_proj match 6 modules of this model, and what is excluded"),
            "{message}"
        );
    }

    #[test]
    fn layers_of_what_a_method_has_of_its_own() {
        let mut t = Targets::from(Matcher::Own);
        assert_eq!(paths(&t).len(), 9, "everything that lies in a layer");
        t.layers = Some(LayerChoice { layers: vec![1, 7], ..LayerChoice::default() });
        assert!(paths(&t).len() == 3 && paths(&t).iter().all(|path| path.starts_with("model.layers.1.")));
        t.layers = Some(LayerChoice { layers: vec![7], ..LayerChoice::default() });
        assert!(
            t.resolve(&sites()).unwrap_err().to_string().starts_with("what the method changes matches 9")
        );
    }

    #[test]
    fn patterns_look_around_and_whole_paths_know_no_layers() {
        let second = Matcher::Regex(r"model\.layers\.(?!0|2)\d\..*(?<!v)_proj".into());
        assert_eq!(
            paths(&second.into()),
            ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
        );
        let twice = Targets::names(["q_proj", "model.layers.0.self_attn.q_proj"]);
        assert!(
            twice.resolve(&sites()).unwrap().dead.is_empty(),
            "an end and a whole path may name one module"
        );
        let mut t = Targets::names(["model.layers.0.mlp.down_proj", "q_proj"]);
        t.layers = Some(LayerChoice { layers: vec![1], ..LayerChoice::default() });
        assert_eq!(paths(&t), ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]);
    }

    #[test]
    fn dead_names_are_reported_with_what_there_is() {
        let error = Targets::names(["query", "value"]).resolve(&sites()).unwrap_err();
        let TargetError::Dead { names, all, total, note, suggestion, .. } = error else { panic!("{error}") };
        assert_eq!((names.len(), all, total), (2, true, 10));
        assert!(note.contains("role q is `q_proj` (3)"), "{note}");
        assert_eq!(suggestion, ["q_proj", "v_proj"]);
        assert_eq!(Targets::names(["q_proj", "value"]).resolve(&sites()).unwrap().dead, ["value"]);
        assert!(Targets::names(["roj"]).resolve(&sites()).is_err(), "part of a name is not a name");
        let names = |count: usize| (0..count).map(|i| format!("x{i}"));
        let message = |count| Targets::names(names(count)).resolve(&sites()).unwrap_err().to_string();
        assert!(message(8).contains("matches x0, x1, x2, x3, x4, x5, x6, x7; in"), "{}", message(8));
        assert!(message(11).contains("x6, x7 … and 3 more; in"), "{}", message(11));
        let bad = Targets::from(Matcher::Regex("(".into())).resolve(&sites()).unwrap_err();
        assert!(matches!(bad, TargetError::Pattern { .. }));
        let mut norms = Sites::default();
        for layer in 0..2 {
            let kind = Kind::Embedding { rows: 1, width: 1 };
            norms.add(format!("h.{layer}.ln_1"), Role::Norm, Some(layer), kind);
        }
        let message = Targets::names(["ln_9"]).resolve(&norms).unwrap_err().to_string();
        assert_eq!(message, "nothing among 2 norms matches ln_9; in this model role norm is `ln_1` (2)");
    }

    #[test]
    fn what_narrows_a_choice_means_paths() {
        let path = "model.layers.0.self_attn.q_proj";
        let names = |name: &str| Matcher::Names(vec![name.into()]).means(path).unwrap();
        assert!(names("q_proj") && names(path) && !names("proj"));
        assert!(Matcher::Regex(r".*q_\w+".into()).means(path).unwrap());
        assert!(!Matcher::Regex("q_proj".into()).means(path).unwrap());
        assert!(Matcher::Regex("(".into()).means(path).is_err());
    }
}
