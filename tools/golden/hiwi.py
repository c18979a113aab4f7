"""HiWi (Liao, Meng and Monz, ACL 2023, arXiv:2305.16742): a PyTorch transcription of its definition.

A bottleneck works on the parameters themselves: b' = b + U f(D b) for a bias, W' = W + f(W D^T) U^T for the rows of a
weight. The adapter file holds `base_model.model.<path>.hiwi_down.weight` (D) and `hiwi_up.weight` (U), beside an
`adapter_config.json` in `peft`'s form whose `peft_type` is `ENGRAFT_HIWI`.
"""

import copy
import tempfile

import torch
import transformers
from torch.nn.utils import parametrize

import zoo
from batches import batches
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of,
                    write_json, write_logits, write_tensors)
from training import trajectory, well_posed

PREFIX = "base_model.model."
ACTIVATIONS = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu, "tanh": torch.tanh}
# model, variant, suffixes of the targets, what it works on, rank, activation, what it checks
TABLE = [
    ("bert", None, ["intermediate.dense", "output.dense"], "bias", 6, "relu", "biases of both layers of the MLP"),
    ("bert", "weight", ["query", "value"], "weight", 3, "gelu", "rows of weights"),
    ("llama", "weight", ["q_proj", "down_proj"], "weight", 4, "tanh", "layers without biases"),
    ("llama_bias", None, ["up_proj", "down_proj"], "bias", 4, "silu", "biases of the MLP"),
]
TRAINED = {"bert__hiwi": ("bert", "padded", TABLE[0]), "llama__hiwi_weight": ("llama", "full", TABLE[2])}


class Bottleneck(torch.nn.Module):
    def __init__(self, n, rank, activation):
        super().__init__()
        self.down, self.up = torch.nn.Linear(n, rank, bias=False), torch.nn.Linear(rank, n, bias=False)
        self.f = ACTIVATIONS[activation]

    def forward(self, rows):
        return rows + self.up(self.f(self.down(rows)))


def attach(model, row, name):
    """Puts a filled bottleneck on every target and freezes the rest."""
    _, _, suffixes, of, rank, activation, _ = row
    model.requires_grad_(False)
    for path, m in list(model.named_modules()):
        if isinstance(m, torch.nn.Linear) and any(path == s or path.endswith("." + s) for s in suffixes):
            b = Bottleneck(getattr(m, of).shape[-1], rank, activation)
            for part, layer in (("down", b.down), ("up", b.up)):
                draw = rng("adapter", name, f"{path}.{part}").uniform(-0.5, 0.5, tuple(layer.weight.shape))
                layer.weight.data = torch.from_numpy(draw).float()
            parametrize.register_parametrization(m, of, b)
    return model


def own(model, of):
    """The bottlenecks' tensors by their names in the file."""
    found = {}
    for key, p in model.named_parameters():
        if p.requires_grad:
            found[PREFIX + key.replace(f"parametrizations.{of}.0.down", "hiwi_down").replace(f"parametrizations.{of}.0.up", "hiwi_up")] = p
    return found


def save(model, path, row, task):
    base, _, suffixes, of, rank, activation, _ = row
    path.mkdir(parents=True)
    write_tensors(path / "adapter_model.safetensors", own(model, of))
    write_json(path / "adapter_config.json", {
        "peft_type": "ENGRAFT_HIWI", "task_type": task, "target_modules": suffixes, "modules_to_save": None, "rank": rank, "of": of,
        "activation": activation, "base_model_name_or_path": f"models/{base}", "inference_mode": True})


def folded(model, of):
    """The model with its changed numbers in place and nothing on them."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, torch.nn.Linear) and parametrize.is_parametrized(m):
            parametrize.remove_parametrizations(m, of, leave_parametrized=True)
    return model


def write_case(row):
    from cases import task_of
    base, variant, _, of, _, _, checks = row
    name = f"{base}__hiwi" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    before = tensors_of(INPUTS / base / "base_logits.safetensors")["logits"]
    model = attach(zoo.load(base), row, name)
    logits, rel = forward_both(model, inputs)
    save(model, out / "adapter", row, task_of(base))
    keep = logits_mask(logits, inputs).bool()
    with tempfile.TemporaryDirectory() as d:
        plain = folded(model, of)
        plain.save_pretrained(d)
        whole = forward(type(plain).from_pretrained(d, attn_implementation="eager"), inputs)
    whole[~keep] = 0.0
    meta = {"case": name, "model": base, "method": "hiwi", "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": True, "tolerance": TOLERANCE, "merge_tolerance": TOLERANCE, "num_virtual_tokens": 0, "inputs": None,
            "effect_rel": relative(logits, before), "transcription": "tools/golden/hiwi.py", "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "merge_rel": relative(whole[keep], logits[keep])}}
    assert rel < 1e-5 and meta["self_check"]["merge_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_logits(out / "merged_logits.safetensors", whole, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def attempt(name, out, salt):
    from cases import task_of
    model, kind, row = TRAINED[name]
    data = batches(name + salt, model, kind, 16)
    m = attach(zoo.load(model), row, "trajectory/" + name)
    save(m, out / "init_adapter", row, task_of(model))
    expected = trajectory(m, data, zoo.is_causal(model))
    if not well_posed(expected):
        return False
    save(m, out / "final_adapter", row, task_of(model))
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": model, "method": "hiwi", "notes": None,
                                       "transcription": "tools/golden/hiwi.py", "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    for row in TABLE:
        write_case(row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
