"""What every group of fixtures shares: places, seeds, filling, forward passes, files.

Every random tensor is drawn from a generator seeded by the CRC-32 of its own name, so adding a fixture never
changes another one.
"""

import copy
import inspect
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
MODELS, INPUTS, CASES = GOLDEN / "models", GOLDEN / "inputs", GOLDEN / "cases"
TRAJECTORIES = GOLDEN / "trajectories"
TOLERANCE = 2e-4
PAD = 0


def rng(*names):
    """A NumPy generator that depends on the given names alone."""
    return np.random.Generator(np.random.PCG64(zlib.crc32("/".join(map(str, names)).encode())))


def fresh(path):
    """An empty folder at `path`."""
    path = Path(path)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_tensors(path, tensors):
    """Writes arrays or torch tensors, contiguous, in the order of their names."""
    out = {}
    for k in sorted(tensors):
        v = tensors[k]
        out[k] = np.ascontiguousarray(v.detach().numpy() if isinstance(v, torch.Tensor) else v)
    save_file(out, str(path))


def tensors_of(path):
    return {k: torch.from_numpy(v.copy()) for k, v in load_file(str(path)).items()}


def relative(got, want):
    """Largest difference, relative to the largest value of `want`."""
    got, want = got.double(), want.double()
    return float((got - want).abs().max() / want.abs().max())


def logits_mask(logits, inputs):
    """1 where a position of `logits` counts: real tokens (a decoder's) of a [B, T, C] output, all rows of a [B, C] one."""
    if logits.ndim == 2:
        return torch.ones(len(logits), dtype=torch.uint8)
    return inputs.get("decoder_attention_mask", inputs["attention_mask"]).to(torch.uint8)


def mean_pool(hidden, attention_mask):
    """Mean of the real tokens' states: [B, T, H], [B, T] -> [B, H]."""
    m = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * m).sum(1) / m.sum(1)


def forward(model, inputs):
    """Logits of one batch, positions of virtual tokens left out; a bare encoder gives mean-pooled states.

    The model is copied, so that a rope that grows with its input (`dynamic`) starts fresh.
    """
    model = copy.deepcopy(model).eval()
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        out = model(**inputs)
    if not hasattr(out, "logits"):
        return mean_pool(out.last_hidden_state, inputs["attention_mask"])
    logits = out.logits
    if logits.ndim == 3:
        logits = logits[:, logits.shape[1] - inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]:]
    return logits


def doubled(model):
    """A copy in f64 with `sdpa` attention (the plain one overflows to NaN there on rows that see nothing).

    T5 has no such rows, and under `transformers` 4 no such attention.
    """
    model = copy.deepcopy(model).double()
    for m in model.modules():
        if hasattr(m, "set_attn_implementation") and getattr(m, "_supports_sdpa", False):
            m.set_attn_implementation("sdpa")
            break
    return model


def forward_both(model, inputs):
    """Logits in f32, zero where the mask is zero, and the relative difference of the same pass in f64."""
    logits = forward(model, inputs)
    keep = logits_mask(logits, inputs).bool()
    logits[~keep] = 0.0
    double = forward(doubled(model), inputs)
    return logits, relative(logits[keep], double[keep])


def write_logits(path, logits, inputs, **more):
    write_tensors(path, {"logits": logits.float(), "mask": logits_mask(logits, inputs), **more})


def accepts(model, name):
    return name in inspect.signature(model.forward).parameters
