//! Pictures with a class each: from folders, lists, IDX and NumPy files, made into numbers when they are asked for.
//!
//! Opening a set reads sizes and labels and reports everything that is wrong at once; pictures in files are decoded only
//! by [`Images::pixels`], so that a large folder is never in memory. [`Images::check`] decodes them all, to find damage
//! before a run begins.

mod decode;
mod exif;
mod files;
mod folder;
mod idx;
mod jpeg;
mod listed;
mod npy;
mod picture;
mod processor;
mod resize;
mod settings;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use decode::{OUTPUT_POINTS_MAX, PICTURE_BYTES_MAX, POINTS_MAX, SIDE_MAX};
pub use picture::Picture;
pub use processor::{Processor, Size};
pub use resize::Filter;
pub use settings::PictureModel;

use crate::error::{Error, Result, not_among};
use crate::example::{Dataset, Example, Labels, Report};
use crate::read::Rows;
use crate::task::sorted;
use decode::Alpha;
use files::Entry;

/// Where pictures and their labels come from.
#[derive(Clone, Copy, Debug)]
pub enum ImageSource<'a> {
    /// `DIR/class/picture.png`: the folders are the classes.
    Folder(&'a Path),
    /// A table with a column of paths and a column of labels, read with [`crate::Need::Image`].
    Rows(&'a Rows),
    /// IDX files, packed or not. Without a path the labels are looked for beside the pictures.
    Idx {
        /// `[pictures, height, width]`, bytes.
        images: &'a Path,
        /// `[pictures]`, bytes.
        labels: Option<&'a Path>,
    },
    /// NumPy files.
    Npy {
        /// `[pictures, height, width]` or `[pictures, height, width, channels]`, bytes or floats.
        images: &'a Path,
        /// `[pictures]`, whole numbers.
        labels: Option<&'a Path>,
    },
}

/// The pictures of a data set.
#[derive(Clone, Debug)]
pub struct Images {
    store: Store,
    processor: Option<Processor>,
    /// Of the results.
    channels: usize,
}

#[derive(Clone, Debug)]
enum Store {
    /// Files, with the names and sizes they had when the set was opened.
    Files(Vec<Entry>),
    /// `[pictures, height, width, channels]` of the file `path`.
    Levels { path: PathBuf, height: usize, width: usize, channels: usize, levels: Vec<u8> },
    /// `[pictures, channels, height, width]`, ready for the model.
    Ready { height: usize, width: usize, values: Vec<f32> },
}

/// Pictures and the label of each.
struct Found {
    images: Store,
    labels: Classes,
    /// The line (from 1) or place (from 0) of each.
    rows: Vec<usize>,
    guesses: Vec<String>,
}

/// The label of every picture.
enum Classes {
    /// By name, in folders and tables.
    Named(Vec<String>),
    /// By number, in arrays.
    Numbered(Vec<usize>),
}

/// The highest number of a class that an array may hold.
const CLASS_MAX: usize = 99_999;

/// The examples of `source`, every picture made into numbers by `processor`. `labels` are the names of the classes in
/// the order of their numbers; without them they are found and sorted (as numbers if all are).
///
/// # Errors
/// Files that cannot be read, sizes that do not agree, pictures beyond the limits, unknown labels: all of one set
/// together ([`Error::Several`]).
pub fn read_images(
    source: ImageSource,
    processor: Processor,
    labels: Option<Vec<String>>,
) -> Result<Dataset> {
    let (place, found) = match source {
        ImageSource::Folder(dir) => (dir, folder::find(dir)?),
        ImageSource::Rows(rows) => (rows.path.as_path(), listed::find(rows)?),
        ImageSource::Idx { images, labels } => (images, idx::find(images, labels)?),
        ImageSource::Npy { images, labels } => (images, npy::find(images, labels)?),
    };
    let channels = processor.channels();
    let images = Images { store: found.images, processor: Some(processor), channels };
    let (names, classes, mut problems) = found.labels.numbered(labels);
    problems.extend((0..images.len()).filter_map(|index| {
        let problem = images.try_size(index).err()?;
        Some(format!("{} {problem}", images.name(index)))
    }));
    if !problems.is_empty() {
        return Err(Error::Several { place: place.display().to_string(), problems });
    }
    let examples = classes.into_iter().enumerate();
    let examples: Vec<Example> =
        examples.map(|(index, class)| example(index, Labels::Class(class), found.rows[index])).collect();
    let report = Report { rows: examples.len(), guesses: found.guesses, ..Report::default() };
    Ok(dataset(images, examples, Some(names), report))
}

impl Classes {
    /// The names of the classes, the number of every picture's class, and what is wrong with them.
    fn numbered(self, names: Option<Vec<String>>) -> (Vec<String>, Vec<u32>, Vec<String>) {
        match self {
            Classes::Named(labels) => {
                let names = names.unwrap_or_else(|| sorted(labels.iter().cloned()));
                let known: Vec<&str> = names.iter().map(String::as_str).collect();
                let numbers: HashMap<&str, u32> = known.iter().copied().zip(0..).collect();
                let unknown: BTreeSet<&String> =
                    labels.iter().filter(|label| !numbers.contains_key(label.as_str())).collect();
                let problems = unknown.iter().map(|label| not_among("label", label, &known)).collect();
                let classes =
                    labels.iter().map(|label| numbers.get(label.as_str()).copied().unwrap_or(0)).collect();
                (names, classes, problems)
            }
            Classes::Numbered(labels) => {
                let highest = labels.iter().copied().max().unwrap_or(0);
                let given = names.as_ref().map(Vec::len);
                let names =
                    names.unwrap_or_else(|| (0..=highest.min(CLASS_MAX)).map(|n| n.to_string()).collect());
                let mut problems = Vec::new();
                if highest >= names.len() {
                    let at = labels.iter().position(|label| *label == highest).unwrap_or(0);
                    let known = match given {
                        Some(count) => format!("there are {count} classes, counted from 0"),
                        None => format!("a class has a number up to {CLASS_MAX}"),
                    };
                    problems.push(format!("picture {at} has the label {highest}; {known}"));
                }
                (names, labels.iter().map(|label| *label as u32).collect(), problems)
            }
        }
    }
}

/// Pictures that are numbers already, `[labels, channels, height, width]`, with their classes.
pub(crate) fn ready(shape: [usize; 3], values: Vec<f32>, labels: Vec<Labels>) -> Dataset {
    let [channels, height, width] = shape;
    let images = Images { store: Store::Ready { height, width, values }, processor: None, channels };
    let report = Report { rows: labels.len(), ..Report::default() };
    let examples = labels.into_iter().enumerate().map(|(row, labels)| example(row, labels, row)).collect();
    dataset(images, examples, None, report)
}

fn example(image: usize, labels: Labels, row: usize) -> Example {
    Example { ids: Vec::new(), type_ids: None, positions: None, image: Some(image), labels, task: None, row }
}

fn dataset(
    images: Images,
    examples: Vec<Example>,
    labels: Option<Vec<String>>,
    mut report: Report,
) -> Dataset {
    report.measure(&examples, false);
    Dataset { examples, images: Some(Arc::new(images)), labels, report }
}

impl Images {
    /// How many there are.
    pub fn len(&self) -> usize {
        match &self.store {
            Store::Files(files) => files.len(),
            Store::Levels { height, width, channels, levels, .. } => {
                levels.len() / (height * width * channels)
            }
            Store::Ready { height, width, values } => values.len() / (height * width * self.channels),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Channels of the results.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// (height, width) of the result for picture `index`, known without decoding it.
    ///
    /// # Panics
    /// `index` is not below [`Images::len`].
    pub fn size(&self, index: usize) -> (usize, usize) {
        // Sizes that cannot be are refused when the set is opened.
        self.try_size(index).unwrap_or((0, 0))
    }

    fn try_size(&self, index: usize) -> std::result::Result<(usize, usize), String> {
        let (height, width) = match &self.store {
            Store::Files(files) => files[index].size,
            Store::Levels { height, width, .. } | Store::Ready { height, width, .. } => (*height, *width),
        };
        self.processor.as_ref().map_or(Ok((height, width)), |processor| processor.output_size(height, width))
    }

    /// `[channels, height, width]` of all results.
    ///
    /// # Errors
    /// Two pictures that give different sizes, so that they cannot share a batch.
    pub fn shape(&self) -> Result<[usize; 3]> {
        let first = if self.is_empty() { (0, 0) } else { self.size(0) };
        if let Some(other) = (0..self.len()).find(|index| self.size(*index) != first) {
            let (found, wide) =
                (self.size(other), |size: (usize, usize)| format!("{} by {}", size.1, size.0));
            let message = format!(
                "becomes {} wide and high, {} becomes {}; set do_center_crop, or size to {{height, width}}, in \
                 preprocessor_config.json",
                wide(found),
                self.name(0),
                wide(first)
            );
            return Err(Error::Data { place: self.name(other), message });
        }
        Ok([self.channels, first.0, first.1])
    }

    /// How they are made into numbers; `None` where they are numbers already.
    pub fn processor(&self) -> Option<&Processor> {
        self.processor.as_ref()
    }

    /// The numbers of picture `index`, `[channels, height, width]`.
    ///
    /// # Errors
    /// A file that is damaged, has changed since the set was opened, or is gone; its name is given.
    ///
    /// # Panics
    /// `index` is not below [`Images::len`].
    pub fn pixels(&self, index: usize) -> Result<Vec<f32>> {
        let picture = match &self.store {
            Store::Ready { height, width, values } => {
                let size = height * width * self.channels;
                return Ok(values[index * size..(index + 1) * size].to_vec());
            }
            Store::Levels { height, width, channels, levels, .. } => {
                let size = height * width * channels;
                let levels = levels[index * size..(index + 1) * size].to_vec();
                Picture { height: *height, width: *width, channels: *channels, levels }
            }
            Store::Files(files) => files[index].picture(self.alpha())?,
        };
        let fail = |message| Error::Data { place: self.name(index), message };
        match &self.processor {
            Some(processor) => processor.pixels(picture).map_err(fail),
            None => Ok(picture.levels.iter().map(|level| f32::from(*level)).collect()),
        }
    }

    fn alpha(&self) -> Alpha {
        self.processor.as_ref().map_or(Alpha::Dropped, |processor| processor.alpha)
    }

    /// What picture `index` is called in messages.
    pub fn name(&self, index: usize) -> String {
        match &self.store {
            Store::Files(files) => files[index].path.display().to_string(),
            Store::Levels { path, .. } => format!("picture {index} of {}", path.display()),
            Store::Ready { .. } => format!("row {index} of pixel_values"),
        }
    }

    /// What tells picture `index` from others when a run is resumed: its bytes, or for a file its name and size.
    pub fn identity(&self, index: usize) -> Cow<'_, [u8]> {
        match &self.store {
            Store::Files(files) => {
                let file = &files[index];
                format!("{} {} {:?}", file.name, file.bytes, file.size).into_bytes().into()
            }
            Store::Levels { height, width, channels, levels, .. } => {
                let size = height * width * channels;
                levels[index * size..(index + 1) * size].into()
            }
            Store::Ready { height, width, values } => {
                let size = height * width * self.channels;
                let values = &values[index * size..(index + 1) * size];
                values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
            }
        }
    }

    /// Decodes every picture once; `progress` is told (done, all).
    ///
    /// # Errors
    /// [`Error::Several`] with every file that is damaged.
    pub fn check(&self, progress: &mut dyn FnMut(usize, usize)) -> Result<()> {
        let Store::Files(files) = &self.store else { return Ok(()) };
        let mut problems = Vec::new();
        for (index, file) in files.iter().enumerate() {
            problems.extend(file.picture(self.alpha()).err().map(|error| error.to_string()));
            progress(index + 1, files.len());
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::Several { place: "pictures".into(), problems }),
        }
    }
}

/// The labels file: as given, else the one beside the pictures that is called alike.
fn labels_beside(images: &Path, given: Option<&Path>, guesses: &mut Vec<String>) -> Result<PathBuf> {
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    let name = images.file_name().unwrap_or_default().to_string_lossy();
    let alike = name.replace("images", "labels").replace("idx3", "idx1");
    let path = images.with_file_name(&alike);
    if alike == name || !path.is_file() {
        let message = "has no labels file that is known; set data.labels_path".into();
        return Err(Error::Data { place: images.display().to_string(), message });
    }
    guesses.push(format!("labels are read from {alike} (data.labels_path sets it)"));
    Ok(path)
}

/// Refuses labels that are not one a picture.
fn one_label_each(images: &Path, count: usize, labels: &Path, found: usize) -> Result<()> {
    if count == found {
        return Ok(());
    }
    let message =
        format!("expected one label for each of the {count} pictures in {}, found {found}", images.display());
    Err(Error::Data { place: labels.display().to_string(), message })
}
