"""Masks of single entries, from their definitions: PyTorch's own gradients choose the places, and values there are trained.

W' = W + S, where S has values v at k fixed places; the optimizer sees v alone. Places are numbered row * in + column, through
all targets one after another where these compete (`global`), and ascend. The adapter file holds `sparse_values` and
`sparse_indices` of all targets or of each, beside an `adapter_config.json` whose `peft_type` is `ENGRAFT_<METHOD>`.

- pafi (Liao et al. 2023): the smallest |W|.           - sam_mask (Fu et al. 2023): the largest |sum of g| over batches.
- sift (Song et al. 2024): the largest |g| once.       - fish (Sung et al. 2021): the largest sum of g^2 over single rows,
- child_tuning D (Xu et al. 2021): the largest sum of    g of the log-likelihood of the row's labels.
  g^2 over the batches of one epoch.                    - random_mask (Xu and Zhang 2024): drawn from Philox 4x32-10.

`cases/` hold random values at such places; `masks/` hold whole runs from a recipe: batches, losses, the adapter at the end.
"""

import json
import tempfile

import numpy as np
import torch
import transformers
from torch.nn.utils import parametrize

import zoo
from batches import batches
from cases import task_of
from common import (CASES, GOLDEN, INPUTS, TOLERANCE, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of,
                    write_json, write_logits, write_tensors)
from training import DEFAULTS, label_count, trajectory, well_posed

MASKS = GOLDEN / "masks"
PREFIX = "base_model.model."


def linears(model, names):
    """Linear layers in the order of the forward, those whose path ends in one of `names`, or all but the head."""
    head = model.get_output_embeddings()
    found = {}
    for path, m in model.named_modules():
        if isinstance(m, torch.nn.Linear):
            wanted = any(path == n or path.endswith("." + n) for n in names) if names else m is not head and path.split(".")[0] not in ("classifier", "score")
            if wanted:
                found[path] = m
    return found


# Scores: path -> scores of its entries.

def gradients(model, layers, batch, scale=1.0):
    for m in layers.values():
        m.weight.requires_grad_(True)
    loss = model(**batch).loss * scale
    return dict(zip(layers, torch.autograd.grad(loss, [m.weight for m in layers.values()])))


def parts(data, size):
    count = len(next(iter(data.values())))
    return [{k: v[i:i + size] for k, v in data.items()} for i in range(0, count, size)]


def score(model, layers, how, data, size, amount, causal):
    """`amount`: micro-batches, or rows for Fisher information."""
    weights = {k: m.weight.detach() for k, m in layers.items()}
    if how == "smallest":
        return {k: torch.where(w == 0, -torch.inf, -w.abs()) for k, w in weights.items()}
    total = {k: torch.zeros_like(w) for k, w in weights.items()}
    if how == "fisher":
        rows = 0
        for batch in parts(data, size):
            if rows >= amount:
                break
            for row in parts(batch, 1):
                for k, g in gradients(model, layers, row, label_count(model, row, causal)).items():
                    total[k] += g ** 2
                rows += 1
        return total
    for batch in parts(data, size)[:amount]:
        for k, g in gradients(model, layers, batch).items():
            total[k] += g ** 2 if how == "squares" else g
    return {k: t.abs() for k, t in total.items()}


def highest(scores, k):
    """The k highest of a vector; the next one must be clearly lower."""
    order = torch.sort(scores, descending=True, stable=True)
    if k < len(scores):
        a, b = float(order.values[k - 1]), float(order.values[k])
        assert abs(a - b) > 1e-4 * abs(a), f"scores {a} and {b} are too near"
    return torch.sort(order.indices[:k]).values


def chosen(scores, scope, density):
    """Path -> ascending places in it."""
    if scope == "global":
        flat = torch.cat([s.flatten() for s in scores.values()])
        places, at, out = highest(flat, max(1, int(density * len(flat)))), 0, {}
        for path, s in scores.items():
            out[path] = places[(places >= at) & (places < at + s.numel())] - at
            at += s.numel()
        return out
    more = 1 if scope == "one more" else 0
    return {p: highest(s.flatten(), max(1, int(density * s.numel()) + more)) for p, s in scores.items()}


# Random places: Philox and Floyd's algorithm.

def philox(counter, key):
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (y >> 32) ^ b ^ k0, y & 0xFFFFFFFF, (x >> 32) ^ d ^ k1, x & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def word(seed, stream, i):
    low, high = (lambda x: x & 0xFFFFFFFF), (lambda x: x >> 32)
    return philox((low(i // 4), high(i // 4), low(stream), high(stream)), (low(seed), high(seed)))[i % 4]


def fnv(name):
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) % 2 ** 64
    return h


def drawn(path, count, size, seed):
    taken, stream = set(), fnv(path)
    for number, last in enumerate(range(size - count, size)):
        bits = word(seed, stream, 2 * number) << 32 | word(seed, stream, 2 * number + 1)
        place = bits * (last + 1) >> 64
        taken.add(last if place in taken else place)
    return torch.tensor(sorted(taken))


# How each method chooses: (score, scope of the ranking), and what its configuration says.

METHODS = {
    "pafi": lambda c: ("smallest", c.get("scope", "global"), 0),
    "fish": lambda c: ("fisher", "global", c["samples"]),
    "sam_mask": lambda c: ("sum", "tensor", c["burn_in"]),
    "sift": lambda c: ("sum", "one more", c["batches"]),
    "child_tuning": lambda c: ("squares", "global", 10 ** 9),
}


def places_of(model, method, names, config, data, size, causal):
    layers = linears(model, names)
    if method == "random_mask":
        return {p: drawn(p, max(1, int(config["density"] * m.weight.numel())), m.weight.numel(), config["mask_seed"])
                for p, m in layers.items()}
    how, scope, amount = METHODS[method](config)
    scores = score(model, layers, how, data, size, amount, causal)
    return chosen(scores, scope, config.get("density", config.get("share")))


class Added(torch.nn.Module):
    def __init__(self, places, values):
        super().__init__()
        self.register_buffer("places", places)
        self.values = torch.nn.Parameter(values)

    def forward(self, w):
        return w + torch.zeros_like(w).flatten().index_put((self.places,), self.values.to(w.dtype)).reshape(w.shape)


def attach(model, places, values):
    """Freezes the model and puts values at the places."""
    for p in model.parameters():
        p.requires_grad_(False)
    modules = dict(model.named_modules())
    for path, at in places.items():
        if len(at) == 0:
            continue
        parametrize.register_parametrization(modules[path], "weight", Added(at, values(path, at)))
    return model


def added(model):
    return {p: m.parametrizations.weight[0] for p, m in model.named_modules() if parametrize.is_parametrized(m, "weight")}


def save(model, path, base, method, names, config):
    path.mkdir(parents=True)
    own, sizes = added(model), {p: m.weight.numel() for p, m in linears(model, names).items()}
    scope = METHODS[method](config)[1] if method in METHODS else "tensor"
    tensors = {}
    if scope == "global":
        at, places = 0, []
        for p, size in sizes.items():
            places += [own[p].places + at] if p in own else []
            at += size
        tensors = {"sparse_values": torch.cat([a.values for a in own.values()]), "sparse_indices": torch.cat(places)}
    else:
        for p, a in own.items():
            tensors[f"{p}.sparse_values"] = a.values
            if method != "random_mask":
                tensors[f"{p}.sparse_indices"] = a.places
    write_tensors(path / "adapter_model.safetensors", {PREFIX + k: v for k, v in tensors.items()})
    write_json(path / "adapter_config.json", {
        "peft_type": f"ENGRAFT_{method.upper()}", "task_type": task_of(base), "target_modules": names or "all-linear",
        "modules_to_save": None, "base_model_name_or_path": f"models/{base}", "inference_mode": True, **config})


# model, method, variant, targets (None: all linears but the head), configuration, what it checks
CASE_TABLE = [
    ("llama", "random_mask", None, ["q_proj", "v_proj"], dict(density=0.05, mask_seed=3), "drawn places of q and v"),
    ("bert", "random_mask", None, None, dict(density=0.02, mask_seed=0), "of every linear, the pooler too"),
    ("llama", "pafi", None, None, dict(density=0.05, scope="global"), "one ranking"),
    ("roberta", "pafi", "tensor", ["query", "value"], dict(density=0.05, scope="tensor"), "a ranking for each matrix"),
    ("llama_bias", "fish", None, None, dict(density=0.02, samples=4), "Fisher information of rows"),
    ("t5", "fish", None, ["q", "v", "wi"], dict(density=0.05, samples=4), "encoder, decoder and cross-attention"),
    ("bert", "sam_mask", None, None, dict(density=0.02, burn_in=3), "summed gradients"),
    ("qwen2", "sam_mask", None, ["q_proj", "down_proj"], dict(density=0.03, burn_in=2), "some targets"),
    ("qwen3", "sift", None, None, dict(density=0.02, batches=1), "first gradients"),
    ("vit", "sift", None, ["q_proj", "fc2"], dict(density=0.03, batches=1), "of a vision model"),
    ("mistral", "child_tuning", None, None, dict(variant="D", share=0.2), "a fifth of all entries"),
]


def write_case(base, method, variant, names, config, checks):
    name = f"{base}__{method}" + (f"_{variant}" if variant else "")
    out, causal = fresh(CASES / name), zoo.is_causal(base)
    inputs, before = (tensors_of(INPUTS / base / f"{f}.safetensors") for f in ("inputs", "base_logits"))
    kind = "images" if base.startswith("vit") else "ragged" if base.startswith("t5") else "padded"
    places = places_of(zoo.load(base), method, names, config, batches(name, base, kind, 8), 2, causal)

    def values(path, at):
        return torch.from_numpy(rng("adapter", name, path).uniform(-0.4, 0.4, len(at))).float()

    model = attach(zoo.load(base), places, values)
    logits, rel = forward_both(model, inputs)
    save(model, out / "adapter", base, method, names, config)
    keep = logits_mask(logits, inputs).bool()
    for m in list(model.modules()):
        if parametrize.is_parametrized(m, "weight"):
            parametrize.remove_parametrizations(m, "weight")
    with tempfile.TemporaryDirectory() as d:
        model.save_pretrained(d)
        whole = forward(type(model).from_pretrained(d, attn_implementation="eager"), inputs)
    whole[~keep] = 0.0
    meta = {"case": name, "model": base, "method": method, "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": True, "tolerance": TOLERANCE, "merge_tolerance": TOLERANCE, "num_virtual_tokens": 0, "inputs": None,
            "effect_rel": relative(logits, before["logits"]), "transcription": "tools/golden/masks.py",
            "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "merge_rel": relative(whole[keep], logits[keep])}}
    assert rel < 1e-5 and meta["self_check"]["merge_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_logits(out / "merged_logits.safetensors", whole, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


# name -> (model, kind of batches, targets, configuration, options of training)
RUN_TABLE = {
    "llama__random_mask": ("llama", "full", ["q_proj", "v_proj"], dict(density=0.05, mask_seed=2), dict(weight_decay=0.1)),
    "llama__pafi": ("llama", "padded", None, dict(density=0.01, scope="global"), {}),
    "bert__fish": ("bert", "padded", None, dict(density=0.01, samples=6), {}),
    "llama__fish": ("llama", "uneven", ["q_proj", "down_proj"], dict(density=0.02, samples=5), {}),
    "bert__sam_mask": ("bert", "padded", None, dict(density=0.01, burn_in=5), dict(weight_decay=0.1)),
    "qwen2__sift": ("qwen2", "full", None, dict(density=0.01, batches=2), dict(gradient_accumulation=2)),
    "llama__child_tuning": ("llama", "padded", ["q_proj", "up_proj"], dict(variant="D", share=0.2), {}),
}


def attempt(name, out, salt):
    base, kind, names, config, options = RUN_TABLE[name]
    method, causal, options = name.split("__")[1], zoo.is_causal(base), dict(learning_rate=5e-3, **options)
    o = {**DEFAULTS, **options}
    data = batches(name + salt, base, kind, o["steps"] * o["batch_size"] * o["gradient_accumulation"])
    try:
        places = places_of(zoo.load(base), method, names, config, data, o["batch_size"], causal)
    except AssertionError:
        return False
    model = attach(zoo.load(base), places, lambda path, at: torch.zeros(len(at)))
    expected = trajectory(model, data, causal, **options)
    if not well_posed(expected):
        return False
    save(model, out / "adapter", base, method, names, config)
    write_tensors(out / "batches.safetensors", data)
    targets = {"targets": names} if names else {}
    write_json(out / "expected.json", {"name": name, "model": base, "method": {"name": method, **config, **targets},
                                       "transcription": "tools/golden/masks.py", "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    for row in CASE_TABLE:
        write_case(*row)
    for name in RUN_TABLE:
        if not any(attempt(name, fresh(MASKS / name), salt) for salt in ("", *(f"#{i}" for i in range(1, 20)))):
            raise SystemExit(f"{name}: no well-posed batches found")
