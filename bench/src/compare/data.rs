//! The three data sets of the comparison, cut to rows that an afternoon can train on.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// A data set: what is trained on, what the learning rate is chosen by, and the test part.
pub struct Data {
    pub name: &'static str,
    pub labels: usize,
    pub train: PathBuf,
    pub held_out: PathBuf,
    pub test: PathBuf,
}

/// Writes the three sets as CSV (`text`, `label`) into `folder`.
pub fn prepare(source: &Path, folder: &Path) -> Result<Vec<Data>> {
    std::fs::create_dir_all(folder)?;
    let sets = [
        (
            "trec",
            6,
            2000,
            marked(&source.join("trec/TREC.train.all"))?,
            marked(&source.join("trec/TREC.test.all"))?,
        ),
        (
            "sst2",
            2,
            2000,
            marked(&source.join("sst2/stsa.binary.train"))?,
            marked(&source.join("sst2/stsa.binary.test"))?,
        ),
        (
            "banking77",
            77,
            4000,
            table(&source.join("banking77/train.csv"))?,
            table(&source.join("banking77/test.csv"))?,
        ),
    ];
    sets.into_iter()
        .map(|(name, labels, rows, train, test)| {
            let path = |part: &str| folder.join(format!("{name}-{part}.csv"));
            let data =
                Data { name, labels, train: path("train"), held_out: path("held-out"), test: path("test") };
            let (taken, left) = cut(&train, rows);
            // A quarter of as many rows, spread over those that are left.
            let (held_out, _) = cut(&left, rows / 4);
            write(&data.train, &taken)?;
            write(&data.held_out, &held_out)?;
            write(&data.test, &test)?;
            Ok(data)
        })
        .collect()
}

/// A text and its label.
type Row = (String, String);

/// `rows` rows at equal distances, so that a file sorted by labels gives all of them, and the others.
fn cut(all: &[Row], rows: usize) -> (Vec<Row>, Vec<Row>) {
    let (mut taken, mut left) = (Vec::new(), Vec::new());
    for (at, row) in all.iter().enumerate() {
        let chosen = (at + 1) * rows / all.len() > at * rows / all.len();
        if chosen { &mut taken } else { &mut left }.push(row.clone());
    }
    (taken, left)
}

/// Rows of `label sentence`.
fn marked(path: &Path) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines()
        .map(|line| {
            let (label, text) =
                line.split_once(' ').with_context(|| format!("{}: no label: {line}", path.display()))?;
            Ok((text.to_owned(), label.to_owned()))
        })
        .collect()
}

/// Rows of a table whose first two columns are a text and its label.
fn table(path: &Path) -> Result<Vec<Row>> {
    let mut reader =
        csv::Reader::from_path(path).with_context(|| format!("cannot read {}", path.display()))?;
    reader
        .records()
        .map(|record| {
            let record = record?;
            ensure!(record.len() == 2, "{}: a row of {} columns", path.display(), record.len());
            Ok((record[0].to_owned(), record[1].to_owned()))
        })
        .collect()
}

fn write(path: &Path, rows: &[Row]) -> Result<()> {
    let mut writer = csv::Writer::from_path(path)?;
    writer.write_record(["text", "label"])?;
    for (text, label) in rows {
        writer.write_record([text, label])?;
    }
    Ok(writer.flush()?)
}
