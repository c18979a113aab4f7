use std::path::Path;

use super::*;
use crate::read::{Format, Need, ReadOptions, read};
use crate::rng::Random;
use crate::testing::{damaged, shared};

const DIGIT: PictureModel = PictureModel { model_type: "vit", channels: 1 };
const COLOUR: PictureModel = PictureModel { model_type: "vit", channels: 3 };

fn pictures() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/all")
}

fn processor(settings: serde_json::Value, model: PictureModel) -> Processor {
    Processor::from_json("preprocessor_config.json", &settings, model).unwrap()
}

/// Levels as they are, divided by 255.
fn plain(model: PictureModel) -> Processor {
    processor(serde_json::json!({"do_resize": false, "do_normalize": false}), model)
}

fn problems(settings: serde_json::Value, model: PictureModel) -> String {
    Processor::from_json("p.json", &settings, model).unwrap_err().to_string()
}

#[test]
fn every_wrong_setting_is_named() {
    let wrong = serde_json::json!({
        "do_resize": "yes", "size": {"height": 0, "width": 4}, "resample": 9, "image_mean": [0.5], "image_std": [1, 0, 1],
        "rescale_factor": -1, "do_pad": true, "do_centre_crop": true, "crop_size": {"height": 3}, "do_center_crop": true,
        "data_format": "channels_last", "pad_size": null,
    });
    let text = problems(wrong, COLOUR);
    for part in [
        "p.json: 10 problems",
        "`do_resize` is expected to be true or false, found \"yes\"",
        "`size` is expected to be {height, width}",
        "0 (nearest), 1 (Lanczos)",
        "found 9",
        "`image_mean` has 1 values, the model reads 3 channels",
        "`image_std` holds 0",
        "`rescale_factor` is expected to be a number above 0, found -1",
        "`do_pad` is not a known setting",
        "`do_centre_crop` is not a known setting; did you mean `do_center_crop`?",
        "`crop_size` is expected",
        "`data_format` is expected to be `channels_first`",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let unknown = problems(serde_json::json!({"image_processor_type": "SamImageProcessor"}), COLOUR);
    assert!(unknown.contains("`SamImageProcessor`, which is not read; those of ViT"), "{unknown}");
    let model = PictureModel { model_type: "swin", channels: 3 };
    assert!(problems(serde_json::json!({}), model).contains("the model type `swin` has no usual one"));
    let grey = PictureModel { model_type: "dinov2", channels: 1 };
    assert!(problems(serde_json::json!({}), grey).contains("`do_convert_rgb` makes three channels"));
    assert!(problems(serde_json::json!([]), COLOUR).contains("expected an object of settings, found a list"));
}

#[test]
fn old_and_new_forms_mean_the_same() {
    let old = serde_json::json!({"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2,
        "do_resize": true, "do_normalize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]});
    let new = serde_json::json!({"image_processor_type": "ViTImageProcessorFast", "size": {"height": 32, "width": 32},
        "do_pad": null, "do_convert_rgb": null, "processor_class": "x"});
    assert_eq!(processor(old, COLOUR), processor(new, COLOUR));
    let dino = PictureModel { model_type: "dinov2", channels: 3 };
    let usual = processor(serde_json::json!({}), dino);
    assert_eq!((usual.fixed_size(), usual.output_size(300, 400)), (Some((224, 224)), Ok((224, 224))));
    let free = processor(serde_json::json!({"do_center_crop": false}), dino);
    assert_eq!((free.fixed_size(), free.output_size(300, 400)), (None, Ok((224, 298))));
    assert!(free.output_size(1, 16_384).unwrap_err().contains("may have 16384 points"));
}

#[test]
fn folders_are_classes_and_all_mistakes_are_said_at_once() {
    let home = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let path = home.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    };
    let (png, jpg) = (
        std::fs::read(pictures().join("rgb_1x1.png")).unwrap(),
        std::fs::read(pictures().join("420_13x9.jpg")).unwrap(),
    );
    put("cat/b.png", &png);
    put("cat/a.JPG", &jpg);
    put("bird/x.jpeg", &png);
    put("bird/notes.txt", b"x");
    put(".hidden/x.png", b"x");
    put("README.md", b"x");
    let fixed = || processor(serde_json::json!({"size": 2}), COLOUR);
    let data = read_images(ImageSource::Folder(home.path()), fixed(), None).unwrap();
    let images = data.images.clone().unwrap();
    assert_eq!(data.labels.as_deref().unwrap(), ["bird", "cat"]);
    let classes: Vec<&Labels> = data.examples.iter().map(|example| &example.labels).collect();
    assert_eq!(classes, [&Labels::Class(0), &Labels::Class(1), &Labels::Class(1)]);
    assert!(
        images.name(1).ends_with("cat/a.JPG") && data.report.guesses[0].starts_with("2 files"),
        "{data:?}"
    );
    assert_eq!(
        (images.shape().unwrap(), images.pixels(0).unwrap().len(), data.report.duplicates),
        ([3, 2, 2], 12, 0)
    );
    images.check(&mut |_, _| {}).unwrap();
    let uneven = read_images(ImageSource::Folder(home.path()), plain(COLOUR), None).unwrap().images.unwrap();
    assert!(uneven.shape().unwrap_err().to_string().contains("becomes 13 by 9 wide and high"));
    let known = Some(vec!["cat".into(), "dog".into()]);
    let error = read_images(ImageSource::Folder(home.path()), fixed(), known).unwrap_err().to_string();
    assert!(error.contains("there is no label `bird`"), "{error}");

    put("cat/broken.png", &png[..20]);
    put("cat/fake.png", b"GIF89a");
    put("cat/c.webp", b"x");
    put("cat/inner/d.png", &png);
    put("loose.png", &png);
    std::fs::create_dir(home.path().join("empty")).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", home.path().join("cat/link.png")).unwrap();
    std::os::unix::fs::symlink("b.png", home.path().join("cat/near.png")).unwrap();
    let error = read_images(ImageSource::Folder(home.path()), fixed(), None).unwrap_err().to_string();
    for part in [
        "7 problems",
        "cat/broken.png is a PNG without its header",
        "cat/fake.png expected a PNG or JPEG, found a GIF",
        "cat/c.webp is neither PNG nor JPEG",
        "cat/inner is a folder inside a class",
        "loose.png lies beside the folders",
        "the folder empty holds no PNG",
        "cat/link.png is a link to /etc/hostname, outside",
    ] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
}

#[test]
fn tables_name_files_beneath_them() {
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join("p")).unwrap();
    std::fs::copy(pictures().join("la_13x9.png"), home.path().join("p/1.png")).unwrap();
    let table = home.path().join("t.csv");
    let options = ReadOptions::new(Format::Csv, Need::Image);
    std::fs::write(&table, "file_name,label\np/1.png,10\np/1.png,9\n").unwrap();
    let rows = read(&table, &options).unwrap();
    let data = read_images(ImageSource::Rows(&rows), plain(DIGIT), None).unwrap();
    assert_eq!((data.labels.unwrap(), data.examples[0].row), (vec!["9".to_string(), "10".into()], 2));
    assert_eq!(data.images.unwrap().size(1), (9, 13));
    std::fs::write(&table, "image,label\n/etc/hostname,a\n../t.csv,a\np,a\nnone.png,a\nt.csv,a\n").unwrap();
    let rows = read(&table, &options).unwrap();
    let error = read_images(ImageSource::Rows(&rows), plain(DIGIT), None).unwrap_err().to_string();
    for part in [
        "line 2: /etc/hostname is not a path beneath",
        "line 3: ../t.csv is not a path",
        "line 4: p is not a regular",
        "line 5: none.png does not exist",
        "line 6: t.csv expected a PNG or JPEG, found something else",
    ] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    std::fs::write(&table, "image,label\np/1.png,\n").unwrap();
    assert!(read(&table, &options).unwrap_err().to_string().contains("t.csv:2: the label is empty"));
}

fn idx(kind: u8, sizes: &[u32], values: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, kind, sizes.len() as u8];
    sizes.iter().for_each(|size| bytes.extend(size.to_be_bytes()));
    bytes.extend(values);
    bytes
}

fn npy(kind: &str, shape: &str, values: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(values);
    bytes
}

#[test]
fn idx_and_npy_hold_pictures_with_numbers_as_classes() {
    let home = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: Vec<u8>| {
        std::fs::write(home.path().join(name), bytes).unwrap();
        home.path().join(name)
    };
    let images = put("x-images-idx3-ubyte", idx(8, &[2, 1, 2], &[0, 255, 51, 102]));
    let source = ImageSource::Idx { images: &images, labels: None };
    let error = read_images(source, plain(DIGIT), None).unwrap_err().to_string();
    assert!(error.contains("set data.labels_path"), "{error}");
    let labels = put("x-labels-idx1-ubyte", idx(8, &[2], &[3, 1]));
    let data = read_images(source, plain(DIGIT), None).unwrap();
    assert_eq!(
        (data.labels.unwrap(), &data.examples[0].labels),
        (["0", "1", "2", "3"].map(String::from).to_vec(), &Labels::Class(3))
    );
    assert_eq!(data.images.unwrap().pixels(1).unwrap(), [0.2, 0.4]);
    assert!(data.report.guesses[0].contains("x-labels-idx1-ubyte"));
    let few = Some(vec!["T-shirt".into(), "coat".into()]);
    let error = read_images(source, plain(DIGIT), few).unwrap_err().to_string();
    assert!(error.contains("picture 0 has the label 3; there are 2 classes, counted from 0"), "{error}");
    let floats: Vec<u8> = [0f32, 1.0, 0.2, 0.4].iter().flat_map(|value| value.to_le_bytes()).collect();
    let array = put("x.npy", npy("<f4", "(2, 1, 2, 1)", &floats));
    let classes = put("y.npy", npy(">i2", "(2,)", &[0, 1, 0, 0]));
    let source = ImageSource::Npy { images: &array, labels: Some(&classes) };
    let data = read_images(source, plain(DIGIT), None).unwrap();
    assert_eq!(
        (&data.examples[0].labels, data.images.unwrap().pixels(1).unwrap()),
        (&Labels::Class(1), vec![0.2, 0.4])
    );

    let message = |source: ImageSource| read_images(source, plain(DIGIT), None).unwrap_err().to_string();
    let idx_of =
        |bytes: Vec<u8>| message(ImageSource::Idx { images: &put("a", bytes), labels: Some(&labels) });
    assert!(idx_of(idx(8, &[2, 1, 2], &[0; 3])).contains("expected 4 values for [2, 1, 2], found 3"));
    assert!(idx_of(idx(8, &[2, 1, 2], &[0; 5])).contains("found more"));
    assert!(idx_of(idx(13, &[2, 1, 2], &[0; 16])).contains("found type 0x0d and 3 dimensions"));
    assert!(idx_of(idx(8, &[u32::MAX, u32::MAX, u32::MAX], &[])).contains("more than"));
    assert!(idx_of(idx(8, &[3, 1, 1], &[0; 3])).contains("expected one label for each of the 3 pictures"));
    assert!(idx_of(vec![1, 2]).contains("is not an IDX file"));
    let npy_of =
        |bytes: Vec<u8>| message(ImageSource::Npy { images: &put("a.npy", bytes), labels: Some(&classes) });
    assert!(npy_of(npy("|u1", "(2, 3, 4, 4)", &[0; 96])).contains("found [2, 3, 4, 4]; transpose"));
    assert!(npy_of(npy("<f8", "(2, 1, 1)", &[0; 16])).contains("pictures are uint8 or float32"));
    assert!(npy_of(npy("<f4", "(2, 1, 1)", &[0, 0, 128, 191, 0, 0, 0, 0])).contains("found -1 to 0"));
    assert!(npy_of(npy("<f4", "(2, 1, 1)", &[255; 8])).contains("expected floats from 0 to 1"));
    assert!(npy_of(npy("|u1", "(99999999999, 99999999999, 9)", &[])).contains("more than"));
    assert!(npy_of(npy("|O", "(2, 1, 1)", &[])).contains("type `|O`"));
    let source =
        ImageSource::Npy { images: &array, labels: Some(&put("n.npy", npy("|i1", "(2,)", &[255, 0]))) };
    assert!(message(source).contains("label 0 is -1"));
}

#[test]
fn damaged_pictures_are_errors_that_name_them() {
    let mut random = Random::new(9, 0, 0);
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("c/x.png");
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    for entry in std::fs::read_dir(pictures()).unwrap() {
        let whole = std::fs::read(entry.unwrap().path()).unwrap();
        // A cut file is never taken for a whole one.
        for end in [whole.len() / 3, whole.len() / 2, whole.len() - 3] {
            assert!(decode::picture(&whole[..end], Alpha::Dropped).is_err(), "{end} of {}", whole.len());
        }
        for _ in 0..1250 {
            let words: [&[u8]; 4] = [b"\xFF\xDA", b"\xFF\xC2", b"\xFF\xFF\xFF\xFF", b"IHDR"];
            let bytes = damaged(&whole, &words, &mut random);
            let _ = decode::picture(&bytes, Alpha::OnWhite);
        }
        // What only shows when it is decoded is found by `check`.
        let mut late = whole.clone();
        let middle = late.len() * 2 / 3;
        late.truncate(middle);
        std::fs::write(&path, late).unwrap();
        if let Ok(data) = read_images(ImageSource::Folder(home.path()), plain(COLOUR), None) {
            let error = data.images.unwrap().check(&mut |_, _| {}).unwrap_err().to_string();
            assert!(error.contains("c/x.png"), "{error}");
        }
    }
}

#[test]
fn sizes_beyond_the_limits_are_refused_before_decoding() {
    let mut png = std::fs::read(pictures().join("rgb_1x1.png")).unwrap();
    png[16..24].copy_from_slice(&[0, 0, 0xEA, 0x60, 0, 0, 0xEA, 0x60]);
    assert!(decode::size(&png).unwrap_err().contains("is 60000 wide and 60000 high; a side may have 16384"));
    png[16..24].copy_from_slice(&[0, 0, 0x40, 0, 0, 0, 0x40, 0]);
    assert!(
        decode::picture(&png, Alpha::Dropped)
            .unwrap_err()
            .contains("268435456 points; a picture may have 64000000")
    );
    png[16..24].copy_from_slice(&[0, 0, 0x1F, 0x40, 0, 0, 0x1F, 0x40]);
    assert!(decode::size(&png).is_ok());
    assert!(decode::picture(&png, Alpha::Dropped).is_err(), "64 million points cannot come from a few bytes");
    png[16..24].fill(0);
    assert!(decode::size(&png).unwrap_err().contains("at least one point"));
    let mut jpg = std::fs::read(pictures().join("420_13x9.jpg")).unwrap();
    let frame = jpg.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    jpg[frame + 5..frame + 9].copy_from_slice(&[0x1F, 0x40, 0x1F, 0x40]);
    assert!(decode::picture(&jpg, Alpha::Dropped).unwrap_err().contains("ends in the middle"));
}

#[test]
fn mnist_reads_as_it_is() {
    let Some(images) = shared("mnist/t10k-images-idx3-ubyte.gz") else { return };
    let data = read_images(ImageSource::Idx { images: &images, labels: None }, plain(DIGIT), None).unwrap();
    let pictures = data.images.unwrap();
    assert_eq!(
        (pictures.len(), pictures.shape().unwrap(), data.labels.unwrap().len()),
        (10_000, [1, 28, 28], 10)
    );
    let first: Vec<&Labels> = data.examples[..4].iter().map(|example| &example.labels).collect();
    assert_eq!(first, [&Labels::Class(7), &Labels::Class(2), &Labels::Class(1), &Labels::Class(0)]);
    let mean =
        (0..10_000).map(|i| pictures.pixels(i).unwrap().iter().sum::<f32>() as f64 / 784.0).sum::<f64>()
            / 1e4;
    assert!((mean - 0.1325).abs() < 1e-4, "the known mean of the test pictures, found {mean}");
}
