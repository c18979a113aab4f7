"""S4 (Chen et al. 2023, arXiv:2301.01821): layers in four groups, each with its own kinds of change, in PyTorch.

- Each stack's layers are dealt out to four groups, those nearest the input first; group g ends at the layer nearest to L
  times the sum of the first shares.
- A: relu bottleneck after the MLP, N(u + g + A(N(u + g))), N the norm of a post-norm model, u + g the stream; L: LoRA at
  q and v of self-attention, alpha = r (an attention across stacks has none: its roles are `cross.q` and `cross.v`); P: keys
  and values before those of self-attention, tokens keep their positions; B: biases, new values.
- Every layer gets budget * (numbers of the model) / (layers). Biases are as they are; of the rest each other kind gets an
  equal part, the one with the most numbers in a unit (of width, length or rank) first, to the nearest whole number of
  units. What it leaves goes to the next.
"""

import copy
import math

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import zoo
from batches import batches
from cases import task_of
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, relative, rng, tensors_of, write_json,
                    write_logits, write_tensors)
from training import DEFAULTS, trajectory, well_posed

PREFIX = "base_model.model."
SHARES = {"spindle": (1, 2, 2, 1), "increasing": (1, 2, 3, 4), "uniform": (1, 1, 1, 1), "decreasing": (4, 3, 2, 1),
          "bottleneck": (2, 1, 1, 2)}
FOUND = ["AL", "AP", "APB", "PBL"]
FOUND_AT = lambda grouping, budget: dict(budget=budget, grouping=grouping, strategies=FOUND)
# model, variant, side, settings, what it checks
TABLE = [
    ("bert", None, "", FOUND_AT("spindle", 0.1), "the middle groups: adapters and prefixes, biases in the second layer"),
    ("llama_bias", "bottleneck", "_left", FOUND_AT("bottleneck", 0.1), "the outer groups, grouped-query attention, padding on the left"),
    ("t5_uneven", "increasing", "", FOUND_AT("increasing", 0.12), "stacks grouped by themselves, prefixes in relative positions"),
]


def attend(module, query, key, value, mask, scaling=None, position_bias=None, **_):
    """Plain attention; the rows `module.rows` come before keys and values, and every token sees them."""
    rows, bias = getattr(module, "rows", None), position_bias
    if rows is not None:
        n, tokens = rows[0].shape[2], query.shape[2]
        key, value = torch.cat([rows[0], key], 2), torch.cat([rows[1], value], 2)
        if mask is not None:
            mask = torch.cat([mask.new_zeros(*mask.shape[:3], n), mask], 3)
        if bias is not None:
            # Rows are at -n to -1, tokens from 0 on.
            distance = torch.arange(-n, 0)[None] - torch.arange(tokens)[:, None]
            table = module.table[0]
            bucket = table._relative_position_bucket(
                distance, bidirectional=not table.is_decoder, num_buckets=table.relative_attention_num_buckets,
                max_distance=table.relative_attention_max_distance)
            own = table.relative_attention_bias(bucket).permute(2, 0, 1)[None]
            bias = torch.cat([own, bias[..., -(key.shape[2] - n):]], 3)
    repeat = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeat, 1).transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + mask.clamp(min=-1e9).to(scores.dtype)
    return (scores.softmax(-1) @ value.repeat_interleave(repeat, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("s4", attend)
AttentionMaskInterface.register("s4", eager_mask)


def group(shares, place, count):
    """The group of layer `place` of `count`; ties go up."""
    ends = [math.floor(count * sum(shares[:g + 1]) / sum(shares) + 0.5) for g in range(4)]
    return next(g for g in range(4) if place < ends[g])


def sizes(letters, each, width, row, rank, biases):
    """Units of A, P and L that take `each` numbers, biases included."""
    rest = each - (biases if "B" in letters else 0)
    units = [(2 * width + 1, width, "A"), (row, 0, "P"), (rank, 0, "L")]
    units = sorted((u for u in units if u[2] in letters), key=lambda u: -u[0])
    part, carried, out = rest / max(1, len(units)), 0.0, {}
    for unit, fixed, letter in units:
        target = part + carried
        out[letter] = max(1, math.floor((target - fixed) / unit + 0.5))
        carried = target - fixed - out[letter] * unit
    return out


class Layer:
    """Where the kinds of change go in one layer."""

    def __init__(self, model, base, module, place, count, table=None):
        self.module, self.place, self.count, self.table = module, place, count, table
        path = next(n for n, m in model.named_modules() if m is module)
        if base.startswith("bert"):
            self.attention, self.mlp, self.stem = module.attention.self, module.output, f"{path}.output.adapters.engraft"
            self.linears = [module.attention.self.query, module.attention.self.value]
        elif base.startswith("t5"):
            self.attention, self.mlp = module.layer[0].SelfAttention, module.layer[-1]
            self.stem = f"{path}.layer.{len(module.layer) - 1}.adapters.engraft"
            self.linears = [self.attention.q, self.attention.v]
        else:
            self.attention, self.mlp, self.stem = module.self_attn, module, f"{path}.output_adapters.adapters.engraft"
            self.linears = [module.self_attn.q_proj, module.self_attn.v_proj]
        self.path = path


def layers(model, base):
    if base.startswith("bert"):
        stacks = [(model.bert.encoder.layer, None)]
    elif base.startswith("t5"):
        stacks = [(s.block, s.block[0].layer[0].SelfAttention) for s in (model.encoder, model.decoder)]
    else:
        stacks = [(model.model.layers, None)]
    return [Layer(model, base, m, i, len(blocks), table) for blocks, table in stacks for i, m in enumerate(blocks)]


class S4(nn.Module):
    def __init__(self, base, config):
        super().__init__()
        self.base, self.config, self.model = base, config, zoo.load(base)
        model, c = self.model, self.model.config
        model.config.use_cache = False
        model.set_attn_implementation("s4")
        for m in model.modules():
            m._supports_sdpa = False  # in f64 too
        total = sum(p.numel() for p in model.parameters())
        for p in model.parameters():
            p.requires_grad = False
        self.heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        self.dim = getattr(c, "d_kv", None) or getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.own, self.plans, names = nn.ParameterDict(), [], {m: n for n, m in model.named_modules()}
        found = layers(model, base)
        for layer in found:
            letters = config["strategies"][group(SHARES[config["grouping"]], layer.place, layer.count)]
            biases = [p for n, p in layer.module.named_parameters() if n.endswith(".bias")]
            plan = sizes(letters, config["budget"] * total / len(found), c.hidden_size, 2 * self.heads * self.dim,
                         sum(sum(m.weight.shape) for m in layer.linears), sum(p.numel() for p in biases))
            self.plans.append(plan)
            for p in biases if "B" in letters else []:
                p.requires_grad = True
            d, k = c.hidden_size, plan.get("A")
            if k:
                for part, shape in {"down.0.weight": (k, d), "down.0.bias": (k,), "up.weight": (d, k), "up.bias": (d,)}.items():
                    self.new(f"{layer.stem}.adapter_{part}", *shape)
            for m in layer.linears if "L" in plan else []:
                self.new(f"{names[m]}.lora_A.weight", plan["L"], m.weight.shape[1])
                self.new(f"{names[m]}.lora_B.weight", m.weight.shape[0], plan["L"])
        for length in sorted({plan["P"] for plan in self.plans if "P" in plan}):
            having = [layer for layer, plan in zip(found, self.plans) if plan.get("P") == length]
            self.new(self.pool(having[0], length), length * len(having) * 2 * self.heads * self.dim)

    def pool(self, first, length):
        trunk = first.path.split(".")[0]
        return f"{'' if trunk == 'encoder' else trunk + '.'}prefix_tuning.prefix_tunings.of_{length}.self_prefix.control_trans"

    def new(self, name, *shape):
        self.own[name.replace(".", "|")] = nn.Parameter(torch.zeros(*shape))

    def get(self, name):
        return self.own[name.replace(".", "|")]

    def named(self):
        out = {PREFIX + k.replace("|", "."): p for k, p in self.own.items()}
        out.update({PREFIX + k: p for k, p in self.model.named_parameters() if p.requires_grad})
        return out

    def after_mlp(self, layer):
        """A(y), and for BERT once more through the norm."""
        part = lambda name: self.get(f"{layer.stem}.adapter_{name}")
        added = lambda y: (y @ part("down.0.weight").T + part("down.0.bias")).relu() @ part("up.weight").T + part("up.bias")

        def change(module, args, y):
            if self.base.startswith("bert"):
                return module.LayerNorm(args[1] + module.dense(args[0]) + added(y))
            return (y[0] + added(y[0]), *y[1:]) if isinstance(y, tuple) else y + added(y)
        return change

    def low_rank(self, name):
        a, b = self.get(f"{name}.lora_A.weight"), self.get(f"{name}.lora_B.weight")
        return lambda _module, args, y: y + args[0] @ a.T @ b.T

    def forward(self, **inputs):
        found, hooks = layers(self.model, self.base), []
        names = {m: n for n, m in self.model.named_modules()}
        count = len(inputs["input_ids"])
        for layer, plan in zip(found, self.plans):
            if "A" in plan:
                hooks.append(layer.mlp.register_forward_hook(self.after_mlp(layer)))
            for m in layer.linears if "L" in plan else []:
                hooks.append(m.register_forward_hook(self.low_rank(names[m])))
        for length in {plan["P"] for plan in self.plans if "P" in plan}:
            having = [layer for layer, plan in zip(found, self.plans) if plan.get("P") == length]
            rows = self.get(self.pool(having[0], length)).view(length, len(having), 2, self.heads, self.dim)
            for i, layer in enumerate(having):
                layer.attention.rows = [rows[:, i, half].transpose(0, 1)[None].expand(count, -1, -1, -1) for half in (0, 1)]
                layer.attention.table = [layer.table]  # a list, so that it is no second owner of the module
        try:
            return self.model(**inputs)
        finally:
            for h in hooks:
                h.remove()
            for layer in found:
                for name in ("rows", "table"):
                    layer.attention.__dict__.pop(name, None)


def attach(base, config, name):
    model = S4(base, config)
    for key, p in model.named().items():
        width = 1.5 if key.endswith("control_trans") else (3.0 / p.shape[-1]) ** 0.5 if p.ndim > 1 else 0.25
        p.data = p.data + torch.from_numpy(rng("adapter", name, key).uniform(-width, width, tuple(p.shape))).float()
    return model.eval()


def save(model, path):
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / "adapter_model.safetensors", model.named())
    write_json(path / "adapter_config.json", {
        "peft_type": "ENGRAFT_S4", "task_type": task_of(model.base), "modules_to_save": None, "inference_mode": True,
        "base_model_name_or_path": f"models/{model.base}", **model.config})


def reloaded(base, config, path):
    model, tensors = S4(base, config), tensors_of(path / "adapter_model.safetensors")
    for key, p in model.named().items():
        p.data = tensors.pop(key)
    assert not tensors
    return model.eval()


def write_case(base, variant, side, config, checks):
    name = f"{base}__s4" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / f"inputs{side}.safetensors")
    before = tensors_of(INPUTS / base / f"base_logits{side}.safetensors")
    model = attach(base, config, name)
    logits, rel = forward_both(model, inputs)
    save(model, out / "adapter")
    keep, again = before["mask"].bool(), forward(reloaded(base, config, out / "adapter"), inputs)
    meta = {"case": name, "model": base, "method": "s4", "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": False, "tolerance": TOLERANCE, "num_virtual_tokens": 0, "inputs": f"inputs{side}.safetensors" if side else None,
            "effect_rel": relative(logits, before["logits"]), "sizes": model.plans, "transcription": "tools/golden/s4.py",
            "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": relative(again[keep], logits[keep])}}
    assert rel < 2e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: {model.plans}, effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


# name -> kind of batches, options, settings
TRAINED = {"bert__s4": ("padded", dict(learning_rate=3e-3), FOUND_AT("bottleneck", 0.1))}


def attempt(name, out, salt):
    base, (kind, options, config) = name.split("__")[0], TRAINED[name]
    o = {**DEFAULTS, **options}
    data = batches(name + salt, base, kind, o["steps"] * o["batch_size"])
    model = attach(base, config, "trajectory/" + name)
    save(copy.deepcopy(model), out / "init_adapter")
    expected = trajectory(model, data, zoo.is_causal(base), **options)
    if not well_posed(expected):
        return False
    save(model, out / "final_adapter")
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": "s4", "notes": None,
                                       "transcription": "tools/golden/s4.py", "transformers": transformers.__version__, **expected})
    print(f"{name}: {model.plans}, {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    torch.set_num_threads(1)
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
