"""Adapters whose weights a generator writes for each task: a transcription in PyTorch.

Hyperformer and Hyperformer++ (Mahabadi et al., ACL 2021, arXiv:2106.04489): I = LN(W2 relu(W1 [z; l; p] + b1) + b2), and
W_d, b_d, W_u, b_u, gain, shift are linear maps of I; o + LN(W_u act(W_d o + b_d) + b_u) takes the place of a sublayer's
output o. Encoder and decoder have a set each, the embeddings of the tasks are common. The base's norms train too.

Each row of a batch is of the task that `task_ids` says. Tensors are saved as `base_model.model.hypernet.<name>`, norms
by their own names.
"""

import copy

import torch
import transformers
from torch import nn
from torch.nn import functional as F

import zoo
from batches import batches
from cases import task_of
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of,
                    write_json, write_logits, write_tensors)
from training import trajectory, well_posed

PREFIX = "base_model.model."
OWN = PREFIX + "hypernet."
ACT = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "swish": F.silu}
# ends of the modules that give the output of a sublayer, by family: after the MLP, after self-attention
ENDS = {"t5": ("DenseReluDense", "SelfAttention"), "bert": ("output.dense", "attention.output.dense"), "llama": ("mlp", "self_attn"),
        "gpt2": ("mlp", "attn"), "vit": ("fc2", "o_proj")}


def sublayers(model, base):
    """(path, stack, block, position) of every output of MLP (0) and attention (1)."""
    mlp, attention = ENDS[base.split("_")[0]]
    found = []
    for path, _ in model.named_modules():
        steps = path.split(".")
        number = next((int(s) for s in steps if s.isdigit()), None)
        if number is None:
            continue
        stack = steps[0] if base.startswith("t5") else ""
        if path.endswith("." + attention):
            found.append((path, stack, number, 1))
        elif path.endswith("." + mlp):
            found.append((path, stack, number, 0))
    return found


class Linear(nn.Module):
    def __init__(self, out, inn):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(out, inn)), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Hyperformer(nn.Module):
    def __init__(self, base, c, head):
        super().__init__()
        self.model, self.c, self.head = zoo.load(base), c, head or []
        self.places = sublayers(self.model, base)
        for key, p in self.model.named_parameters():
            norm = any("norm" in s.lower() or s.startswith("ln_") for s in key.split("."))
            p.requires_grad = (norm and c["norms"]) or any(key.startswith(h + ".") for h in self.head)
        config = self.model.config
        d = self.d = getattr(config, "d_model", None) or getattr(config, "n_embd", None) or config.hidden_size
        r = self.r = d // c["reduction"]
        e, p = c["embedding"], c["projection"]
        self.own = nn.ModuleDict()
        self.table = nn.ParameterDict({"task_embeddings|weight": nn.Parameter(torch.zeros(c["tasks"], e))})
        for stack in sorted({s for _, s, _, _ in self.places}):
            at = lambda name: f"{stack}.{name}" if stack else name
            put = lambda name, out, inn: self.own.update({at(name).replace(".", "|"): Linear(out, inn)})
            table = lambda name, *shape: self.table.update({at(name).replace(".", "|"): nn.Parameter(torch.zeros(*shape))})
            table("layer_embeddings.weight", 1 + max(n for _, s, n, _ in self.places if s == stack), e)
            if c["shared"]:
                table("position_embeddings.weight", 2, e)
            put("project.0", c["hidden"], (3 if c["shared"] else 2) * e)
            put("project.2", p, c["hidden"])
            table("norm.weight", p)
            table("norm.bias", p)
            for g in ["adapter"] if c["shared"] else ["mlp", "attention"]:
                for part, out in dict(down=r * d, down_bias=r, up=d * r, up_bias=d, gain=d, shift=d).items():
                    put(f"{g}.{part}", out, p)

    def named(self):
        out = {PREFIX + k: p for k, p in self.model.named_parameters() if p.requires_grad}
        out.update({OWN + k.replace("|", "."): p for k, p in self.table.items()})
        for k, m in self.own.items():
            out.update({f"{OWN}{k.replace('|', '.')}.{n}": p for n, p in m.named_parameters()})
        return out

    def added(self, x, task, stack, block, position):
        at = lambda name: (f"{stack}.{name}" if stack else name).replace(".", "|")
        parts = [self.table["task_embeddings|weight"][task], self.table[at("layer_embeddings.weight")][block]]
        if self.c["shared"]:
            parts.append(self.table[at("position_embeddings.weight")][position])
        i = self.own[at("project.2")](F.relu(self.own[at("project.0")](torch.cat(parts))))
        i = F.layer_norm(i, i.shape, self.table[at("norm.weight")], self.table[at("norm.bias")], 1e-6)
        g = "adapter" if self.c["shared"] else ["mlp", "attention"][position]
        made = lambda part, *shape: self.own[at(f"{g}.{part}")](i).view(*shape)
        inner = ACT[self.c["activation"]](x @ made("down", self.r, self.d).T + made("down_bias", self.r))
        outer = inner @ made("up", self.d, self.r).T + made("up_bias", self.d)
        return F.layer_norm(outer, (self.d,), made("gain", self.d), made("shift", self.d), 1e-5)

    def forward(self, task_ids=None, **inputs):
        rows = len(next(iter(inputs.values())))
        tasks = [self.c["task"]] * rows if task_ids is None else task_ids.tolist()

        def hook(place):
            def change(_module, _args, out):
                x = out[0] if isinstance(out, tuple) else out
                x = x + torch.stack([self.added(row, task, *place) for row, task in zip(x, tasks)])
                return (x, *out[1:]) if isinstance(out, tuple) else x
            return change
        hooks = [self.model.get_submodule(path).register_forward_hook(hook(place)) for path, *place in self.places]
        try:
            return self.model(**inputs)
        finally:
            for h in hooks:
                h.remove()


SMALL = dict(tasks=3, task=1, reduction=4, shared=True, embedding=6, hidden=10, projection=8, activation="gelu", norms=True)
# model, variant, settings, trained modules, task of each row or None, what it checks
TABLE = [
    ("t5", "hyperformer", None, {}, None, [2, 0, 1], "one set for both positions, every row another task"),
    ("t5_flan", "hyperformer", "apart", dict(shared=False, activation="gelu_new"), None, [1, 1, 2], "a set for each position"),
    ("t5_uneven", "hyperformer", "usual", dict(norms=False), None, None, "the adapter's own task"),
    ("bert", "hyperformer", None, dict(activation="relu"), ["classifier"], [0, 2, 0], "trained classifier"),
    ("llama", "hyperformer", None, dict(activation="swish", reduction=7), None, [0, 1, 2], "causal"),
    ("gpt2", "hyperformer", "one", dict(tasks=1, task=0), None, None, "one task"),
]


def attach(base, c, head, name):
    whole = Hyperformer(base, {**SMALL, **c}, head)
    for key, p in whole.named().items():
        width = 0.3 if ".weight" in key and p.ndim == 2 else 0.2
        width = 1.0 if key.startswith(OWN) and "embeddings" in key else width
        value = torch.from_numpy(rng("adapter", name, key).uniform(-width, width, tuple(p.shape))).float()
        p.data = p.data + value
    return whole.eval()


def save(whole, path, base):
    path.mkdir(parents=True)
    write_tensors(path / "adapter_model.safetensors", whole.named())
    write_json(path / "adapter_config.json", {
        **whole.c, "peft_type": "ENGRAFT_HYPERFORMER", "task_type": task_of(base), "modules_to_save": whole.head or None,
        "base_model_name_or_path": f"models/{base}", "inference_mode": True})


def reloaded(base, path, c, head):
    whole = Hyperformer(base, {**SMALL, **c}, head)
    tensors = tensors_of(path / "adapter_model.safetensors")
    for key, p in whole.named().items():
        p.data = tensors.pop(key)
    assert not tensors
    return whole.eval()


def write_case(base, method, variant, c, head, tasks, checks):
    name = f"{base}__{method}" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    before = tensors_of(INPUTS / base / "base_logits.safetensors")["logits"]
    if tasks is not None:
        rows = len(inputs["input_ids"])
        inputs["task_ids"] = torch.tensor((tasks * rows)[:rows])
        write_tensors(out / "inputs.safetensors", inputs)
    whole = attach(base, c, head, name)
    logits, rel = forward_both(whole, inputs)
    save(whole, out / "adapter", base)
    keep, again = logits_mask(logits, inputs).bool(), forward(reloaded(base, out / "adapter", c, head), inputs)
    meta = {"case": name, "model": base, "method": method, "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": False, "tolerance": TOLERANCE, "inputs": "./inputs.safetensors" if tasks is not None else None,
            "effect_rel": relative(logits, before), "transcription": "tools/golden/hyper.py", "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": relative(again[keep], logits[keep])}}
    assert rel < 1e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


# name -> kind of batches, options, settings, trained modules
TRAINED = {
    "t5__hyperformer": ("ragged", {}, {}, None),
    "bert__hyperformer": ("padded", dict(learning_rate=3e-3), dict(shared=False), ["classifier"]),
}


def attempt(name, out, salt):
    kind, options, c, head = TRAINED[name]
    base, method = name.split("__")
    data = batches(name + salt, base, kind, 16)
    data["task_ids"] = torch.from_numpy(rng("tasks", name).integers(0, 3, 16))
    whole = attach(base, c, head, "trajectory/" + name)
    save(copy.deepcopy(whole), out / "init_adapter", base)
    expected = trajectory(whole, data, zoo.is_causal(base), **options)
    if not well_posed(expected):
        return False
    save(whole, out / "final_adapter", base)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": method, "notes": None,
                                       "transcription": "tools/golden/hyper.py", "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
