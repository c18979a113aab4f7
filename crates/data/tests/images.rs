//! Pictures as `transformers` reads them; `pictures/make.py` says how the cases were made.

use std::path::{Path, PathBuf};

use engraft_data::{ImageSource, PictureModel, Processor, read_images};
use serde_json::Value;

/// The largest difference in levels, and the case it is in.
fn largest(dir: &Path) -> (f32, String) {
    let cases: Value = serde_json::from_slice(&std::fs::read(dir.join("cases.json")).unwrap()).unwrap();
    let bytes = std::fs::read(dir.join("expected.bin")).unwrap();
    let mut values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let mut worst = (0.0, String::new());
    for case in cases.as_array().unwrap() {
        let channels = case["channels"].as_u64().unwrap() as usize;
        let model = PictureModel { model_type: "vit", channels };
        let processor =
            Processor::from_json("case", &case["settings"], model).unwrap_or_else(|e| panic!("{case}: {e}"));
        let images = read_images(ImageSource::Folder(dir), processor, None).unwrap().images.unwrap();
        let index = (0..images.len())
            .find(|i| images.name(*i).ends_with(&format!("/{}", case["picture"].as_str().unwrap())));
        let index = index.unwrap();
        let shape: Vec<usize> = serde_json::from_value(case["shape"].clone()).unwrap();
        assert_eq!(images.size(index), (shape[1], shape[2]), "{case}");
        let found = images.pixels(index).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(found.len(), shape.iter().product::<usize>(), "{case}");
        let step = case["step"].as_f64().unwrap() as f32;
        for (found, expected) in found.iter().zip(&mut values) {
            let levels = (found - expected).abs() / step;
            if levels > worst.0 {
                worst = (levels, case.to_string());
            }
        }
    }
    assert_eq!(values.next(), None, "more values than cases");
    worst
}

#[test]
fn pictures_are_those_of_transformers() {
    // A folder with more cases, made by `make.py MANY DIR`, can be named when this is built.
    let dir = option_env!("ENGRAFT_PICTURES").unwrap_or("tests/pictures");
    let (levels, case) = largest(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(dir));
    // Not one level differs; what is left is the rounding of the last division.
    assert!(levels < 1e-3, "{levels} levels: {case}");
}
