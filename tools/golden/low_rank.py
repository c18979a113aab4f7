"""Methods around LoRA that `peft` does not have: PyTorch transcriptions of their formulas, cases and trajectories.

Each adapted linear layer becomes a `Layer` that adds the method's branch to the frozen output:

- SoRA (arXiv:2311.11696): s * B((g * A) x), and after each update g <- sign(g) max(|g| - xi, 0), xi = lambda or
  learning rate * lambda. What a run leaves is a LoRA of the ranks with an open gate, g multiplied into A.
- DyLoRA (arXiv:2210.07558): the first b rows of A and columns of B at the scale alpha / b; b drawn once a step, `eval_r`
  otherwise; `frozen` trains row and column b alone.
- CapaBoost (arXiv:2407.01320): s * sum_i (B * M_i)(A * N_i) x under fixed masks of one density.
- PeriodicLoRA (arXiv:2402.16141): after ceil(steps / stages) updates the pair is put aside, A is drawn anew, B is zero,
  the optimizer's state of both is dropped. What a run leaves is one LoRA of all pairs.
- MoLoRA (arXiv:2309.05444) and LoRAMoE (arXiv:2312.09979): s * sum_e softmax(R x)_e B_e A_e x; LoRAMoE's gradients
  include beta * var(u) / mean(u)^2, averaged over layers, u_e the sum of the shares of expert e over all real tokens.
- AutoLoRA (arXiv:2403.09113): alpha * B(a * A x), a = softmax of the shares; odd steps move all but the shares on the rows
  that are not held out, even steps the shares on those that are. After the search ranks with a >= 1 / r stay at the
  scale s, A is drawn anew, B is zero, and all rows train them. What a run leaves is a LoRA of these ranks.
- BiLoRA (arXiv:2403.13037): s * B(e * A x), odd steps move all but e, with a penalty on A and B that are not orthogonal,
  even steps e on held-out rows. What a run leaves is a LoRA, e multiplied into A.
- Poly (arXiv:2202.13914): its cases are `peft`'s (cases_ranks.py); here its training, where each sequence draws its
  shares: sigmoid(Z + ln u - ln(1 - u)), normalised.

Random numbers are those of philox.py with seed 0. s = alpha / r.
"""

import copy
import math
import tempfile

import numpy as np
import torch
import transformers
from torch import nn

import philox
import zoo
from batches import batches
from cases import LINEARS, task_of
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, rng,
                    tensors_of, write_json, write_logits, write_tensors)
from training import DEFAULTS, trajectory, well_posed

PREFIX = "base_model.model."
QV = ["q_proj", "v_proj"]


class Clock:
    """What the layers of a model share: the step, whether it trains, which positions are real, terms of the loss."""

    def __init__(self):
        self.step, self.trains, self.mask, self.terms = 1, False, None, []


class Layer(nn.Module):
    """A frozen linear layer and the branch beside it."""

    def __init__(self, base, path, method, config, clock):
        super().__init__()
        self.base, self.path, self.method, self.config, self.clock = base, path, method, config, clock
        w = base.weight
        self.out, self.inn = w.shape[::-1] if type(base).__name__ == "Conv1D" else w.shape
        for name, shape in SHAPES[method](self.inn, self.out, config).items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.zeros(shape)))
        self.past_a, self.past_b = [], []
        if method == "autolora":
            self.register_buffer("p", torch.full((config["r"],), float(config["lora_alpha"])))
            self.register_buffer("q", torch.zeros(config["r"]))

    @property
    def weight(self):
        """T5 looks at the kind of its numbers."""
        return self.base.weight

    def named(self):
        """The tensors by their names in the file."""
        return {name: getattr(self, name.replace(".", "_")) for name in SHAPES[self.method](self.inn, self.out, self.config)}

    def branch(self, x):
        return BRANCHES[self.method](self, x)

    def forward(self, x):
        return self.base(x) + self.branch(x)

    def fold(self):
        """The change goes into the frozen weight."""
        change = self.branch(torch.eye(self.inn, dtype=self.base.weight.dtype))  # [in, out]
        self.base.weight.data += change if type(self.base).__name__ == "Conv1D" else change.T


def pair(inn, out, c):
    return {"lora_A.weight": (c["r"], inn), "lora_B.weight": (out, c["r"])}


def wide(inn, out, c):
    n = c["experts"]
    return {"lora_A.weight": (n * c["r"], inn), "lora_B.weight": (out, n * c["r"]), "lora_router.weight": (n, inn)}


def inventory(inn, out, c):
    q, s, r = c["n_splits"], c["n_skills"], c["r"]
    return {"poly_lora_A": (q, s, inn // q, r), "poly_lora_B": (q, s, r, out // q), "poly_router.module_logits": (c["n_tasks"], q * s)}


SHAPES = {"sora": lambda i, o, c: {**pair(i, o, c), "lora_gate": (c["r"],)}, "dylora": pair, "capaboost": pair,
          "autolora": lambda i, o, c: {**pair(i, o, c), "lora_shares": (c["r"],)},
          "bilora": lambda i, o, c: {**pair(i, o, c), "lora_sizes": (c["r"],)},
          "periodiclora": pair, "molora": wide, "loramoe": wide, "poly": inventory}


def sora(layer, x):
    c = layer.config
    return c["lora_alpha"] / c["r"] * (layer.lora_gate * (x @ layer.lora_A_weight.T)) @ layer.lora_B_weight.T


def drawn_rank(c, step):
    return c["min_r"] + int(philox.words(0, 0x64796C6F7261, 1, step)[0]) % (c["r"] - c["min_r"] + 1)


def dylora(layer, x):
    c = layer.config
    b = drawn_rank(c, layer.clock.step) if layer.clock.trains else c["eval_r"] or c["r"]
    A, B = layer.lora_A_weight[:b], layer.lora_B_weight[:, :b]
    if layer.clock.trains and c["mode"] == "frozen":
        A, B = torch.cat([A[:-1].detach(), A[-1:]]), torch.cat([B[:, :-1].detach(), B[:, -1:]], 1)
    return c["lora_alpha"] / b * x @ A.T @ B.T


def mask(shape, c, name):
    w = philox.words(c["mask_seed"], name, math.prod(shape))
    kept = np.argsort(w, kind="stable")[:int(c["density"] * len(w) + 0.5)]
    m = np.zeros(len(w))
    m[kept] = 1
    return torch.from_numpy(m.reshape(shape))


def capaboost(layer, x):
    c, A, B = layer.config, layer.lora_A_weight, layer.lora_B_weight
    y = 0
    for i in range(c["copies"]):
        n = mask(A.shape, c, f"{layer.path}.lora_A.mask.{i}").to(A.dtype)
        m = mask(B.shape, c, f"{layer.path}.lora_B.mask.{i}").to(B.dtype)
        y = y + x @ (A * n).T @ (B * m).T
    return c["lora_alpha"] / c["r"] * y


def periodiclora(layer, x):
    c = layer.config
    A, B = torch.cat([*layer.past_a, layer.lora_A_weight]), torch.cat([*layer.past_b, layer.lora_B_weight], 1)
    return c["lora_alpha"] / c["r"] * x @ A.to(x.dtype).T @ B.to(x.dtype).T


def gates(layer):
    return layer.lora_shares.softmax(0) * layer.p + layer.q


def autolora(layer, x):
    return (gates(layer) * (x @ layer.lora_A_weight.T)) @ layer.lora_B_weight.T


def bilora(layer, x):
    c = layer.config
    return c["lora_alpha"] / c["r"] * (layer.lora_sizes * (x @ layer.lora_A_weight.T)) @ layer.lora_B_weight.T


def off_orthogonal(whole):
    grams = [g for l in whole.layers() for g in (l.lora_A_weight @ l.lora_A_weight.T, l.lora_B_weight.T @ l.lora_B_weight)]
    return torch.stack([torch.linalg.norm(g - torch.eye(len(g), dtype=g.dtype)) for g in grams]).mean()


def part(c, step, steps=8):
    """The rows of a step: `lower`, `upper`, or all."""
    if "held_out" not in c or step > round(steps * c.get("search", 1.0)):
        return "all"
    return "upper" if step % 2 == 0 else "lower"


def consumed(c, rows, steps=8, size=2):
    """Rows in the order in which the steps read them."""
    held = c.get("held_out", 0.0)
    upper = [i for i in range(rows) if math.floor((i + 1) * held) > math.floor(i * held)]
    of = {"upper": upper, "lower": [i for i in range(rows) if i not in upper], "all": list(range(rows))}
    order = []
    for n in range(1, steps + 1):
        which = part(c, n, steps)
        turn = n if which == "all" else (n + 1) // 2
        order += of[which][(turn - 1) * size:turn * size]
    assert len(order) == steps * size
    return order


def mixture(layer, x):
    c, shares = layer.config, (x @ layer.lora_router_weight.T).softmax(-1)
    if layer.clock.trains and c.get("balance"):
        real = shares if layer.clock.mask is None else shares * layer.clock.mask.to(shares.dtype)[..., None]
        used = real.sum((0, 1))
        layer.clock.terms.append(used.var() / (used.mean() ** 2 + 1e-10))
    y = 0
    for e in range(c["experts"]):
        own = slice(e * c["r"], (e + 1) * c["r"])
        y = y + shares[..., e:e + 1] * (x @ layer.lora_A_weight[own].T @ layer.lora_B_weight[:, own].T)
    return c["lora_alpha"] / c["r"] * y


def poly(layer, x):
    c, z = layer.config, layer.poly_router_module_logits[:1]
    q, s, r = c["n_splits"], c["n_skills"], c["r"]
    if layer.clock.trains:
        w = philox.words(0, f"{layer.path}.{layer.clock.step}.0", len(x) * q * s)
        u = (w.astype(np.float64) + 0.5) / 2**32
        z = z + torch.from_numpy((np.log(u) - np.log1p(-u)).reshape(len(x), -1)).to(z.dtype)
    z = z.sigmoid().view(-1, q, s)
    shares = z / (z.sum(-1, keepdim=True) + 1e-12)
    A = torch.einsum("bqs,qsdr->bqdr", shares, layer.poly_lora_A).reshape(-1, layer.inn, r)
    B = torch.einsum("bqs,qsrd->bqrd", shares, layer.poly_lora_B).transpose(1, 2).reshape(-1, r, layer.out)
    return x @ A @ B / r


BRANCHES = {"sora": sora, "dylora": dylora, "capaboost": capaboost, "periodiclora": periodiclora, "molora": mixture,
            "autolora": autolora, "bilora": bilora,
            "loramoe": mixture, "poly": poly}


class Whole(nn.Module):
    """The model with its layers; the loss keeps its value, its gradient takes the layers' terms in."""

    def __init__(self, model, clock):
        super().__init__()
        self.model, self.clock = model, clock

    def forward(self, **inputs):
        self.clock.mask, self.clock.terms = inputs.get("attention_mask"), []
        out = self.model(**inputs)
        if self.clock.terms:
            term = self.balance * torch.stack(self.clock.terms).mean()
            out.loss = out.loss + term - term.detach()
        c = self.layers()[0].config
        if self.clock.trains and "orth_reg_weight" in c and part(c, self.clock.step) == "lower":
            out.loss = out.loss + c["orth_reg_weight"] * off_orthogonal(self)
        return out

    def layers(self):
        return [m for m in self.modules() if isinstance(m, Layer)]

    def tensors(self):
        own = {f"{PREFIX}{layer.path}.{k}": v for layer in self.layers() for k, v in layer.named().items()}
        saved = {k: p for k, p in self.model.named_parameters() if p.requires_grad and ".base." not in k}
        return {**own, **{PREFIX + k: p for k, p in saved.items() if not any(k.startswith(l.path + ".") for l in self.layers())}}


def attach(base, method, config, targets, saved, name):
    """Adapts the layers whose paths end in one of `targets`; every trained number is drawn from its name."""
    model, clock = zoo.load(base), Clock()
    for key, p in model.named_parameters():
        p.requires_grad = any(key.startswith(s + ".") for s in saved)
    for path, module in list(model.named_modules()):
        if path.split(".")[-1] in targets and path.split(".")[0] not in saved:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, Layer(module, path, method, config, clock))
    whole = Whole(model, clock)
    whole.balance = config.get("balance", 0.0)
    for key, p in whole.tensors().items():
        width, centre = 0.35, 0.0
        if "lora_A" in key or "router.weight" in key:
            width = (3.0 / p.shape[-1 if "poly" not in key else -2]) ** 0.5
        if "gate" in key:
            width, centre = 0.4, 0.6
        if "lora_sizes" in key:
            width = 1.0
        if "module_logits" in key or "lora_shares" in key:
            width = 1.0
        value = rng("adapter", name, key).uniform(centre - width, centre + width, tuple(p.shape))
        p.data = torch.from_numpy(value).float() + (p.data if "lora" not in key and "router" not in key else 0)
    return whole.eval()


def config_of(base, method, config, targets, saved):
    return {**config, "peft_type": "POLY" if method == "poly" else f"ENGRAFT_{method.upper()}", "task_type": task_of(base),
            "target_modules": sorted(targets), "modules_to_save": saved or None, "base_model_name_or_path": f"models/{base}",
            "inference_mode": True}


def save(tensors, config, path):
    path.mkdir(parents=True)
    write_tensors(path / "adapter_model.safetensors", tensors)
    write_json(path / "adapter_config.json", config)


def reloaded(path, base, method, config, targets, saved):
    whole = attach(base, method, config, targets, saved, "again")
    tensors = tensors_of(path / "adapter_model.safetensors")
    for key, p in whole.tensors().items():
        p.data = tensors.pop(key)
    assert not tensors, tensors.keys()
    return whole


def merged(whole):
    whole = copy.deepcopy(whole)
    for layer in whole.layers():
        layer.fold()
        parent, _, child = layer.path.rpartition(".")
        setattr(whole.model.get_submodule(parent), child, layer.base)
    return whole.model


LORA = dict(r=4, lora_alpha=8, lora_dropout=0.0)
SORA = dict(LORA, **{"lambda": 0.001, "threshold": "lambda"})
DYLORA = dict(LORA, min_r=1, eval_r=None, mode="full")
CAPA = dict(LORA, copies=2, density=0.5, mask_seed=0)
PERIODIC = dict(LORA, stages=3)
MIXED = dict(LORA, r=2, experts=3)
LORAMOE = dict(MIXED, balance=0.1)
AUTO = dict(LORA, search=0.75, held_out=0.3, share_rate=1)
BI = dict(LORA, held_out=0.3, size_rate=1, orth_reg_weight=0.1)
# model, method, variant, settings, targets, trained modules, what it checks
TABLE = [
    ("llama", "sora", None, SORA, QV, [], "queries and values, before gates are folded"),
    ("bert", "sora", None, dict(SORA, threshold="eta_lambda"), ["query", "dense"], ["classifier"], "trained classifier"),
    ("gpt2", "sora", None, SORA, ["c_attn", "c_fc"], [], "stored transposed"),
    ("llama", "dylora", None, DYLORA, QV, [], "the whole rank"),
    ("llama", "dylora_sliced", None, dict(DYLORA, eval_r=2), LINEARS, [], "the first two of four ranks"),
    ("qwen2", "dylora", None, dict(DYLORA, eval_r=1, min_r=1, mode="frozen"), LINEARS, [], "one rank"),
    ("vit", "dylora", None, dict(DYLORA, eval_r=3, min_r=2), QV, ["classifier"], "three ranks, trained classifier"),
    ("llama", "capaboost", None, CAPA, QV, [], "two copies"),
    ("bert", "capaboost", None, dict(CAPA, copies=3, density=0.3, mask_seed=7), ["query", "value"], ["classifier"], "three sparse copies"),
    ("t5", "capaboost", None, dict(CAPA, copies=1, density=0.9), ["q", "wo"], [], "one copy"),
    ("llama", "periodiclora", None, PERIODIC, QV, [], "the first stage"),
    ("bert", "periodiclora", None, dict(PERIODIC, stages=2), ["key"], ["classifier"], "trained classifier"),
    ("llama", "autolora", None, AUTO, QV, [], "shares of ranks, before they are settled"),
    ("bert", "autolora", None, dict(AUTO, r=3), ["query", "dense"], ["classifier"], "trained classifier"),
    ("llama", "bilora", None, BI, QV, [], "sizes apart from directions"),
    ("gpt2", "bilora", None, BI, ["c_attn"], [], "stored transposed"),
    ("llama", "molora", None, MIXED, QV, [], "three experts"),
    ("bert", "molora", None, dict(MIXED, experts=5, r=1), ["query", "value"], ["classifier"], "five experts of one rank"),
    ("t5", "molora", None, MIXED, ["q", "v", "wi"], [], "both sides and across"),
    ("vit", "molora", None, MIXED, ["q_proj", "fc1"], ["classifier"], "rows of pictures"),
    ("llama", "loramoe", None, LORAMOE, ["gate_proj", "up_proj", "down_proj"], [], "the feed-forward matrices"),
    ("qwen3", "loramoe", None, dict(LORAMOE, experts=2), ["down_proj"], [], "two experts"),
    ("gpt2", "loramoe", None, LORAMOE, ["c_fc", "c_proj"], [], "no gate; attention too"),
]


def write_case(base, method, variant, config, targets, saved, checks):
    method, _, more = method.partition("_")
    variant = "_".join(filter(None, [more, variant])) or None
    name = f"{base}__{method}" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    before = tensors_of(INPUTS / base / "base_logits.safetensors")["logits"]
    whole = attach(base, method, config, targets, saved, name)
    logits, rel = forward_both(whole, inputs)
    keep = logits_mask(logits, inputs).bool()
    save(whole.tensors(), config_of(base, method, config, targets, saved), out / "adapter")
    again = forward(reloaded(out / "adapter", base, method, config, targets, saved), inputs)
    merge = method not in ("molora", "loramoe")
    meta = {"case": name, "model": base, "method": method, "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": merge, "tolerance": TOLERANCE, "num_virtual_tokens": 0, "inputs": None, "effect_rel": relative(logits, before),
            "transcription": "tools/golden/low_rank.py", "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": relative(again[keep], logits[keep])}}
    if merge:
        plain = merged(whole)
        with tempfile.TemporaryDirectory() as d:
            plain.save_pretrained(d)
            folded = forward(type(plain).from_pretrained(d, attn_implementation="eager"), inputs)
        folded[~keep] = 0.0
        meta["merge_tolerance"] = TOLERANCE
        meta["self_check"]["merge_rel"] = relative(folded[keep], logits[keep])
        assert meta["self_check"]["merge_rel"] < 1e-5, meta
        write_logits(out / "merged_logits.safetensors", folded, inputs)
    assert rel < 1e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def after_sora(whole, step, optimizer):
    for layer in whole.layers():
        c, g = layer.config, layer.lora_gate.data
        xi = c["lambda"] * (optimizer.param_groups[0]["lr"] if c["threshold"] == "eta_lambda" else 1.0)
        layer.lora_gate.data = g.sign() * (g.abs() - xi).clamp(min=0)


def after_periodic(whole, step, optimizer):
    for layer in whole.layers():
        length = math.ceil(8 / layer.config["stages"])
        if step % length or step >= 8:
            continue
        A, B = layer.lora_A_weight, layer.lora_B_weight
        layer.past_a.append(A.data.clone())
        layer.past_b.append(B.data.clone())
        u = philox.uniform(0, f"{layer.path}.lora_A.weight.stage.{step // length}", tuple(A.shape))
        A.data = torch.from_numpy((2 * u - 1) * np.float32(layer.inn**-0.5)).to(A.dtype)
        B.data = torch.zeros_like(B)
        optimizer.state.pop(A)
        optimizer.state.pop(B)


def after_autolora(whole, step, optimizer):
    for layer in whole.layers():
        c, A, B = layer.config, layer.lora_A_weight, layer.lora_B_weight
        if step != round(8 * c["search"]):
            continue
        kept = layer.lora_shares.softmax(0) >= (1 - 1e-5) / c["r"]
        layer.q = kept.to(A.dtype) * c["lora_alpha"] / c["r"]
        layer.p = torch.zeros_like(layer.q)
        u = philox.uniform(0, f"{layer.path}.lora_A.weight.settled", tuple(A.shape))
        A.data = torch.from_numpy((2 * u - 1) * np.float32(layer.inn**-0.5)).to(A.dtype)
        B.data = torch.zeros_like(B)
        optimizer.state.pop(A)
        optimizer.state.pop(B)


AFTER = {"sora": after_sora, "periodiclora": after_periodic, "autolora": after_autolora}
UPPER = {"autolora": "lora_shares", "bilora": "lora_sizes"}


def before_update(whole, step, optimizer):
    method, c = whole.layers()[0].method, whole.layers()[0].config
    if method in UPPER:
        for key, p in whole.named_parameters():
            if key.endswith(UPPER[method]) != (part(c, step) == "upper"):
                p.grad = None
    if method == "sora":
        # AdamW decays everything; what it takes from the gates is given before.
        group = optimizer.param_groups[0]
        for layer in whole.layers():
            layer.lora_gate.data /= 1 - group["lr"] * group["weight_decay"]


def after_update(whole, step, optimizer):
    AFTER.get(whole.layers()[0].method, lambda *_: None)(whole, step, optimizer)
    whole.clock.step = step + 1


def fold(tensors, a, b, gate):
    """A and B of the ranks that `gate` leaves on, at least one, the gate multiplied into A."""
    kept = gate != 0
    kept[0] |= not kept.any()
    tensors[a], tensors[b] = (gate[:, None] * tensors[a])[kept], tensors[b][:, kept]
    return int(kept.sum())


def finished(whole):
    """The tensors that a run leaves, and what they are."""
    tensors, ranks = {k: v.data for k, v in whole.tensors().items()}, []
    for layer in whole.layers():
        a, b = f"{PREFIX}{layer.path}.lora_A.weight", f"{PREFIX}{layer.path}.lora_B.weight"
        if layer.method == "sora":
            ranks.append(fold(tensors, a, b, tensors.pop(f"{PREFIX}{layer.path}.lora_gate")))
        if layer.method == "autolora":
            tensors.pop(f"{PREFIX}{layer.path}.lora_shares")
            ranks.append(fold(tensors, a, b, gates(layer).data * layer.config["r"] / layer.config["lora_alpha"]))
        if layer.method == "bilora":
            tensors[a] = tensors.pop(f"{PREFIX}{layer.path}.lora_sizes")[:, None] * tensors[a]
        if layer.method == "periodiclora":
            tensors[a], tensors[b] = torch.cat([*layer.past_a, tensors[a]]), torch.cat([*layer.past_b, tensors[b]], 1)
    if ranks:
        print("ranks", ranks)
        assert len(set(ranks)) > 1, ranks
    plain = whole.layers()[0].method in ("sora", "periodiclora", "autolora", "bilora")
    return tensors, {"peft_type": "LORA"} if plain else {}


# name -> (batches, options of training, settings, targets, trained modules)
TRAINED = {
    "llama__sora": ("full", {}, dict(SORA, **{"lambda": 0.05}), QV, []),
    "bert__sora_eta": ("padded", dict(learning_rate=5e-3, weight_decay=0.1, schedule="linear"),
                       dict(SORA, threshold="eta_lambda", **{"lambda": 15.0}), ["query", "value"], ["classifier"]),
    "llama__dylora": ("full", {}, DYLORA, QV, []),
    "qwen2__dylora_frozen": ("padded", dict(learning_rate=5e-3), dict(DYLORA, min_r=2, mode="frozen"), QV, []),
    "llama__capaboost": ("full", {}, CAPA, QV, []),
    "llama__periodiclora": ("full", {}, PERIODIC, QV, []),
    "bert__periodiclora": ("padded", dict(learning_rate=5e-3, max_grad_norm=0.5), dict(PERIODIC, stages=2), ["query", "value"], ["classifier"]),
    "llama__autolora": ("full", dict(learning_rate=5e-3), AUTO, QV, []),
    "bert__bilora": ("padded", dict(learning_rate=5e-3, max_grad_norm=0.5), BI, ["query", "value"], ["classifier"]),
    "llama__molora": ("padded", {}, MIXED, QV, []),
    "llama__loramoe": ("padded", {}, dict(LORAMOE, balance=1.0), ["gate_proj", "up_proj", "down_proj"], []),
    "llama__poly": ("padded", {}, dict(r=4, n_skills=3, n_splits=2, n_tasks=1), QV, []),
}


def attempt(name, out, salt):
    kind, options, config, targets, saved = TRAINED[name]
    base, method = name.split("__")
    method = method.split("_")[0]
    o = {**DEFAULTS, **options}
    rows = 28 if "held_out" in config else o["steps"] * o["batch_size"]
    data = batches(name + salt, base, kind, rows)
    read = {k: v[consumed(config, rows)] for k, v in data.items()}
    whole = attach(base, method, config, targets, saved, "trajectory/" + name)
    whole.clock.trains, whole.before_update, whole.after_update = True, before_update, after_update
    file = config_of(base, method, config, targets, saved)
    if method == "poly":
        file.update(init_weights=True, poly_type="poly")
    save(whole.tensors(), file, out / "init_adapter")
    expected = trajectory(whole, read, zoo.is_causal(base), **options)
    if not well_posed(expected):
        return False
    tensors, own = finished(whole)
    save(tensors, {**file, **own}, out / "final_adapter")
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": method, "notes": None,
                                       "transcription": "tools/golden/low_rank.py", "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
