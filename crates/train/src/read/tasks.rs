//! Data sets of several tasks as one: each example knows its task, classes are counted over all of them.

use engraft_data::{Dataset, Labels};
use engraft_recipe::Task;

use super::Examples;
use crate::{Error, Result};

/// The data sets of the tasks of these numbers one after another. Classes of one name are one class.
pub(super) fn joined(sets: Vec<Examples>, numbers: &[usize], task: Task) -> Result<Examples> {
    if sets.iter().any(|set| set.train.images.is_some()) {
        let text = "several tasks of pictures in one run are not there yet; give one data set";
        return Err(Error::Setup(text.into()));
    }
    let shifted = task == Task::CausalLm;
    let mut names: Vec<String> = Vec::new();
    let mut known = true;
    let (mut train, mut eval, mut classes) = (Dataset::default(), Dataset::default(), None);
    for (mut set, &of) in sets.into_iter().zip(numbers) {
        let of_names: Option<Vec<u32>> =
            set.labels.as_ref().map(|own| own.iter().map(|name| number(&mut names, name)).collect());
        known &= of_names.is_some();
        for example in
            set.train.examples.iter_mut().chain(set.eval.iter_mut().flat_map(|eval| &mut eval.examples))
        {
            example.task = Some(of);
            if let Some(numbers) = &of_names {
                renumber(&mut example.labels, numbers);
            }
        }
        classes = classes.max(set.classes);
        append(&mut train, set.train);
        if let Some(own) = set.eval {
            append(&mut eval, own);
        }
    }
    for part in [&mut train, &mut eval] {
        part.report.measure(&part.examples, shifted);
    }
    let labels = (known && !names.is_empty()).then_some(names);
    let classes = labels.as_ref().map(Vec::len).or(classes);
    (train.labels, eval.labels) = (labels.clone(), labels.clone());
    let eval = (!eval.examples.is_empty()).then_some(eval);
    Ok(Examples { train, eval, labels, classes })
}

/// The number of a class among those of all tasks.
fn number(names: &mut Vec<String>, name: &str) -> u32 {
    let known = names.iter().position(|n| n == name);
    known.unwrap_or_else(|| {
        names.push(name.to_owned());
        names.len() - 1
    }) as u32
}

fn renumber(labels: &mut Labels, numbers: &[u32]) {
    match labels {
        Labels::Class(class) => *class = numbers[*class as usize],
        Labels::Tokens(labels) => {
            for label in labels.iter_mut().filter(|label| **label >= 0) {
                *label = i64::from(numbers[*label as usize]);
            }
        }
        Labels::None | Labels::Score(_) | Labels::Target(_) => {}
    }
}

/// Puts the examples of a task behind those of the tasks before it.
fn append(all: &mut Dataset, own: Dataset) {
    all.examples.extend(own.examples);
    let (report, more) = (&mut all.report, own.report);
    report.rows += more.rows;
    report.truncated_rows += more.truncated_rows;
    report.truncated_tokens += more.truncated_tokens;
    report.untrained_rows.extend(more.untrained_rows);
    let new: Vec<String> = more.guesses.into_iter().filter(|guess| !report.guesses.contains(guess)).collect();
    report.guesses.extend(new);
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_data::Example;

    fn set(labels: &[&str], classes: &[u32]) -> Examples {
        let example =
            |&class| Example { ids: vec![1, 2], labels: Labels::Class(class), ..Example::default() };
        let names: Vec<String> = labels.iter().map(|name| (*name).into()).collect();
        let train = Dataset {
            examples: classes.iter().map(example).collect(),
            labels: Some(names.clone()),
            ..Dataset::default()
        };
        Examples { train, eval: None, classes: Some(names.len()), labels: Some(names) }
    }

    #[test]
    fn classes_are_counted_over_all_tasks() {
        let all = joined(
            vec![set(&["no", "yes"], &[1, 0]), set(&["maybe", "no"], &[0, 1])],
            &[1, 0],
            Task::SequenceClassification,
        )
        .unwrap();
        assert_eq!(all.labels.unwrap(), ["no", "yes", "maybe"]);
        assert_eq!(all.classes, Some(3));
        let found: Vec<_> = all.train.examples.iter().map(|e| (e.task, e.labels.clone())).collect();
        let class = Labels::Class;
        assert_eq!(
            found,
            [(Some(1), class(1)), (Some(1), class(0)), (Some(0), class(2)), (Some(0), class(0))]
        );
        assert!(all.eval.is_none());
    }
}
