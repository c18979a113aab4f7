"""Tiny image classifiers: ViT, DeiT (with a second token) and DINOv2 (scaled layers, positions that stretch).

`transformers` 5 calls the modules otherwise (`layers.0.attention.q_proj`) than the files (`encoder.layer.0.attention.
attention.query`): models are in the files' names, adapters of `peft` in the modules'.
"""

import torch

from common import rng
from spec import spec

VIT = dict(image_size=12, patch_size=4, num_channels=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
           intermediate_size=52, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
DINO = {k: v for k, v in dict(VIT, mlp_ratio=2, num_labels=4).items() if k != "intermediate_size"}


def draw(key, shape, unit):
    if key.endswith("projection.weight"):
        return unit * (shape[1] * shape[2] * shape[3]) ** -0.5
    if key.endswith("_token"):
        return 0.5 * unit
    if "lambda1" in key:
        return 0.7 + 0.3 * unit
    return None


def batch(name, s, suffix):
    """Three images of the trained size, or (`_size`) of another one."""
    c = s["settings"]
    size = s["size"] if suffix else c["image_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    g = rng("inputs", name, suffix)
    out = {"pixel_values": torch.from_numpy(g.standard_normal((3, c["num_channels"], height, width))).float()}
    if "Teacher" not in s["cls"]:
        out["labels"] = torch.from_numpy(g.integers(0, c["num_labels"], 3))
    return out


def rows(name, s, count):
    """Random images for training, with a label each."""
    c = s["settings"]
    g = rng("batches", name)
    shape = (count, c["num_channels"], c["image_size"], c["image_size"])
    return {"pixel_values": torch.from_numpy(g.standard_normal(shape)).float(),
            "labels": torch.from_numpy(g.integers(0, c["num_labels"], count))}


def vit(cls, settings, **family):
    return spec(cls, settings, draw=draw, batch=batch, rows=rows, sides=("", "_size") if "size" in family else ("",), **family)


TABLE = {
    "vit": vit("ViTForImageClassification", VIT),
    "vit_grey": vit("ViTForImageClassification", dict(VIT, num_channels=1, image_size=6, patch_size=2, qkv_bias=False,
                                                      hidden_size=24, num_attention_heads=2, num_labels=3)),
    "vit_oblong": vit("ViTForImageClassification", dict(VIT, image_size=[9, 23], patch_size=[4, 5], num_hidden_layers=1,
                                                        hidden_act="gelu_new", layer_norm_eps=1e-3)),
    "deit": vit("DeiTForImageClassification", VIT),
    "deit_teacher": vit("DeiTForImageClassificationWithTeacher", dict(VIT, num_labels=4)),
    "dinov2": vit("Dinov2ForImageClassification", DINO, size=(16, 20)),
    "dinov2_swiglu": vit("Dinov2ForImageClassification", dict(DINO, use_swiglu_ffn=True, hidden_size=24, patch_size=3,
                                                              qkv_bias=False), size=(9, 9)),
}
