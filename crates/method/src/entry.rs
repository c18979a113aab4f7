//! The registry: what a method is called, its settings with their documentation, how it is read from a file.

use engraft_nn::{Error, Matcher, Result, Role, Sites, Targets};
use serde_json::{Map, Value};

use crate::transposed::as_in_peft;
use crate::{METHODS, Method};

/// What a method is. Help, tables and the recipe's schema follow from it.
#[derive(Debug)]
pub struct Info {
    /// Name in recipes: "lora".
    pub name: &'static str,
    /// Name in prose: "LoRA".
    pub title: &'static str,
    /// Class of the surveys: "additive", "prompt", "selective", "reparameterized", "hybrid".
    pub class: &'static str,
    /// Kinds of site it uses: "weight", "keys and values", …
    pub sites: &'static str,
    /// arXiv number or venue.
    pub paper: &'static str,
    /// One line: the formula or the idea.
    pub summary: &'static str,
    /// Whether it can be folded into the base.
    pub mergeable: bool,
    /// Whether a new adapter changes nothing.
    pub identity_at_init: bool,
    /// Whether `targets` choose its sites; the roles used when the recipe names none.
    pub default_roles: Option<&'static [Role]>,
    /// `peft_type` in `adapter_config.json`.
    pub peft_type: &'static str,
    /// Settings.
    pub fields: &'static [Field],
}

impl Info {
    /// The usual roles as targets, where they are of this model.
    pub(crate) fn usual_targets(&self, sites: &Sites) -> Option<Targets> {
        let roles = self.default_roles?;
        let has = |role: Role| sites.iter().any(|s| s.role == role);
        let parts = [Role::Q, Role::K, Role::V];
        let fused = !parts.iter().any(|&part| has(part)) && has(Role::Qkv);
        let own = |role: &Role| if fused && parts.contains(role) { Role::Qkv } else { *role };
        let mut found: Vec<Role> = roles.iter().map(own).filter(|&role| has(role)).collect();
        found.dedup();
        Some(Targets::roles(if found.is_empty() { roles } else { &found }))
    }
}

/// One setting of a method.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Key in the recipe.
    pub name: &'static str,
    /// What it may be.
    pub kind: FieldKind,
    /// Default, as JSON text; `None` where leaving it out has a meaning of its own.
    pub default: Option<&'static str>,
    /// One line.
    pub doc: &'static str,
}

/// What a setting may be.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum FieldKind {
    Bool,
    Int {
        min: i64,
        max: i64,
    },
    Float {
        min: f64,
        max: f64,
    },
    Text,
    OneOf(&'static [&'static str]),
    /// A text whose tokens the method needs: `from_settings` is given `{ "text": …, "ids": […] }`, the ids by the model's
    /// tokenizer with its special tokens, so that no method knows tokenizers.
    Tokens,
    TextList,
    /// Directories of saved prompts, whose rows the method needs: `from_settings` is given a list of
    /// `{ "path": …, "rows": [[…], …] }`, so that no method reads files.
    Prompts,
    /// Directories of saved adapters that the method builds on: `from_settings` is given their paths, and then
    /// [`Method::take_adapters`] what they hold, so that no method reads files.
    Adapters,
    IntList,
    IntMap,
    FloatMap,
}

/// A method's table of a recipe, without the keys that every method has.
pub type Settings = Map<String, Value>;

/// Types of `peft` that are not here, and why.
const NOT_HERE: &[(&str, &str)] = &[(
    "SHADOW",
    "a second, small language model that runs beside the blocks of the base and cannot be merged into it, which is not here; \
     use it in peft, or train a side network on frozen blocks with method `lst`",
)];

/// A method in the registry.
pub struct Entry {
    /// What it is.
    pub info: &'static Info,
    /// From a recipe's settings (kinds and names already checked; absent ones take their default).
    pub from_settings: fn(&Settings) -> Result<Box<dyn Method>>,
    /// From the `adapter_config.json` of a saved adapter, if it is one of this method.
    pub from_file: fn(&Value) -> Result<Option<Loaded>>,
    /// A small configuration that makes every part of the method work, for the conformance tests.
    pub example: fn() -> Box<dyn Method>,
}

impl Entry {
    /// The sites used when a recipe names none, in words; `None` for methods that have sites of their own kind.
    pub fn usual_targets(&self) -> Option<String> {
        if let Some(roles) = self.info.default_roles {
            let names: Vec<&str> = roles.iter().map(|role| role.name()).collect();
            return Some(format!("roles {}", names.join(", ")));
        }
        Some(match (self.example)().default_targets(&Sites::default())?.matcher {
            Matcher::AllLinear => "every linear layer but the head".into(),
            Matcher::Names(_) | Matcher::Regex(_) | Matcher::Roles(_) | Matcher::Own => {
                "what the model has of its roles".into()
            }
        })
    }
}

/// A method read from a file with what the file says about its sites.
pub struct Loaded {
    /// The method.
    pub method: Box<dyn Method>,
    /// Its targets, for methods that have them.
    pub targets: Option<Targets>,
    /// Modules trained as a whole.
    pub train_also: Vec<String>,
}

/// The method called `name`.
pub fn find(name: &str) -> Option<&'static Entry> {
    METHODS.iter().find(|e| e.info.name == name).copied()
}

/// The method of a saved adapter.
pub fn from_file(config: &Value) -> Result<Loaded> {
    let plain = as_in_peft(config);
    for entry in METHODS {
        if let Some(loaded) = (entry.from_file)(plain.as_ref().unwrap_or(config))? {
            return Ok(loaded);
        }
    }
    let found = config.get("peft_type").and_then(Value::as_str).unwrap_or("none");
    if let Some((_, reason)) = NOT_HERE.iter().find(|(name, _)| *name == found) {
        return Err(Error::Unsupported(format!("adapter_config.json has peft_type {found}: {reason}")));
    }
    let known: Vec<&str> = METHODS.iter().map(|e| e.info.peft_type).collect();
    Err(Error::Unsupported(format!(
        "adapter_config.json has peft_type {found}, which is not there yet; readable are {}",
        known.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_usual_targets_have_words() {
        let of = |name: &str| find(name).unwrap().usual_targets();
        assert_eq!(of("lora").as_deref(), Some("roles q, v"));
        assert_eq!(of("fish").as_deref(), Some("every linear layer but the head"));
        assert_eq!(of("prompt"), None);
    }

    #[test]
    fn what_is_not_here_is_named() {
        let error = |config: Value| from_file(&config).map(|_| ()).unwrap_err().to_string();
        assert!(error(json!({ "peft_type": "SHADOW" })).contains("method `lst`"));
        assert!(
            error(json!({ "peft_type": "SOMETHING" }))
                .contains("SOMETHING, which is not there yet; readable are LORA")
        );
        assert!(NOT_HERE.iter().all(|(name, _)| METHODS.iter().all(|e| e.info.peft_type != *name)));
    }
}
