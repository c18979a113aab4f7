"""Side networks, which read the outputs of frozen blocks and replace the last one: a transcription in PyTorch.

LST (Sung et al., NeurIPS 2022, arXiv:2206.06522): s = D0 x0 + c0; at a side layer s = Block(mu s + (1 - mu) (D_i x_i + c_i)),
mu = sigmoid(alpha / 0.1); the last output is U LN(s) + u. Block: s + W_o attn(LN s), then s + W_2 act(W_1 LN s).
Side-tuning (Zhang et al., ECCV 2020, arXiv:1912.13503): sigmoid(a) B + (1 - sigmoid(a)) S(x0), S a perceptron.
Res-Tuning's bypass (Jiang et al., NeurIPS 2023, arXiv:2310.19859): b = x0; b = lam T_lat(x_i) + (1 - lam) T_ver(b), or the
sum, T(x) = x + W_u gelu(W_d x + c_d) + c_u; the last output is b.

x_i is the output of block i (of an encoder-decoder model, of the decoder), x0 the input of the first; both are detached.
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
BLOCKS = {"t5": "decoder.block", "bert": "bert.encoder.layer", "roberta": "roberta.encoder.layer", "vit": "vit.layers",
          "llama": "model.layers", "qwen3": "model.layers", "gpt2": "transformer.h"}
ACT = {"relu": F.relu, "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "swish": F.silu, "tanh": torch.tanh}


def pick(config, *names):
    return next(v for v in (getattr(config, n, None) for n in names) if v is not None)


class Sizes:
    def __init__(self, config):
        self.d = pick(config, "d_model", "n_embd", "hidden_size")
        self.heads = pick(config, "num_heads", "n_head", "num_attention_heads")
        dim = next((v for v in (getattr(config, n, None) for n in ("d_kv", "head_dim")) if v), None)
        self.dim = dim or self.d // self.heads
        self.f = pick(config, "d_ff", "n_inner", "intermediate_size")


class Side(nn.Module):
    """Tensors by their names; the methods below say how a state starts, goes on and ends."""

    def __init__(self, c, s, blocks):
        super().__init__()
        self.c, self.s, self.count = c, s, blocks
        self.own = nn.ParameterDict({k.replace(".", "|"): nn.Parameter(torch.zeros(shape)) for k, shape in self.shapes().items()})

    def p(self, name):
        return self.own[name.replace(".", "|")]

    def linear(self, name, x):
        return F.linear(x, self.p(f"{name}.weight"), self.p(f"{name}.bias"))

    def layer(self, name, inn, out):
        return {f"{name}.weight": (out, inn), f"{name}.bias": (out,)}


class Lst(Side):
    def kept(self, i):
        return self.c["side_layers"] is None or i in self.c["side_layers"]

    def shapes(self):
        s, r = self.s, self.c["reduction"]
        self.w, self.dim, f = s.d // r, max(1, s.dim // r), max(1, s.f // r)
        h, norm = s.heads * self.dim, lambda n: {f"{n}.weight": (self.w,), f"{n}.bias": (self.w,)}
        out = self.layer("side.entry", s.d, self.w) | norm("side.norm") | self.layer("side.up", self.w, s.d)
        for i in filter(self.kept, range(self.count)):
            n = f"side.{i}."
            out |= self.layer(n + "down", s.d, self.w) | {n + "gate": (1,)} | norm(n + "mlp_norm")
            out |= {n + "wi.weight": (f, self.w), n + "wo.weight": (self.w, f)}
            if self.c["block"] == "transformer":
                out |= norm(n + "attention_norm") | {n + "o.weight": (self.w, h)} | {f"{n}{x}.weight": (h, self.w) for x in "qkv"}
        return out

    def norm(self, name, x):
        return F.layer_norm(x, (self.w,), self.p(f"{name}.weight"), self.p(f"{name}.bias"), 1e-5)

    def start(self, x):
        return self.linear("side.entry", x)

    def step(self, s, i, out, seen):
        if not self.kept(i):
            return s
        n = f"side.{i}."
        mu = torch.sigmoid(self.p(n + "gate") / 0.1)
        s = mu * s + (1 - mu) * self.linear(n + "down", out)
        if self.c["block"] == "transformer":
            x, (rows, length) = self.norm(n + "attention_norm", s), s.shape[:2]
            heads = lambda t: t.view(rows, length, self.s.heads, self.dim).transpose(1, 2)
            q, k, v = (heads(F.linear(x, self.p(f"{n}{part}.weight"))) for part in "qkv")
            scores = (q @ k.transpose(2, 3)) / self.dim ** 0.5
            y = scores.masked_fill(~seen[:, None], -1e30).softmax(-1) @ v
            s = s + F.linear(y.transpose(1, 2).reshape(rows, length, -1), self.p(n + "o.weight"))
        inner = ACT[self.c["activation"]](F.linear(self.norm(n + "mlp_norm", s), self.p(n + "wi.weight")))
        return s + F.linear(inner, self.p(n + "wo.weight"))

    def end(self, s, _out):
        return self.linear("side.up", self.norm("side.norm", s))


class SideTuning(Side):
    def shapes(self):
        n, out = self.c["depth"], {"side.alpha": (1,)}
        for i in range(n):
            out |= self.layer(f"side.{i}", self.s.d if i == 0 else self.c["hidden"], self.s.d if i + 1 == n else self.c["hidden"])
        return out

    def start(self, x):
        for i in range(self.c["depth"]):
            x = self.linear(f"side.{i}", x if i == 0 else ACT[self.c["activation"]](x))
        return x

    def step(self, s, _i, _out, _seen):
        return s

    def end(self, s, out):
        a = torch.sigmoid(self.p("side.alpha"))
        return a * out + (1 - a) * s


class ResTuning(Side):
    def shapes(self):
        out = {}
        for i in range(self.count):
            if self.c["mix"] == "gate":
                out[f"bypass.{i}.gate"] = (1,)
            for t in ("lateral", "vertical"):
                out |= self.layer(f"bypass.{i}.{t}.down", self.s.d, self.c["bottleneck"])
                out |= self.layer(f"bypass.{i}.{t}.up", self.c["bottleneck"], self.s.d)
        return out

    def tuner(self, name, x):
        return x + self.linear(f"{name}.up", F.gelu(self.linear(f"{name}.down", x)))

    def start(self, x):
        return x

    def step(self, s, i, out, _seen):
        lateral, vertical = self.tuner(f"bypass.{i}.lateral", out), self.tuner(f"bypass.{i}.vertical", s)
        if self.c["mix"] == "sum":
            return lateral + vertical
        lam = torch.sigmoid(self.p(f"bypass.{i}.gate"))
        return lam * lateral + (1 - lam) * vertical

    def end(self, s, _out):
        return s


KINDS = {
    "lst": (Lst, dict(reduction=4, block="transformer", activation="relu", side_layers=None)),
    "side_tuning": (SideTuning, dict(hidden=12, depth=2, activation="relu")),
    "res_tuning": (ResTuning, dict(bottleneck=6, mix="gate")),
}


class Whole(nn.Module):
    def __init__(self, base, method, c, head):
        super().__init__()
        self.model, self.base, self.head = zoo.load(base), base, head or []
        for key, p in self.model.named_parameters():
            p.requires_grad = any(key.startswith(h + ".") for h in self.head)
        kind, defaults = KINDS[method]
        self.c = {**defaults, **c}
        self.path = BLOCKS[base.split("_")[0]]
        self.side = kind(self.c, Sizes(self.model.config), len(self.model.get_submodule(self.path)))

    def named(self):
        out = {PREFIX + k: p for k, p in self.model.named_parameters() if p.requires_grad}
        return out | {PREFIX + k.replace("|", "."): p for k, p in self.side.own.items()}

    def seen(self, h, mask):
        """[rows, queries, keys]: real keys, and where text is written earlier ones."""
        rows, n = h.shape[:2]
        real = torch.ones(rows, n, dtype=torch.bool) if mask is None else mask.bool()
        seen = real[:, None].expand(rows, n, n)
        return seen.tril() if self.base.startswith("t5") or zoo.is_causal(self.base) else seen

    def forward(self, **inputs):
        blocks, state = self.model.get_submodule(self.path), {}
        mask = inputs.get("decoder_attention_mask" if self.base.startswith("t5") else "attention_mask")

        def before(_module, args, kwargs):
            x = (args[0] if args else kwargs["hidden_states"]).detach()
            state["s"], state["seen"] = self.side.start(x), self.seen(x, mask)

        def after(i):
            def change(_module, _args, result):
                out = (result[0] if isinstance(result, tuple) else result).detach()
                state["s"] = self.side.step(state["s"], i, out, state["seen"])
                new = self.side.end(state["s"], out) if i + 1 == len(blocks) else out
                return (new, *result[1:]) if isinstance(result, tuple) else new
            return change
        hooks = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [block.register_forward_hook(after(i)) for i, block in enumerate(blocks)]
        try:
            return self.model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()


# model, method, variant, settings, trained modules, what it checks
TABLE = [
    ("bert", "lst", None, {}, ["classifier"], "attention both ways, trained classifier"),
    ("llama", "lst", None, dict(activation="swish"), None, "causal attention of three side layers"),
    ("t5", "lst", None, dict(activation="gelu_new"), None, "beside the decoder"),
    ("vit", "lst", "last", dict(side_layers=[1], activation="gelu"), ["classifier"], "pictures, one side layer"),
    ("gpt2", "lst", "mlp", dict(block="mlp", side_layers=[0], reduction=2), None, "perceptrons, no side layer at the last block"),
    ("roberta_token", "lst", "mlp", dict(block="mlp"), None, "a row of logits a token"),
    ("bert", "side_tuning", None, {}, ["classifier"], "trained classifier"),
    ("llama", "side_tuning", None, dict(depth=3, activation="swish"), None, "causal, three layers"),
    ("t5_flan", "side_tuning", None, dict(activation="gelu"), None, "beside the decoder"),
    ("vit", "side_tuning", "linear", dict(depth=1), None, "pictures, one matrix"),
    ("vit", "res_tuning", None, {}, ["classifier"], "pictures, trained classifier"),
    ("bert", "res_tuning", "sum", dict(mix="sum"), None, "the form of the authors' code"),
    ("qwen3", "res_tuning", None, dict(bottleneck=3), None, "causal"),
    ("t5", "res_tuning", None, {}, None, "beside the decoder"),
]


def attach(base, method, c, head, name):
    whole = Whole(base, method, c, head)
    for key, p in whole.named().items():
        width = 0.05 if key.endswith("gate") else 0.4
        value = torch.from_numpy(rng("adapter", name, key).uniform(-width, width, tuple(p.shape))).float()
        p.data = p.data + value + (1.0 if "norm.weight" in key else 0.0)
    return whole.eval()


def save(whole, path, method):
    path.mkdir(parents=True)
    write_tensors(path / "adapter_model.safetensors", whole.named())
    base = whole.base
    write_json(path / "adapter_config.json", {
        **whole.c, "peft_type": f"ENGRAFT_{method.upper()}", "task_type": None if base.startswith("vit") else task_of(base),
        "modules_to_save": whole.head or None, "base_model_name_or_path": f"models/{base}", "inference_mode": True})


def write_case(base, method, variant, c, head, checks):
    name = f"{base}__{method}" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    before = tensors_of(INPUTS / base / "base_logits.safetensors")["logits"]
    whole = attach(base, method, c, head, name)
    logits, rel = forward_both(whole, inputs)
    save(whole, out / "adapter", method)
    meta = {"case": name, "model": base, "method": method, "variant": variant, "checks": checks,
            "task_type": None if base.startswith("vit") else task_of(base), "merge": False, "tolerance": TOLERANCE, "inputs": None,
            "effect_rel": relative(logits, before), "transcription": "tools/golden/side.py", "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel}}
    assert rel < 1e-5 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


# name -> kind of batches, options, settings, trained modules
TRAINED = {
    "llama__lst": ("uneven", {}, dict(activation="gelu"), None),
    "bert__lst": ("padded", dict(learning_rate=3e-4), dict(activation="gelu", side_layers=[1]), ["classifier"]),
    "bert__side_tuning": ("padded", {}, dict(activation="gelu"), ["classifier"]),
    "t5__res_tuning": ("ragged", {}, {}, None),
}


def attempt(name, out, salt):
    kind, options, c, head = TRAINED[name]
    base, method = name.split("__")
    data = batches(name + salt, base, kind, 16)
    whole = attach(base, method, c, head, "trajectory/" + name)
    save(copy.deepcopy(whole), out / "init_adapter", method)
    expected = trajectory(whole, data, zoo.is_causal(base), **options)
    if not well_posed(expected):
        print(name, expected["self_check"], expected["rounding_only_tensors"], flush=True)
        return False
    save(whole, out / "final_adapter", method)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": method, "notes": None,
                                       "transcription": "tools/golden/side.py", "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
