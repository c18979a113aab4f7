"""PHA, prototype-based hyperadapters (Zhao, Fu and He, EMNLP 2023, arXiv:2310.11670): a transcription in PyTorch, a row at a time.

Beside the MLP stands A(n) = W_u relu(W_d n + b_d) + b_u, n what the MLP reads: in an encoder trained, in a decoder or a single
stack written from I = LN(W2 relu(W1 [p; l] + c1) + c2) by linear maps. In training two terms are added to the gradient (the
loss keeps its value): with z = MLP(mean of the encoder's output) and cosines over 0.1, -mean over a row's mates of
(z.z' - ln of the sum over all others), and -(z.p - ln of the sum over the other prototypes).
"""

import copy

import torch
import transformers
from torch import nn
from torch.nn import functional as F

import zoo
from batches import batches
from cases import task_of
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward_both, fresh, relative, rng, tensors_of, write_json,
                    write_logits, write_tensors)
from training import trajectory, well_posed

PREFIX = "base_model.model."
# by family: the module whose input the MLP reads, the one whose output it gives, the last block's list
ENDS = {"t5": ("DenseReluDense", "DenseReluDense", None), "bert": ("intermediate.dense", "output.dense", "bert.encoder.layer"),
        "llama": ("mlp", "mlp", "model.layers"), "gpt2": ("mlp", "mlp", "transformer.h")}


class Pha(nn.Module):
    def __init__(self, base, c, head):
        super().__init__()
        self.model, self.base, self.c, self.head = zoo.load(base), base, c, head or []
        for key, p in self.model.named_parameters():
            p.requires_grad = any(key.startswith(h + ".") for h in self.head)
        config = self.model.config
        d = self.d = getattr(config, "d_model", None) or getattr(config, "n_embd", None) or config.hidden_size
        first, last, self.blocks = ENDS[base.split("_")[0]]
        names = [n for n, _ in self.model.named_modules()]
        mlps = lambda end: [n for n in names if n.endswith("." + end) and not n.endswith("attention." + end)]
        self.places = []
        for stack in ("encoder.block", "decoder.block") if base.startswith("t5") else ("",):
            pairs = [(a, b) for a, b in zip(mlps(first), mlps(last)) if a.startswith(stack)]
            self.places += [(a, b, stack.startswith("encoder"), i) for i, (a, b) in enumerate(pairs)]
        written = sum(not own for _, _, own, _ in self.places)
        r, e, h, p = c["bottleneck"], c["embedding"], c["hidden"], c["projection"]
        shapes = {"task_embeddings.weight": (c["tasks"], e), "layer_embeddings.weight": (written, e), "norm.weight": (p,), "norm.bias": (p,)}
        linear = {"project.0": (h, 2 * e), "project.2": (p, h), "down": (d * r, p), "down_bias": (r, p), "up": (r * d, p), "up_bias": (d, p),
                  "key.0": (h, d), "key.2": (e, h)}
        for _, _, own, i in self.places:
            if own:
                linear |= {f"encoder.{i}.down": (r, d), f"encoder.{i}.up": (d, r)}
        for name, (out, inn) in linear.items():
            shapes |= {f"{name}.weight": (out, inn), f"{name}.bias": (out,)}
        self.own = nn.ParameterDict({k.replace(".", "|"): nn.Parameter(torch.zeros(shape)) for k, shape in shapes.items()})

    def p(self, name):
        return self.own[name.replace(".", "|")]

    def linear(self, name, x):
        return F.linear(x, self.p(f"{name}.weight"), self.p(f"{name}.bias"))

    def named(self):
        out = {PREFIX + k: p for k, p in self.model.named_parameters() if p.requires_grad}
        return out | {f"{PREFIX}pha.{k.replace('|', '.')}": p for k, p in self.own.items()}

    def added(self, x, task, own, i):
        if own:
            return self.linear(f"encoder.{i}.up", F.relu(self.linear(f"encoder.{i}.down", x)))
        code = torch.cat([self.p("task_embeddings.weight")[task], self.p("layer_embeddings.weight")[i]])
        code = self.linear("project.2", F.relu(self.linear("project.0", code)))
        code = F.layer_norm(code, code.shape, self.p("norm.weight"), self.p("norm.bias"), 1e-6)
        r = self.c["bottleneck"]
        inner = F.relu(x @ self.linear("down", code).view(self.d, r) + self.linear("down_bias", code))
        return inner @ self.linear("up", code).view(r, self.d) + self.linear("up_bias", code)

    def terms(self, states, mask, tasks):
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        z = F.normalize(self.linear("key.2", F.relu(self.linear("key.0", mean))), dim=1)
        p, total, n = F.normalize(self.p("task_embeddings.weight"), dim=1), 0.0, len(tasks)
        among = []
        for i in range(n):
            others = [j for j in range(n) if j != i]
            mates = [j for j in others if tasks[j] == tasks[i]]
            if mates:
                below = torch.logsumexp(torch.stack([z[i] @ z[j] / 0.1 for j in others]), 0)
                among.append(-torch.stack([z[i] @ z[j] / 0.1 - below for j in mates]).mean())
        if among:
            total = total + torch.stack(among).mean()
        if len(p) > 1:
            to = [-(z[i] @ p[t] / 0.1 - torch.logsumexp(torch.stack([z[i] @ p[o] / 0.1 for o in range(len(p)) if o != t]), 0))
                  for i, t in enumerate(tasks)]
            total = total + torch.stack(to).mean()
        return self.c["contrast"] * total

    def forward(self, task_ids=None, **inputs):
        rows = len(next(iter(inputs.values())))
        tasks = [self.c["task"]] * rows if task_ids is None else task_ids.tolist()
        seen, hooks = {}, []
        for a, b, own, i in self.places:
            def before(_m, args, key=a):
                seen[key] = args[0]

            def after(_m, _args, out, key=a, own=own, i=i):
                return out + torch.stack([self.added(x, t, own, i) for x, t in zip(seen[key], tasks)])
            hooks.append(self.model.get_submodule(a).register_forward_pre_hook(before))
            hooks.append(self.model.get_submodule(b).register_forward_hook(after))
        reads = self.model.get_encoder() if self.blocks is None else self.model.get_submodule(self.blocks)[-1]

        def keep(_m, _args, out):
            seen["states"] = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0] if isinstance(out, tuple) else out
        hooks.append(reads.register_forward_hook(keep))
        try:
            out = self.model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        if "labels" in inputs and self.c["contrast"]:
            mask = inputs.get("attention_mask")
            mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
            term = self.terms(seen["states"], mask.to(seen["states"].dtype), tasks)
            if isinstance(term, torch.Tensor):
                out.loss = out.loss + term - term.detach()
        return out


SMALL = dict(tasks=3, task=1, bottleneck=5, embedding=6, hidden=10, projection=8, contrast=0.1)
# model, variant, settings, trained modules, task of each row or None, what it checks
TABLE = [
    ("t5", None, {}, None, [2, 0, 1], "the encoder's own adapters, every row another task"),
    ("t5_flan", "usual", dict(bottleneck=3), None, None, "the adapter's own task"),
    ("bert", None, {}, ["classifier"], [0, 2, 0], "one stack, trained classifier"),
    ("llama", None, {}, None, [0, 1, 2], "causal"),
    ("gpt2", "one", dict(tasks=1, task=0), None, None, "one task"),
]


def attach(base, c, head, name):
    whole = Pha(base, {**SMALL, **c}, head)
    for key, p in whole.named().items():
        width = 1.0 if "embeddings" in key and ".pha." in key else 0.3
        value = torch.from_numpy(rng("adapter", name, key).uniform(-width, width, tuple(p.shape))).float()
        p.data = p.data + value + (1.0 if "norm.weight" in key else 0.0)
    return whole.eval()


def save(whole, path):
    path.mkdir(parents=True)
    write_tensors(path / "adapter_model.safetensors", whole.named())
    write_json(path / "adapter_config.json", {
        **whole.c, "peft_type": "ENGRAFT_PHA", "task_type": task_of(whole.base), "modules_to_save": whole.head or None,
        "base_model_name_or_path": f"models/{whole.base}", "inference_mode": True})


def write_case(base, variant, c, head, tasks, checks):
    name = f"{base}__pha" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    before = tensors_of(INPUTS / base / "base_logits.safetensors")["logits"]
    if tasks is not None:
        rows = len(inputs["input_ids"])
        inputs["task_ids"] = torch.tensor((tasks * rows)[:rows])
        write_tensors(out / "inputs.safetensors", inputs)
    whole = attach(base, c, head, name)
    logits, rel = forward_both(whole, inputs)
    save(whole, out / "adapter")
    meta = {"case": name, "model": base, "method": "pha", "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": False, "tolerance": TOLERANCE, "inputs": "./inputs.safetensors" if tasks is not None else None,
            "effect_rel": relative(logits, before), "transcription": "tools/golden/pha.py", "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel}}
    assert rel < 1e-5 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


# name -> kind of batches, options, settings, trained modules
TRAINED = {
    "t5__pha": ("ragged", dict(batch_size=4), dict(contrast=0.5), None),
    "bert__pha": ("padded", dict(batch_size=4), {}, ["classifier"]),
}


def attempt(name, out, salt):
    kind, options, c, head = TRAINED[name]
    base = name.split("__")[0]
    data = batches(name + salt, base, kind, 32)
    data["task_ids"] = torch.from_numpy(rng("tasks", name).integers(0, 3, 32))
    whole = attach(base, c, head, "trajectory/" + name)
    save(copy.deepcopy(whole), out / "init_adapter")
    expected = trajectory(whole, data, zoo.is_causal(base), **options)
    if not well_posed(expected):
        print(name, expected["self_check"], expected["rounding_only_tensors"], flush=True)
        return False
    save(whole, out / "final_adapter")
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": "pha", "notes": None,
                                       "transcription": "tools/golden/pha.py", "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
