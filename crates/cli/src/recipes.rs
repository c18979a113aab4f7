//! Recipes as the commands are given them: a file, a run directory, or standard input.

use std::io::Read;
use std::path::{Component, Path, PathBuf};

use engraft_recipe::Recipe;
use engraft_store::json::read_capped;

use crate::failure::{BeforeWork, Failure, Outcome};
use engraft_train::method_specs;

/// Bytes of a recipe.
const RECIPE_MAX: u64 = 1 << 20;

/// Reads a recipe; `-` is standard input. `sets` are the arguments of `--set`.
///
/// # Errors
/// All mistakes together; exit code 2.
pub fn read(path: &Path, sets: &[String]) -> Outcome<Recipe> {
    let (bytes, name) = if path == Path::new("-") {
        let mut bytes = Vec::new();
        let read = std::io::stdin().take(RECIPE_MAX + 1).read_to_end(&mut bytes);
        read.map_err(|e| Failure::before_work(format!("cannot read the recipe from standard input: {e}")))?;
        (bytes, "standard input".to_owned())
    } else {
        (file(path)?, path.display().to_string())
    };
    if bytes.len() as u64 > RECIPE_MAX {
        return Err(Failure::before_work(format!(
            "{name} has more than {RECIPE_MAX} bytes: that is no recipe"
        )));
    }
    let mut recipe = Recipe::parse_bytes(&bytes, &name, sets, &method_specs()).map_err(Failure::problems)?;
    recipe.model_path = straight(&recipe.model_path);
    Ok(recipe)
}

/// The path without `.` and `..` where it leads to the same place: it is written into plans and adapters.
fn straight(path: &Path) -> PathBuf {
    let same =
        |other: &PathBuf| matches!((path.canonicalize(), other.canonicalize()), (Ok(a), Ok(b)) if a == b);
    let Ok(absolute) = std::path::absolute(path) else { return path.to_owned() };
    let mut short = PathBuf::new();
    for part in absolute.components() {
        match part {
            Component::ParentDir => drop(short.pop()),
            part => short.push(part),
        }
    }
    // Beyond a symbolic link `..` may lead elsewhere.
    if same(&short) { short } else { path.to_owned() }
}

/// The bytes of a recipe's file.
fn file(path: &Path) -> Outcome<Vec<u8>> {
    match read_capped(path, "recipe", RECIPE_MAX) {
        // No recipe is so long: there is no limit to raise.
        Err(engraft_store::Error::Limit { found, .. }) => Err(Failure::before_work(format!(
            "{} has {found} bytes and a recipe at most {RECIPE_MAX}: that is no recipe",
            path.display()
        ))),
        Err(engraft_store::Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Err(Failure::before_work(missing(path)))
        }
        read => read.before_work(),
    }
}

/// What was expected where a recipe is not there.
fn missing(path: &Path) -> String {
    let dir = path.parent().filter(|_| path.ends_with("plan.toml")).filter(|dir| dir.is_dir());
    match dir {
        Some(dir) => format!(
            "{}: expected a recipe or the directory of a run, found a directory without plan.toml",
            dir.display()
        ),
        None => {
            format!("{}: expected a recipe or the directory of a run, found nothing there", path.display())
        }
    }
}

/// The recipe of what the user named: a run directory means its plan.
pub fn file_of(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("plan.toml") } else { path.to_owned() }
}

/// Where the run of a recipe goes when nothing is said: `runs/` and the recipe's name, or that of its directory where the
/// recipe is just called `recipe.toml`.
pub fn default_out(path: &Path) -> PathBuf {
    let stem = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    let parent = path
        .canonicalize()
        .ok()
        .and_then(|full| Some(full.parent()?.file_name()?.to_string_lossy().into_owned()));
    let name = match (stem.as_str(), parent) {
        ("recipe" | "plan", Some(parent)) => parent,
        ("-" | "", _) => "run".into(),
        _ => stem,
    };
    Path::new("runs").join(name)
}

/// A word as a shell reads it back.
pub fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_called_after_its_recipe() {
        assert_eq!(default_out(Path::new("recipes/quickstart.toml")), Path::new("runs/quickstart"));
        let dir = tempfile::tempdir().unwrap();
        let demo = dir.path().join("demo");
        std::fs::create_dir(&demo).unwrap();
        std::fs::write(demo.join("recipe.toml"), "").unwrap();
        assert_eq!(default_out(&demo.join("recipe.toml")), Path::new("runs/demo"));
        assert_eq!(default_out(Path::new("-")), Path::new("runs/run"));
    }

    #[test]
    fn paths_are_made_straight_where_they_stay_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::create_dir(root.join("m")).unwrap();
        assert_eq!(straight(&root.join("a/../m")), root.join("m"));
        std::os::unix::fs::symlink(root.join("a/b"), root.join("l")).unwrap();
        std::fs::create_dir(root.join("a/m")).unwrap();
        assert_eq!(straight(&root.join("l/../m")), root.join("l/../m"));
        assert_eq!(straight(Path::new("no/such/../model")), Path::new("no/such/../model"));
    }

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(shell("train.learning_rate=2e-4"), "train.learning_rate=2e-4");
        assert_eq!(shell("it's here"), r"'it'\''s here'");
        assert_eq!(shell(""), "''");
    }
}
