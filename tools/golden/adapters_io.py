"""Filling and saving adapters made by `peft`."""

import json

import torch

from common import rng


BOUNDS = {}  # part of a key -> `bound` of the tensors of a family that registers its own


def bound(key, p):
    """(centre kept, half width) of the uniform distribution for one adapter tensor."""
    for part, own in BOUNDS.items():
        if part in key:
            return own
    if "lora_A" in key or "lora_embedding_A" in key:
        return False, (3.0 / p.shape[1]) ** 0.5 if "lora_A" in key else 0.8
    if "prompt_encoder" in key:
        return False, 1.5
    if key.endswith("bias"):
        return "lora_B" not in key, 0.25
    if "lora_B" in key or "lora_embedding_B" in key:
        return False, 0.35
    if "ia3_l" in key:
        return None, 0.7
    return True, 0.15  # a trained copy of a base tensor


def fill_adapter(model, name):
    """Every trainable parameter, uniform, from a generator seeded by the case and the parameter."""
    for key, p in model.named_parameters():
        if not p.requires_grad:
            continue
        keep, width = bound(key, p)
        value = torch.from_numpy(rng("adapter", name, key).uniform(-width, width, tuple(p.shape))).float()
        if keep:
            value = value + p.data
        elif keep is None:
            value = value + 1.0
        p.data = value


def trainable(model):
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


def save_adapter(model, path, base, save_embedding_layers=False):
    """`save_pretrained`, with the lists of the configuration in a fixed order and no place of this machine in it."""
    model.save_pretrained(path, save_embedding_layers=save_embedding_layers)
    (path / "README.md").unlink(missing_ok=True)
    config = path / "adapter_config.json"
    c = json.loads(config.read_text())
    for k in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(c.get(k), list):
            c[k] = sorted(c[k])
    c["base_model_name_or_path"] = f"models/{base}"
    config.write_text(json.dumps(c, indent=2, sort_keys=True) + "\n")
