"""Modules shared under masks and modules pruned at the start: a PyTorch transcription of ProPETL and SparseAdapter.

- ProPETL (arXiv:2305.17682): one adapter, LoRA or prefix for all layers, of which a layer uses the entries with the largest
  |score|, n - int((1 - keep) n) of n; the mask's gradient goes to |score| as it is. Scores start uniform in
  +-1 / sqrt(columns), from philox.py with seed 0 and the name of the tensor. Files hold the masks in bits. With several
  tasks each shared tensor has a mask of each task too, the same in all layers, and a row of task t has
  1 - (1 - the layer's) (1 - the task's), the authors' OR.
- SparseAdapter (arXiv:2210.04284): bottleneck adapters after the MLP; |w g| of the first batch over all matrices together
  keeps total - int(sparsity total) entries. Matrices start N(0, 0.02) from philox.py.
"""


import numpy as np
import torch
import transformers
from torch import nn

import philox
import zoo
from batches import batches
from cases import task_of
from cases_instance import attention, layers, normals  # registers the attention with a prefix too
from common import (CASES, GOLDEN, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, rng,
                    tensors_of, write_json, write_logits, write_tensors)
from training import DEFAULTS, run, trajectory, well_posed

PREFIX = "base_model.model."
PRO = dict(reduction=4, rank=4, alpha=6, tokens=4, mask_rate=1)
THREE = dict(PRO, tasks=3, task=1)
TABLE = [
    ("bert", "propetl", None, "", dict(PRO, form="adapter", keep=0.5), "a shared adapter"),
    ("roberta", "propetl", None, "", dict(PRO, form="adapter", keep=0.3), "a shared adapter"),
    ("bert_token", "propetl", "left", "_left", dict(PRO, form="adapter", keep=0.5), "padding on the left"),
    ("llama", "propetl", "lora", "", dict(PRO, form="lora", keep=0.3), "a LoRA for each kind of matrix"),
    ("qwen2", "propetl", "lora", "", dict(PRO, form="lora", keep=0.5), "other sizes of queries and values"),
    ("bert", "propetl", "prefix", "", dict(PRO, form="prefix", keep=0.4), "a shared prefix, positions stay"),
    ("gpt2", "propetl", "prefix", "", dict(PRO, form="prefix", keep=0.4), "causal"),
    ("llama", "propetl", "prefix", "_left", dict(PRO, form="prefix", keep=0.4), "grouped-query attention, padding on the left"),
    ("bert", "propetl", "tasks", "", dict(THREE, form="adapter", keep=0.3), "every row another task"),
    ("roberta", "propetl", "usual", "", dict(THREE, form="adapter", keep=0.5), "rows that name no task"),
    ("llama", "propetl", "lora_tasks", "", dict(THREE, form="lora", keep=0.3), "every row another task"),
    ("gpt2", "propetl", "prefix_tasks", "", dict(THREE, form="prefix", keep=0.4), "every row another task"),
    ("bert", "sparse_adapter", None, "", dict(form="pfeiffer", reduction=4, sparsity=0.8, widen=1, score="snip", batches=1), "masks"),
    ("roberta", "sparse_adapter", "wide", "", dict(form="pfeiffer", reduction=4, sparsity=0.5, widen=2, score="random", batches=1),
     "twice as wide, half of it"),
]


class Keep(torch.autograd.Function):
    """One for the `count` largest; the gradient goes through."""

    @staticmethod
    def forward(ctx, sizes, count):
        out = torch.zeros(sizes.numel(), dtype=sizes.dtype)
        out[sizes.flatten().argsort(descending=True, stable=True)[:count]] = 1
        return out.reshape(sizes.shape)

    @staticmethod
    def backward(ctx, g):
        return g, None


class Scored(nn.Module):
    """A mask over a shared tensor by `scores`."""

    def __init__(self, shared, keep, name):
        super().__init__()
        n, bound = shared.numel(), np.float32(shared.shape[-1] ** -0.5)
        self.count, self.name = n - int((1 - keep) * n), name
        start = (2 * philox.uniform(0, name + ".mask_scores", tuple(shared.shape)) - 1) * bound
        self.scores = nn.Parameter(torch.from_numpy(start.astype(np.float32)))

    def mask(self):
        return Keep.apply(self.scores.abs(), self.count)


class Masked(Scored):
    """A shared tensor under the mask of one layer, [rows, ...] under those of the rows' tasks too where there are any."""

    def __init__(self, shared, keep, name, tasks):
        super().__init__(shared, keep, name)
        self.shared, self.tasks, self.rows = shared, nn.ModuleList(tasks), None

    def forward(self):
        if not len(self.tasks):
            return self.shared * self.mask()
        # Masks of tasks without a row have no gradient, and rest in the step.
        masks = {task: self.tasks[task].mask() for task in set(self.rows.tolist())}
        own = torch.stack([masks[task] for task in self.rows.tolist()])
        return self.shared * (1 - (1 - self.mask()) * (1 - own))


class Adapted(nn.Module):
    """The last part of a layer of BERT with an adapter before its norm."""

    def __init__(self, base, down, down_bias, up, up_bias):
        super().__init__()
        self.base, self.down, self.down_bias, self.up, self.up_bias = base, down, down_bias, up, up_bias

    def forward(self, hidden_states, input_tensor):
        g = self.base.dense(hidden_states)
        x = self.base.LayerNorm(g + input_tensor)
        added = (x @ self.down().mT + self.down_bias).relu() @ self.up().mT + self.up_bias
        return self.base.LayerNorm(g + added + input_tensor)


class Plain(nn.Module):
    def __init__(self, weight, name):
        super().__init__()
        self.weight, self.name = weight, name
        self.register_buffer("keep", torch.ones_like(weight))

    def forward(self):
        return self.weight * self.keep


class WithLora(nn.Module):
    def __init__(self, base, a, b, scale):
        super().__init__()
        self.base, self.a, self.b, self.scale = base, a, b, scale

    def forward(self, x):
        return self.base(x) + self.scale * x @ self.a().mT @ self.b().mT


class Hybrid(nn.Module):
    """A model with one of the methods; only its own tensors train."""

    def __init__(self, base, method, config):
        super().__init__()
        self.base, self.method, self.config = base, method, config
        self.model = zoo.load(base)
        self.model.config.use_cache = False
        for p in self.model.parameters():
            p.requires_grad = False
        self.named = nn.ParameterDict()
        self.parts = nn.ModuleList()
        self.of_tasks = nn.ModuleList()
        self.known = {}
        (self.sparse if method == "sparse_adapter" else getattr(self, config["form"]))()

    def own(self, name, *shape):
        key = name.replace(".", "/")
        if key not in self.named:
            self.named[key] = nn.Parameter(torch.zeros(*shape))
        return self.named[key]

    def part(self, module):
        self.parts.append(module)
        return module

    def masked(self, shared, name, prototype):
        if prototype not in self.known:
            count = self.config.get("tasks", 1)
            self.known[prototype] = [Scored(shared, self.config["keep"], f"{prototype}.task_{t}") for t in range(count if count > 1 else 0)]
            self.of_tasks.extend(self.known[prototype])
        return self.part(Masked(shared, self.config["keep"], name, self.known[prototype]))

    def sizes(self):
        d = self.model.config.hidden_size
        return d, max(1, int(d / self.config["reduction"] * self.config.get("widen", 1)))

    def paths(self, part):
        names = {m: n for n, m in self.model.named_modules()}
        return [names[part(layer)] for layer in layers(self.model)]

    def adapter(self):
        d, k = self.sizes()
        down, up = self.own("prototype.adapter_down.weight", k, d), self.own("prototype.adapter_up.weight", d, k)
        biases = self.own("prototype.adapter_down.bias", k), self.own("prototype.adapter_up.bias", d)
        for layer, path in zip(layers(self.model), self.paths(lambda l: l.output)):
            own = [self.masked(w, f"{path}.{n}", f"prototype.{n}") for w, n in ((down, "adapter_down"), (up, "adapter_up"))]
            layer.output = Adapted(layer.output, own[0], biases[0], own[1], biases[1])

    def sparse(self):
        d, k = self.sizes()
        for layer, path in zip(layers(self.model), self.paths(lambda l: l.output)):
            stem = f"{path}.adapters.engraft"
            down, up = f"{stem}.adapter_down.0.weight", f"{stem}.adapter_up.weight"
            own = self.part(Plain(self.own(down, k, d), down)), self.part(Plain(self.own(up, d, k), up))
            layer.output = Adapted(layer.output, own[0], self.own(f"{stem}.adapter_down.0.bias", k), own[1],
                                   self.own(f"{stem}.adapter_up.bias", d))

    def lora(self):
        r = self.config["rank"]
        for layer, path in zip(layers(self.model), self.paths(attention)):
            for role, name in (("q", "q_proj"), ("v", "v_proj")):
                linear = getattr(attention(layer), name)
                out, inn = linear.weight.shape
                stem = f"prototype.{role}_{out}x{inn}"
                a, b = self.own(f"{stem}.lora_A", r, inn), self.own(f"{stem}.lora_B", out, r)
                own = [self.masked(w, f"{path}.{name}.{n}", f"{stem}.{n}") for w, n in ((a, "lora_A"), (b, "lora_B"))]
                setattr(attention(layer), name, WithLora(linear, *own, self.config["alpha"] / r))

    def prefix(self):
        c = self.model.config
        self.model.set_attn_implementation("prefixed")
        for m in self.model.modules():
            m._supports_sdpa = False
        self.heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        self.dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        shared = self.own("prototype.prefix", self.config["tokens"], 2 * self.heads * self.dim)
        for path in self.paths(attention):
            self.masked(shared, f"{path}.prefix", "prototype.prefix")

    def forward(self, task_ids=None, **inputs):
        for part in self.parts if len(self.of_tasks) else []:
            part.rows = torch.full((len(inputs["input_ids"]),), self.config["task"]) if task_ids is None else task_ids
        if self.config.get("form") != "prefix":
            return self.model(**inputs)
        count = len(inputs["input_ids"])
        for layer, part in zip(layers(self.model), self.parts):
            halves = part().split(self.heads * self.dim, -1)
            split = lambda p: p.reshape(-1, self.config["tokens"], self.heads, self.dim).transpose(1, 2).expand(count, -1, -1, -1)
            attention(layer).prefix = [split(p) for p in halves]
        try:
            return self.model(**inputs)
        finally:
            for layer in layers(self.model):
                del attention(layer).prefix


def bits(mask):
    return np.packbits(mask.detach().numpy().astype(np.uint8).reshape(-1), bitorder="little")


def tensors(model, masks=True):
    out = {PREFIX + k.replace("/", ".") if ".adapters." not in k.replace("/", ".") else k.replace("/", "."): p
           for k, p in model.named.items()}
    for part in [*model.parts, *model.of_tasks] if masks else []:
        key = part.name if ".adapters." in part.name else PREFIX + part.name
        out[f"{key}.mask"] = bits(part.keep if isinstance(part, Plain) else part.mask())
    return out


def fill(model, name):
    for key, p in model.named.items():
        part = key.replace("/", ".")
        width = 1.5 if part.endswith("prefix") else (3.0 / p.shape[-1]) ** 0.5 if p.ndim > 1 else 0.25
        p.data = torch.from_numpy(rng("adapter", name, part).uniform(-width, width, tuple(p.shape))).float()
    for part in model.parts:
        if isinstance(part, Plain):
            keep = 1 - (0.5 if model.config["widen"] > 1 else model.config["sparsity"])
            draw = torch.from_numpy(rng("mask", name, part.name).random(tuple(part.weight.shape)) < keep)
            part.keep.copy_(draw.float())
            part.weight.data = part.weight.data * part.keep
    return model.eval()


def save(model, path, masks=True):
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / "adapter_model.safetensors", tensors(model, masks))
    targets = {}
    if model.config.get("form") == "lora":
        targets = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": None}
    write_json(path / "adapter_config.json", {
        "peft_type": f"ENGRAFT_{model.method.upper()}", "task_type": task_of(model.base), "modules_to_save": None,
        "base_model_name_or_path": f"models/{model.base}", "inference_mode": True, **targets, **model.config})


def write_case(base, method, variant, side, config, checks):
    name = f"{base}__{method}" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / f"inputs{side}.safetensors")
    before = tensors_of(INPUTS / base / f"base_logits{side}.safetensors")["logits"]
    tasks = "tasks" in config and variant != "usual"
    if tasks:
        inputs["task_ids"] = torch.tensor([2, 0, 1] * len(inputs["input_ids"]))[:len(inputs["input_ids"])]
        write_tensors(out / "inputs.safetensors", inputs)
    model = fill(Hybrid(base, method, config), name)
    logits, rel = forward_both(model, inputs)
    save(model, out / "adapter")
    meta = {"case": name, "model": base, "method": method, "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": False, "tolerance": TOLERANCE, "num_virtual_tokens": 0,
            "inputs": "./inputs.safetensors" if tasks else f"../../inputs/{base}/inputs{side}.safetensors" if side else None, "effect_rel": relative(logits, before),
            "transcription": "tools/golden/cases_hybrid.py", "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel}}
    assert rel < 2e-5 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


# name -> kind of batches, settings; a pruned adapter goes on under its masks
SPARSE = dict(form="pfeiffer", reduction=4, sparsity=0.5, widen=2, score="random", batches=1)
TRAINED = {"roberta__sparse_adapter": ("padded", SPARSE),
           "bert__propetl": ("padded", dict(PRO, form="adapter", keep=0.5)),
           "bert__propetl_tasks": ("padded", dict(THREE, form="adapter", keep=0.3)),
           "llama__propetl_lora": ("full", dict(PRO, form="lora", keep=0.3))}


def attempt(name, out, salt):
    base, kind, config = name.split("__")[0], *TRAINED[name]
    method = "sparse_adapter" if config is SPARSE else "propetl"
    o = {**DEFAULTS, "learning_rate": 3e-3}
    data = batches(name + salt, base, kind, o["steps"] * o["batch_size"])
    if "tasks" in config:
        data["task_ids"] = torch.from_numpy(rng("tasks", name).integers(0, config["tasks"], len(data["labels"])))
    model = fill(Hybrid(base, method, config), "trajectory/" + name)
    save(model, out / "init_adapter", masks=method == "sparse_adapter")
    expected = trajectory(model, data, zoo.is_causal(base), learning_rate=o["learning_rate"])
    if not well_posed(expected):
        return False
    save(model, out / "final_adapter")
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": method, "settings": config if method == "propetl" else None, "notes": None,
                                       "transcription": "tools/golden/cases_hybrid.py",
                                       "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def pruned(base="bert"):
    """A whole run of SparseAdapter from a recipe: |w g| of the first batch, then eight steps."""
    config = dict(form="pfeiffer", reduction=4, sparsity=0.8, widen=1, score="snip", batches=1)
    out = fresh(GOLDEN / "masks" / f"{base}__sparse_adapter")
    o = {**DEFAULTS, "learning_rate": 1e-2}
    data = batches("masks/sparse_adapter", base, "padded", o["steps"] * o["batch_size"])
    model = Hybrid(base, "sparse_adapter", config).eval()
    for part in model.parts:
        start = normals(0, part.name, part.weight.numel()) * np.float32(0.02)
        part.weight.data = torch.from_numpy(start.reshape(tuple(part.weight.shape)))
    model(**{k: v[:o["batch_size"]] for k, v in data.items()}).loss.backward()
    scores = torch.cat([(p.weight * p.weight.grad).abs().flatten() for p in model.parts]).detach()
    total = len(scores)
    keep = torch.zeros(total)
    keep[scores.argsort(descending=True, stable=True)[:total - int(config["sparsity"] * total)]] = 1
    for part in model.parts:
        own, keep = keep[:part.weight.numel()], keep[part.weight.numel():]
        part.keep.copy_(own.reshape(part.weight.shape))
        part.weight.data = part.weight.data * part.keep
    model.zero_grad()
    losses, _, _ = run(model, data, o, False)
    save(model, out / "adapter")
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"model": base, "method": {"name": "sparse_adapter", **config}, "losses": losses, **o,
                                       "transcription": "tools/golden/cases_hybrid.py"})
    print(f"{base}__sparse_adapter: {losses[0]:.4f} to {losses[-1]:.4f}", flush=True)


def make():
    torch.set_num_threads(1)
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
    pruned()
