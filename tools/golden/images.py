"""Pictures of many kinds, and the pixel values that the image processors of `transformers` make of them.

A picture is read as the pipelines read it: turned as its EXIF data say, then `convert("RGB")` of Pillow. `pil` is the
processor that resizes with Pillow, in bytes; `torchvision` the one that `transformers` prefers where `torchvision` is
there, which differs in the last digits.
"""

import io

import numpy as np
import transformers as tf
from PIL import Image
from transformers.image_utils import load_image

from common import GOLDEN, fresh, rng, write_json, write_tensors

HALF = dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
SCALED = dict(do_rescale=True, rescale_factor=1 / 255)
SQUARE = dict(do_resize=True, size={"height": 16, "width": 16})
EDGE = dict(do_resize=True, size={"shortest_edge": 11}, do_convert_rgb=True)
CROP = dict(do_center_crop=True, crop_size={"height": 8, "width": 9})
# name -> class, settings of preprocessor_config.json
PROCESSORS = {
    "vit": ("ViTImageProcessor", dict(SQUARE, **SCALED, **HALF, do_normalize=True, resample=2)),
    "vit_older": ("ViTImageProcessor", dict(HALF, do_resize=True, size=16, do_normalize=True, resample=2)),
    "vit_bicubic": ("ViTImageProcessor", dict(SCALED, **IMAGENET, do_resize=True, size={"height": 9, "width": 20}, do_normalize=True, resample=3)),
    "vit_plain": ("ViTImageProcessor", dict(SQUARE, do_rescale=True, rescale_factor=1 / 127.5, do_normalize=False, resample=3)),
    "vit_lanczos": ("ViTImageProcessor", dict(SQUARE, **SCALED, **HALF, do_normalize=True, resample=1)),
    "deit": ("DeiTImageProcessor", dict(SCALED, **IMAGENET, **CROP, do_resize=True, size={"height": 12, "width": 12}, do_normalize=True, resample=3)),
    "bit": ("BitImageProcessor", dict(EDGE, **SCALED, **IMAGENET, **CROP, do_normalize=True, resample=3)),
    "bit_wide_crop": ("BitImageProcessor", dict(EDGE, **SCALED, **IMAGENET, do_center_crop=True, crop_size={"height": 14, "width": 15},
                                                do_normalize=True, resample=2)),
    "bit_edge": ("BitImageProcessor", dict(EDGE, **SCALED, **HALF, do_center_crop=False, do_normalize=True, resample=2)),
}


def field(name, height, width, channels):
    """Smooth waves with some noise, in [0, 1]."""
    g = rng("image", name)
    y, x = np.mgrid[0:height, 0:width]
    waves = [sum(g.uniform(0.3, 1) * np.cos(g.uniform(-0.4, 0.4) * y + g.uniform(-0.4, 0.4) * x + g.uniform(0, 6)) for _ in range(4))
             for _ in range(channels)]
    values = np.stack(waves, -1) / 5 + 0.5 + g.normal(0, 0.06, (height, width, channels))
    return np.clip(values, 0, 1)


def of_bytes(name, height, width, mode):
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.round(field(name, height, width, channels) * 255).astype(np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values, mode)


def turned(orientation=6):
    """EXIF data; the usual orientation shows the picture a quarter turn to the right."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def late(data):
    """A PNG whose EXIF chunk comes behind the picture, where some programs put it."""
    at, chunks = 8, []
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        chunks.append(data[at:end])
        at = end
    exif = [chunk for chunk in chunks if chunk[4:8] == b"eXIf"]
    rest = [chunk for chunk in chunks if chunk[4:8] != b"eXIf"]
    return data[:8] + b"".join(rest[:-1] + exif + rest[-1:])


# file -> picture, options of writing
PICTURES = {
    "rgb.png": lambda n: (of_bytes(n, 29, 37, "RGB"), {}),
    "wide.png": lambda n: (of_bytes(n, 5, 67, "RGB"), {}),
    "tall.png": lambda n: (of_bytes(n, 43, 3, "RGB"), {}),
    "dot.png": lambda n: (of_bytes(n, 1, 1, "RGB"), {}),
    "same.png": lambda n: (of_bytes(n, 16, 16, "RGB"), {}),
    "grey.png": lambda n: (of_bytes(n, 31, 20, "L"), {}),
    "grey_alpha.png": lambda n: (of_bytes(n, 13, 17, "LA"), {}),
    "rgba.png": lambda n: (of_bytes(n, 19, 23, "RGBA"), {}),
    "palette.png": lambda n: (of_bytes(n, 21, 26, "RGB").quantize(16), {"transparency": 3}),
    "bits.png": lambda n: (of_bytes(n, 18, 27, "L").convert("1"), {}),
    "grey16.png": lambda n: (Image.fromarray(np.round(field(n, 24, 21, 1)[..., 0] * 65535).astype(np.uint16)), {}),
    "photo.jpg": lambda n: (of_bytes(n, 41, 50, "RGB"), dict(quality=85)),
    "full_colour.jpg": lambda n: (of_bytes(n, 24, 33, "RGB"), dict(quality=95, subsampling=0)),
    "progressive.jpg": lambda n: (of_bytes(n, 35, 22, "RGB"), dict(quality=80, progressive=True)),
    "grey.jpg": lambda n: (of_bytes(n, 25, 30, "L"), dict(quality=90)),
    "turned.jpg": lambda n: (of_bytes(n, 21, 34, "RGB"), dict(quality=90, exif=turned())),
    "turned.png": lambda n: (of_bytes(n, 11, 18, "RGB"), dict(exif=turned())),
    "turned_late.png": lambda n: (of_bytes(n, 15, 10, "RGBA"), dict(exif=turned(7))),
}


def write_pictures(out):
    """The files, and their bytes as RGB [height, width, 3]."""
    for name, make_picture in PICTURES.items():
        picture, options = make_picture(name)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG" if name.endswith("jpg") else "PNG", **options)
        data = buffer.getvalue()
        (out / name).write_bytes(late(data) if "late" in name else data)
    return {name: load_image(str(out / name)) for name in PICTURES}


def pixels(cls, folder, images):
    processor = getattr(tf, cls).from_pretrained(folder)
    return {name: processor(images=image, return_tensors="np")["pixel_values"][0].astype(np.float32) for name, image in images.items()}


def make():
    out = fresh(GOLDEN / "images")
    images = write_pictures(fresh(out / "pictures"))
    write_tensors(out / "rgb.safetensors", {name: np.array(image) for name, image in images.items()})
    for name, (cls, settings) in PROCESSORS.items():
        folder = fresh(out / "processors" / name)
        kind = {"feature_extractor_type": "ViTFeatureExtractor"} if name.endswith("older") else {"image_processor_type": cls}
        write_json(folder / "preprocessor_config.json", {**kind, **settings})
        pil = pixels(cls + "Pil", folder, images)
        write_tensors(folder / "pil.safetensors", pil)
        line = f"{name}: {sorted({v.shape for v in pil.values()})[:3]}"
        if settings["resample"] != 1:  # not of torchvision
            fast = pixels(cls, folder, images)
            write_tensors(folder / "torchvision.safetensors", fast)
            line += f", torchvision differs by {max(float(np.abs(fast[k] - pil[k]).max()) for k in pil):.3f}"
        print(line, flush=True)
