"""Writes the pictures beside this file and what `transformers` makes of them.

    python crates/data/tests/pictures/make.py [MANY DIR]

Made with transformers 5.23.0, Pillow 13.0.0 (libjpeg-turbo 6.2 interface) and numpy 2.4.6. `cases.json` holds picture,
channels, settings and shape of each case, and the step that one level of 255 makes in it; `expected.bin` the values of all cases one after another, f32 little-endian.
With MANY and DIR so many random cases are written there instead, for the test built with ENGRAFT_PICTURES=DIR.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

CLASSES = {"ViT": ViTImageProcessorPil, "DeiT": DeiTImageProcessorPil, "Bit": BitImageProcessorPil}
rng = np.random.default_rng(7)


def waves(height, width, channels=3):
    """Smooth colours with noise on top: like a photograph, so that JPEG has something to do."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 100 * np.sin(x / 5 + c) + 40 * np.cos(y / (3 + c)) for c in range(channels)]
    levels = np.stack(planes, -1) + rng.normal(0, 15, (height, width, channels))
    return np.clip(levels, 0, 255).astype(np.uint8)


def pictures(directory, sizes):
    """Every kind of file at every size."""
    for height, width in sizes:
        name = f"{width}x{height}"
        rgb = Image.fromarray(waves(height, width))
        grey = Image.fromarray(waves(height, width, 1)[..., 0])
        alpha = Image.fromarray(waves(height, width, 1)[..., 0])
        rgb.save(directory / f"rgb_{name}.png")
        grey.save(directory / f"grey_{name}.png")
        grey.point(lambda level: 255 * (level > 127)).convert("1").save(directory / f"bits_{name}.png")
        palette = rgb.quantize(13)
        palette.save(directory / f"palette_{name}.png")
        palette.save(directory / f"clear_{name}.png", transparency=3)
        rgb.putalpha(alpha)
        rgb.save(directory / f"rgba_{name}.png")
        la = grey.copy()
        la.putalpha(alpha)
        la.save(directory / f"la_{name}.png")
        rgb = rgb.convert("RGB")
        grey.save(directory / f"grey_{name}.jpg", quality=80)
        rgb.convert("CMYK").save(directory / f"inks_{name}.jpg", quality=80)
        for subsampling, kind in enumerate(["444", "422", "420"]):
            rgb.save(directory / f"{kind}_{name}.jpg", quality=85, subsampling=subsampling)
            rgb.save(
                directory / f"steps{kind}_{name}.jpg", quality=60, subsampling=subsampling, progressive=True,
                restart_marker_blocks=3 if kind == "422" else 0,
            )


def expected(path, channels, kind, settings):
    processor = CLASSES[kind](**settings)
    image = Image.open(path)
    if not processor.do_convert_rgb:
        image = image.convert("RGB" if channels == 3 else "L")
    values = processor(images=image, return_tensors="np")["pixel_values"][0]
    step = processor.rescale_factor if processor.do_rescale else 1
    step = step / max(processor.image_std) if processor.do_normalize else step
    return np.ascontiguousarray(values, dtype="<f4"), step


def write(directory, cases):
    listed, values = [], []
    for path, channels, kind, settings in cases:
        found, step = expected(path, channels, kind, settings)
        settings = {**settings, "image_processor_type": f"{kind}ImageProcessor"}
        listed.append({"picture": path.name, "channels": channels, "shape": found.shape, "step": step, "settings": settings})
        values.append(found.ravel())
    (directory / "cases.json").write_text(",\n".join(map(json.dumps, listed)).join(["[\n", "\n]\n"]))
    np.concatenate(values).tofile(directory / "expected.bin")


def small(directory):
    for old in (directory / "all").iterdir():
        old.unlink()
    pictures(directory / "all", [(9, 13)])
    Image.fromarray(waves(1, 1)).save(directory / "all" / "rgb_1x1.png")
    grey = {"do_convert_rgb": False, "image_mean": [0.1307], "image_std": [0.3081]}
    cases = []
    for path in sorted((directory / "all").iterdir()):
        size = {"size": {"height": 7, "width": 5}, "do_normalize": False}
        cases.append((path, 3, "ViT", size))
        if path.name.startswith(("rgb", "palette", "la")):
            cases.append((path, 1, "ViT", {"size": {"height": 4, "width": 6}, **grey}))
    rgb = directory / "all" / "rgb_13x9.png"
    for resample in range(6):
        cases.append((rgb, 3, "ViT", {"size": {"height": 5, "width": 20}, "resample": resample}))
    for name in ["rgba", "clear", "la", "bits"]:
        path = directory / "all" / f"{name}_13x9.png"
        cases.append((path, 3, "Bit", {"size": {"shortest_edge": 9}, "crop_size": 9}))
    cases += [
        (rgb, 3, "Bit", {"size": {"shortest_edge": 6}, "crop_size": {"height": 5, "width": 5}}),
        (rgb, 3, "Bit", {"size": {"shortest_edge": 6}, "crop_size": {"height": 9, "width": 12}}),
        (rgb, 3, "Bit", {"size": {"shortest_edge": 12, "longest_edge": 14}, "do_center_crop": False}),
        (rgb, 3, "DeiT", {"size": 8, "crop_size": 7, "rescale_factor": 0.01}),
        (rgb, 3, "ViT", {"do_resize": False, "do_rescale": False, "image_mean": [3, 4, 5], "image_std": [2, 3, 4]}),
    ]
    write(directory, cases)


def many(directory, count):
    (directory / "all").mkdir(parents=True, exist_ok=True)
    sizes = [(1, 1), (1, 9), (17, 2), (3, 3), (16, 16), (33, 47), (64, 40), (120, 77), (181, 233)]
    pictures(directory / "all", sizes)
    paths = sorted((directory / "all").iterdir())
    draw = random.Random(5)
    cases = []
    for _ in range(count):
        kind, channels = draw.choice(list(CLASSES)), draw.choice([1, 3, 3])
        settings = {"resample": draw.randrange(6), "do_convert_rgb": channels == 3}
        edges = [draw.randint(1, 60) for _ in range(4)]
        short = {"shortest_edge": edges[0]}
        settings["size"] = draw.choice(
            [{"height": edges[0], "width": edges[1]}, short, {**short, "longest_edge": edges[0] + edges[1]}]
        )
        settings["do_center_crop"] = draw.random() < 0.6 or "height" not in settings["size"]
        settings["crop_size"] = {"height": edges[2], "width": edges[3]}
        if channels == 1:
            settings |= {"image_mean": [0.3], "image_std": [0.2]}
        cases.append((draw.choice(paths), channels, kind, settings))
    write(directory, cases)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        many(Path(sys.argv[2]), int(sys.argv[1]))
    else:
        small(Path(__file__).parent)
