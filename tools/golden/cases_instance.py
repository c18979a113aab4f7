"""Prompts and prefixes that depend on their sequence: IDPG, SMoP, LPT, APT; a PyTorch transcription of their formulas.

What stands for a sequence is taken from its given tokens: all real ones, or, where a causal model is trained, those before
its first label (the first token at least). Prompts are put before the input's embeddings, padding included.

- IDPG (arXiv:2204.04497): P = W2 gelu(W1 z + b1) + b2, z the pooled output, or the state of one token of the last layer, of
  the model alone; deep: every layer's first rows are those with its own b2. PHM: W = sum_j kron(S_j, T_j).
- SMoP (EMNLP 2023): s = R mean(E); in training s + noise * e * stop(s), e standard normal from philox.py, seed 0, stream
  "smop.STEP.0"; p = softmax(s); the prompt of the largest p, times it.
- LPT (arXiv:2210.11292): rows put before the states that layer `layer` reads and taken off behind the last layer: of one
  token's state (naive), of pooled states (average, max: torch's adaptive pooling), or trained (none).
- APT (arXiv:2305.15212): keys and values before those of each attention, row i times lambda * sigmoid(W h)_i.

Adapter files hold the parameters as `base_model.model.<name>`, and the settings of a recipe.
"""

import inspect

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import philox
import zoo
from batches import batches
from cases import task_of
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of,
                    write_json, write_logits, write_tensors)
from training import DEFAULTS, trajectory, well_posed

PREFIX = "base_model.model."
IDPG = dict(tokens=3, generator="phm", phm_dim=4, bottleneck=8, deep=True, dropout=0.0)
DENSE = dict(tokens=3, generator="dense", bottleneck=8, deep=True, dropout=0.0)
SMOP = dict(prompts=4, tokens=2, noise=1)
LPT = dict(tokens=3, generator="naive", bottleneck=8, dropout=0.0)
APT = {"tokens": 3, "summary": "mean"}
# model, method, variant, side, settings, what it checks
TABLE = [
    ("bert", "idpg", None, "", {**IDPG, "summary": "first"}, "the pooled output of a first pass; rows for every layer"),
    ("bert", "idpg", "dense", "", {**DENSE, "summary": "first", "deep": False}, "matrices, one prompt"),
    ("roberta", "idpg", None, "", {**IDPG, "summary": "first"}, "the first token's state"),
    ("bert_token", "idpg", "mean", "", {**IDPG, "summary": "mean"}, "the mean of all states"),
    ("llama", "idpg", None, "", {**IDPG, "summary": "last"}, "the last token's state"),
    ("llama", "idpg", "left", "_left", {**IDPG, "summary": "last", "deep": False}, "padding on the left"),
    ("gpt2", "idpg", None, "", {**DENSE, "summary": "last"}, "absolute positions"),
    ("t5", "idpg", None, "", {**IDPG, "summary": "first"}, "the state at the decoder's start token"),
    ("t5", "smop", None, "", SMOP, "the encoder's input"),
    ("llama", "smop", None, "", SMOP, "the most probable prompt by its share"),
    ("llama", "smop", "left", "_left", SMOP, "padding on the left"),
    ("gpt2", "smop", None, "", {**SMOP, "prompts": 7}, "absolute positions"),
    ("bert", "smop", None, "", SMOP, "the pooler reads the first row"),
    ("roberta_token", "smop", "one", "", {**SMOP, "prompts": 1}, "one prompt is prompt tuning"),
    ("llama", "lpt", None, "", {**LPT, "summary": "last", "layer": 1}, "rotary positions move by the rows"),
    ("llama", "lpt", "average_left", "_left", {**LPT, "summary": "last", "layer": 2, "generator": "average"}, "padding on the left"),
    ("gpt2", "lpt", None, "", {**LPT, "summary": "last"}, "half of the layers"),
    ("gpt2", "lpt", "max", "", {**LPT, "summary": "last", "generator": "max", "tokens": 5}, "more rows than some sequences have tokens"),
    ("bert", "lpt", None, "", {**LPT, "summary": "first"}, "the first token stays the one that is classified"),
    ("bert", "lpt", "none", "", {**LPT, "summary": "first", "generator": "none"}, "trained rows"),
    ("roberta", "lpt", "average", "", {**LPT, "summary": "mean", "generator": "average"}, "means of stretches"),
    ("bert_token", "lpt", "max", "_left", {**LPT, "summary": "first", "generator": "max"}, "padding on the left"),
    ("bert", "apt", None, "", APT, "absolute positions move by the prefix"),
    ("roberta", "apt", "first", "", {**APT, "summary": "first"}, "the first token's state"),
    ("bert_token", "apt", "left", "_left", APT, "padding on the left"),
    ("llama", "apt", None, "", APT, "grouped-query attention"),
    ("llama", "apt", "left", "_left", {**APT, "summary": "last"}, "padding on the left"),
    ("gpt2", "apt", None, "", {**APT, "summary": "last"}, "absolute positions"),
    ("qwen3", "apt", None, "", APT, "prefix keys are not normalised"),
]


def trunk(model):
    """The stack of layers that reads the input."""
    return model.encoder if hasattr(model, "encoder") else getattr(model, model.base_model_prefix)


def layers(model):
    base = trunk(model)
    for name in ("layers", "h", "block"):
        if hasattr(base, name):
            return getattr(base, name)
    return base.encoder.layer


def attention(layer):
    for name in ("self_attn", "attn"):
        if hasattr(layer, name):
            return getattr(layer, name)
    return layer.attention.self


def prefixed(module, query, key, value, mask, scaling=None, **_):
    """Plain attention with the rows `module.prefix` before keys and values; every token sees them."""
    own = getattr(module, "prefix", None)
    groups = query.shape[1] // key.shape[1]
    if own is not None:
        key, value = torch.cat([own[0], key], 2), torch.cat([own[1], value], 2)
        if mask is None:
            mask = torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2], dtype=query.dtype)
        else:
            mask = F.pad(mask, (own[0].shape[2], 0))
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores + mask.clamp(min=-1e9)[..., :key.shape[2]].to(scores.dtype)
    out = scores.softmax(-1) @ value.repeat_interleave(groups, 1)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("prefixed", prefixed)
AttentionMaskInterface.register("prefixed", eager_mask)


def summary(states, columns, kind):
    """What stands for each sequence: [B, n, d] -> [B, d]."""
    pick = {"first": lambda own: own[:1], "last": lambda own: own[-1:], "mean": lambda own: own}[kind]
    return torch.stack([states[i, pick(own)].mean(0) for i, own in enumerate(columns)])


class Prompted(nn.Module):
    """A model with one of the methods; only the method's parameters train."""

    def __init__(self, base, method, config):
        super().__init__()
        self.base, self.method, self.config, self.calls = base, method, config, 0
        self.model = zoo.load(base)
        self.model.config.use_cache = False
        if method == "apt":
            self.model.set_attn_implementation("prefixed")
            for m in self.model.modules():
                m._supports_sdpa = False  # in f64 too
        for p in self.model.parameters():
            p.requires_grad = False
        self.own = nn.ParameterDict({k.replace(".", "/"): nn.Parameter(torch.zeros(s)) for k, s in self.shapes().items()})

    def __getitem__(self, name):
        return self.own[name.replace(".", "/")]

    def shapes(self):
        c, d, n = self.config, self.model.config.hidden_size, len(layers(self.model))
        t, m = c["tokens"], c.get("bottleneck")
        if self.method == "smop":
            return {"prompt_embeddings": (c["prompts"], t, d), "router.weight": (c["prompts"], d)}
        if self.method == "apt":
            rows = {"prompt_embeddings": (t, 2 * n * self.heads() * self.dim())}
            for path in self.paths():
                rows |= {f"{path}.apt_gate.weight": (t, d), f"{path}.apt_scale": (1,)}
            return rows
        if self.method == "lpt":
            if c["generator"] == "none":
                return {"prompt_embeddings": (t, d)}
            out = t * d if c["generator"] == "naive" else d
            return {"lpt_down.weight": (m, d), "lpt_down.bias": (m,), "lpt_up.weight": (out, m), "lpt_up.bias": (out,)}
        biases = {"idpg_down.bias": (m,), "idpg_up.bias": (n if c["deep"] else 1, t * d)}
        if c["generator"] == "dense":
            return {"idpg_down.weight": (m, d), "idpg_up.weight": (t * d, m), **biases}
        k = c["phm_dim"]
        return {"idpg_down.rule": (k, k, k), "idpg_down.weight": (k, m // k, d // k),
                "idpg_up.rule": (k, k, k), "idpg_up.weight": (k, t * d // k, m // k), **biases}

    def heads(self):
        return getattr(self.model.config, "num_key_value_heads", None) or self.model.config.num_attention_heads

    def dim(self):
        c = self.model.config
        return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads

    def paths(self):
        names = {m: name for name, m in self.model.named_modules()}
        return [names[attention(layer)] for layer in layers(self.model)]

    def is_causal(self):
        return zoo.is_causal(self.base)

    def forward(self, input_ids, attention_mask=None, labels=None, **more):
        self.calls += labels is not None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        columns = [row.nonzero()[:, 0] for row in mask]
        if self.is_causal() and labels is not None:
            columns = [torch.tensor([c for c in own if c < first] or [own[0]]) for own, first in zip(columns, self.first(labels))]
        target = {} if labels is None else {"labels": labels}
        embeds = self.model.get_input_embeddings()(input_ids)
        if self.method == "apt":
            return self.with_hooks(self.prefixes(columns), lambda: self.model(
                input_ids=input_ids, attention_mask=mask, position_ids=self.positions(input_ids, mask), **more, **target))
        if self.method == "lpt":
            late = self.late(columns, mask)
            return self.with_hooks(late, lambda: self.model(input_ids=input_ids, attention_mask=mask, **more, **target))
        rows = self.rows(embeds, columns, dict(input_ids=input_ids, attention_mask=mask, **more), target)
        return self.with_prompt(embeds, mask, rows, more, target)

    def first(self, labels):
        return [int((row != -100).nonzero()[0]) for row in labels]

    def with_hooks(self, hooks, run):
        handles = hooks
        try:
            return run()
        finally:
            for h in handles:
                h.remove()

    def with_prompt(self, embeds, mask, rows, more, target):
        """`rows`: [B, t, d], and, where they differ by layer, those of the layers after the first."""
        first, deep = rows
        t = self.config["tokens"]
        more = dict(more)
        if "token_type_ids" in more:
            more["token_type_ids"] = F.pad(more["token_type_ids"], (t, 0))
        labels = target.get("labels")
        if labels is not None and labels.ndim == 2 and "decoder_input_ids" not in more and not hasattr(self.model, "decoder"):
            target = {"labels": F.pad(labels, (t, 0), value=-100)}

        def replace(own):
            def hook(module, args, kwargs):
                bound = inspect.signature(module.forward).bind(*args, **kwargs)
                h = bound.arguments["hidden_states"]
                bound.arguments["hidden_states"] = torch.cat([own, h[:, t:]], 1)
                return bound.args, bound.kwargs
            return hook

        hooks = [layer.register_forward_pre_hook(replace(own), with_kwargs=True)
                 for layer, own in zip(layers(self.model)[1:], deep)]
        return self.with_hooks(hooks, lambda: self.model(
            inputs_embeds=torch.cat([first, embeds], 1), attention_mask=F.pad(mask, (t, 0), value=1), **more, **target))

    def rows(self, embeds, columns, inputs, target):
        t, d = self.config["tokens"], embeds.shape[-1]
        if self.method == "smop":
            scores = summary(embeds, columns, "mean") @ self["router.weight"].T
            if target and self.config["noise"]:
                e = normals(0, f"smop.{self.calls}.0", scores.numel()).reshape(scores.shape)
                scores = scores + self.config["noise"] * scores.detach() * torch.from_numpy(e).to(scores.dtype)
            share, chosen = scores.softmax(-1).max(-1)
            return share[:, None, None] * self["prompt_embeddings"][chosen], []
        z = self.said(columns, inputs, target)
        inner = F.gelu(self.matrix("idpg_down", z) + self["idpg_down.bias"])
        every = [(self.matrix("idpg_up", inner) + b).reshape(len(z), t, d) for b in self["idpg_up.bias"]]
        return every[0], every[1:]

    def matrix(self, name, x):
        w = self[f"{name}.weight"]
        if self.config["generator"] == "phm":
            w = sum(torch.kron(s, t) for s, t in zip(self[f"{name}.rule"], w))
        return x @ w.T

    def said(self, columns, inputs, target):
        """What the model alone says of each sequence."""
        with torch.no_grad():
            if hasattr(self.model, "decoder"):
                if target:
                    inputs = {**inputs, "decoder_input_ids": self.model._shift_right(target["labels"])}
                states = self.model(**inputs, output_hidden_states=True).decoder_hidden_states[-1][:, 0]
                scaled = getattr(self.model.config, "scale_decoder_outputs", self.model.config.tie_word_embeddings)
                return states * self.model.config.d_model ** -0.5 if scaled else states
            out = trunk(self.model)(**inputs)
            if "Sequence" in zoo.MODELS_TABLE[self.base]["cls"]:
                pooled = getattr(out, "pooler_output", None)
                return out.last_hidden_state[:, 0] if pooled is None else pooled
            return summary(out.last_hidden_state, columns, self.config["summary"])

    def made(self, h, columns):
        """LPT's rows from the states h [B, n, d]."""
        c, t = self.config, self.config["tokens"]
        if c["generator"] == "none":
            return self["prompt_embeddings"].expand(len(h), -1, -1)
        down = lambda x: F.linear(x, self["lpt_down.weight"], self["lpt_down.bias"])
        up = lambda x: F.linear(x.relu(), self["lpt_up.weight"], self["lpt_up.bias"])
        if c["generator"] == "naive":
            return up(down(summary(h, columns, c["summary"]))).reshape(len(h), t, -1)
        pool = {"average": F.adaptive_avg_pool1d, "max": F.adaptive_max_pool1d}[c["generator"]]
        return up(torch.stack([pool(down(h[i, own]).T[None], t)[0].T for i, own in enumerate(columns)]))

    def late(self, columns, mask):
        """Hooks that put the rows before the states from layer `layer` on and keep them from what comes behind."""
        t, state = self.config["tokens"], {}
        stack = layers(self.model)
        first = self.config.get("layer", len(stack) // 2)

        def before(module, args, kwargs):
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            h = bound.arguments["hidden_states"]
            rows = state.get("rows")
            h = torch.cat([self.made(h, columns) if rows is None else rows, h], 1)
            seen = F.pad(mask, (t, 0), value=1)[:, None, None, :].expand(-1, 1, h.shape[1], -1).bool()
            if self.is_causal():
                seen = seen & torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
            bound.arguments["hidden_states"] = h
            bound.arguments["attention_mask"] = torch.zeros(seen.shape, dtype=h.dtype).masked_fill(~seen, -1e9)
            extra = bound.arguments.get("kwargs", {})
            if hasattr(trunk(self.model), "rotary_emb"):
                at = torch.arange(h.shape[1])[None].expand(len(h), -1)
                turned = trunk(self.model).rotary_emb(h, at)
                (bound.arguments if "position_embeddings" in bound.arguments else extra)["position_embeddings"] = turned
            return bound.args, bound.kwargs

        def after(module, args, kwargs, out):
            h = out[0] if isinstance(out, tuple) else out
            state["rows"], h = h[:, :t], h[:, t:]
            return (h, *out[1:]) if isinstance(out, tuple) else h

        hooks = []
        for layer in stack[first:]:
            hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(layer.register_forward_hook(after, with_kwargs=True))
        return hooks

    def positions(self, ids, mask):
        """Tokens are counted from the first row of the prefix; RoBERTa's count from behind its padding id."""
        t = self.config["tokens"]
        if self.base.startswith("roberta"):
            pad = self.model.config.pad_token_id
            real = (ids != pad).long()
            return (real.cumsum(1) + t) * real + pad
        return torch.arange(ids.shape[1])[None] + t

    def prefixes(self, columns):
        """Hooks that give each attention its prefix, made of what it reads."""
        t, heads, dim = self.config["tokens"], self.heads(), self.dim()
        parts = self["prompt_embeddings"].split(heads * dim, 1)
        hooks = []
        for i, (layer, path) in enumerate(zip(layers(self.model), self.paths())):
            def before(module, args, kwargs, i=i, path=path):
                h = inspect.signature(module.forward).bind(*args, **kwargs).arguments["hidden_states"]
                gate = torch.sigmoid(summary(h, columns, self.config["summary"]) @ self[f"{path}.apt_gate.weight"].T)
                gate = gate * self[f"{path}.apt_scale"]
                module.prefix = [(gate[:, :, None] * p).reshape(len(h), t, heads, dim).transpose(1, 2)
                                 for p in parts[2 * i:2 * i + 2]]

            def after(module, args, kwargs, out):
                del module.prefix

            hooks.append(attention(layer).register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(attention(layer).register_forward_hook(after, with_kwargs=True))
        return hooks


def normals(seed, name, count):
    """The engine's standard normal numbers: Box-Muller on pairs of words."""
    w = philox.words(seed, name, (count + 3) // 4 * 4).astype(np.float64).reshape(-1, 2)
    radius = np.sqrt(-2 * np.log((w[:, 0] + 0.5) / 2**32))
    turn = 2 * np.pi * w[:, 1] / 2**32
    both = np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1).astype(np.float32)
    return both.reshape(-1)[:count]


WIDTHS = {"prompt_embeddings": 1.5, "router.weight": 1.0, "apt_gate.weight": 0.5, "idpg_up.bias": 1.0, "rule": 0.8}


def fill(model, name):
    for key, p in model.own.items():
        part = key.replace("/", ".")
        width = next((w for end, w in WIDTHS.items() if part.endswith(end)), (3.0 / p.shape[-1]) ** 0.5 if p.ndim > 1 else 0.5)
        value = torch.from_numpy(rng("adapter", name, part).uniform(-width, width, tuple(p.shape))).float()
        p.data = value + 1.0 if part.endswith("apt_scale") else value
    return model.eval()


def tensors(model):
    return {PREFIX + k.replace("/", "."): p for k, p in model.own.items()}


def save(model, path):
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / "adapter_model.safetensors", tensors(model))
    write_json(path / "adapter_config.json", {
        "peft_type": f"ENGRAFT_{model.method.upper()}", "task_type": task_of(model.base), "modules_to_save": None,
        "base_model_name_or_path": f"models/{model.base}", "inference_mode": True, **model.config})


def reloaded(model, path):
    again = Prompted(model.base, model.method, model.config).eval()
    held = tensors_of(path / "adapter_model.safetensors")
    for key, p in tensors(again).items():
        p.data = held.pop(key)
    assert not held
    return again


def write_case(base, method, variant, side, config, checks):
    name = f"{base}__{method}" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / f"inputs{side}.safetensors")
    before = tensors_of(INPUTS / base / f"base_logits{side}.safetensors")["logits"]
    model = fill(Prompted(base, method, config), name)
    logits, rel = forward_both(model, inputs)
    save(model, out / "adapter")
    again = forward(reloaded(model, out / "adapter"), inputs)
    keep = logits_mask(logits, inputs).bool()
    meta = {"case": name, "model": base, "method": method, "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": False, "tolerance": TOLERANCE, "num_virtual_tokens": config["tokens"],
            "inputs": f"../../inputs/{base}/inputs{side}.safetensors" if side else None, "effect_rel": relative(logits, before),
            "transcription": "tools/golden/cases_instance.py", "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": relative(again[keep], logits[keep])}}
    assert rel < 2e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


# name -> (kind of batches, settings, options)
TRAINED = {
    "bert__idpg": ("padded", {**IDPG, "summary": "first"}, {}),
    "llama__idpg": ("padded", {**IDPG, "summary": "last"}, {}),
    "llama__smop": ("padded", SMOP, {}),
    "t5__smop": ("ragged", SMOP, {}),
    "gpt2__lpt": ("padded", {**LPT, "summary": "last"}, {}),
    "bert__lpt_average": ("padded", {**LPT, "summary": "first", "generator": "average"}, {}),
    "bert__apt": ("padded", APT, {}),
    "llama__apt": ("padded", APT, {}),
}


def asked(data, base):
    """Causal models are asked for what comes behind the first three tokens."""
    if zoo.is_causal(base):
        data["labels"][:, :3] = -100
    return data


def attempt(name, out, salt):
    base, method = name.split("__")
    method = method.split("_")[0]
    kind, config, options = TRAINED[name]
    options = {"learning_rate": 1e-2, **options}
    o = {**DEFAULTS, **options}
    data = asked(batches(name + salt, base, kind, o["steps"] * o["batch_size"]), base)
    model = fill(Prompted(base, method, config), "trajectory/" + name)
    save(model, out / "init_adapter")
    expected = trajectory(model, data, zoo.is_causal(base), **options)
    if not well_posed(expected):
        return False
    save(model, out / "final_adapter")
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": method, "notes": None,
                                       "transcription": "tools/golden/cases_instance.py",
                                       "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    torch.set_num_threads(1)
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
