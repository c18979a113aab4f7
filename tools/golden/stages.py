"""Methods that train whole tensors, all or in turn, and those of two stages: transcriptions in PyTorch.

- top_layers: the last blocks, what follows them and the head. - lisa (Pan et al. 2024): random blocks, embeddings and head.
- child_tuning F (Xu et al. 2021): gradients times m / p, m ~ Bernoulli(p) anew in every step.
- lt_sft (Ansell et al. 2022): W + D trained whole, then zeros at the k places of the largest |D|, trained alone.
- diff_pruning (Guo et al. 2021): W + z * w with hard-concrete gates z, then the k largest |z w|, trained on.
- far (Vucetic et al. 2022): W + D of the feed-forward layers, then the rows of the largest |D|_1 and their biases.
- gps (Zhang et al. 2024): the K inputs of every neuron with the largest gradient of a contrastive loss, and biases.
- spt (He et al. 2023): entries of the largest squared gradients, or a low-rank product where a matrix has many of them.
- rosa (Nikdan et al. 2024): a low-rank product beside values at the k places of the largest squared gradients.

The second stage has an optimizer of its own. Random numbers are those of Philox 4x32-10 by seed, stream (FNV-1a of the tensor's
name, xor the step) and element, as the engine draws them. New values are saved as `base_model.model.<path>`.
"""

import copy
import math
import tempfile

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from torch.nn.utils import parametrize

import masks
import zoo
from batches import batches
from cases import task_of
from common import (CASES, INPUTS, TOLERANCE, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of, write_json,
                    write_logits, write_tensors)
from masks import MASKS, PREFIX, fnv, highest, linears, parts
from training import DEFAULTS, label_count

MLP = ["gate_proj", "up_proj", "down_proj"]


def words(seed, stream, count):
    """`count` words of 32 bits."""
    blocks = np.arange((count + 3) // 4, dtype=np.uint64)
    low, full = np.uint64(0xFFFFFFFF), np.uint64(32)
    ones = np.ones_like(blocks)
    a, b = blocks & low, blocks >> full
    c, d = ones * np.uint64(stream & 0xFFFFFFFF), ones * np.uint64(stream >> 32)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        x, y = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (y >> full) ^ b ^ np.uint64(k0), y & low, (x >> full) ^ d ^ np.uint64(k1), x & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([a, b, c, d], 1).reshape(-1)[:count]


def uniform(seed, stream, shape):
    count = int(np.prod(shape))
    return torch.from_numpy(((words(seed, stream, count) >> np.uint64(8)) * 2.0 ** -24).astype(np.float32)).reshape(shape)


# Whole tensors.

def blocks_of(name):
    """(stack, number of the block), or None outside the blocks."""
    at = name.split(".")
    for i, part in enumerate(at[:-1]):
        if part in ("layers", "layer", "block", "h") and at[i + 1].isdigit():
            return ".".join(at[:i]), int(at[i + 1])
    return None


def top(base, layers, head):
    names = [n for n, _ in zoo.load(base).named_parameters()]
    stack = "decoder.block" if base.startswith("t5") else None
    own = [blocks_of(n) for n in names if blocks_of(n) and (not stack or n.startswith(stack))]
    first, after = max(b[1] for b in own) + 1 - layers, max(i for i, n in enumerate(names) if blocks_of(n) in own)

    def chosen(i, name):
        block = blocks_of(name)
        if block:
            return block in own and block[1] >= first
        return head and i > after and not (base.startswith("t5") and name.startswith("encoder"))
    return [n for i, n in enumerate(names) if chosen(i, n)]


# model, method, variant, trained parameters, configuration, what it checks
WHOLE = [
    ("llama", "top_layers", None, lambda: top("llama", 1, True), dict(blocks=1, head=True), "the last block, the last norm and the head"),
    ("llama_tied", "top_layers", None, lambda: top("llama_tied", 2, True), dict(blocks=2, head=True), "a tied head stays"),
    ("bert", "top_layers", None, lambda: top("bert", 1, True), dict(blocks=1, head=True), "the pooler and the classifier too"),
    ("roberta", "top_layers", "no_head", lambda: top("roberta", 1, False), dict(blocks=1, head=False), "the last block alone"),
    ("t5", "top_layers", None, lambda: top("t5", 1, True), dict(blocks=1, head=True), "the decoder's last block and norm"),
    ("vit", "top_layers", None, lambda: top("vit", 1, True), dict(blocks=1, head=True), "the last block, the last norm and the classifier"),
    ("llama", "lisa", None, lambda: [n for n, _ in zoo.load("llama").named_parameters()], dict(active_blocks=1, interval=3), "every tensor"),
    ("bert", "child_tuning", "free", lambda: [f"{p}.weight" for p in linears(zoo.load("bert"), ["query", "value"])],
     dict(variant="F", share=0.3, target_modules=["query", "value"]), "two of the linears"),
]


def config_of(base, method, config):
    return {"peft_type": f"ENGRAFT_{method.upper()}", "task_type": task_of(base), "modules_to_save": None,
            "base_model_name_or_path": f"models/{base}", "inference_mode": True, **config}


def save(path, base, method, tensors, config):
    path.mkdir(parents=True)
    write_tensors(path / "adapter_model.safetensors", {PREFIX + k: v for k, v in tensors.items()})
    write_json(path / "adapter_config.json", config_of(base, method, config))


def write_case(model, base, method, variant, tensors, config, checks):
    """The case of `model`, whose weights have been changed as the adapter says."""
    name = f"{base}__{method}" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs, before = (tensors_of(INPUTS / base / f"{f}.safetensors") for f in ("inputs", "base_logits"))
    logits, rel = forward_both(model, inputs)
    save(out / "adapter", base, method, tensors, config)
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
            "effect_rel": relative(logits, before["logits"]), "transcription": "tools/golden/stages.py",
            "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "merge_rel": relative(whole[keep], logits[keep])}}
    assert rel < 1e-5 and meta["self_check"]["merge_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_logits(out / "merged_logits.safetensors", whole, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def whole_case(base, method, variant, names, config, checks):
    model, case = zoo.load(base), f"{base}__{method}_{variant}"
    params = dict(model.named_parameters())
    for n in names():
        params[n].data += torch.from_numpy(rng("adapter", case, n).uniform(-0.2, 0.2, tuple(params[n].shape))).float()
    write_case(model, base, method, variant, {n: params[n].detach().clone() for n in names()}, config, checks)


# Sparse changes, low-rank products and rows.

def spread(layers, share, case):
    """Random ascending places of all layers together."""
    total = sum(m.weight.numel() for m in layers.values())
    return torch.sort(torch.from_numpy(rng("places", case).permutation(total)[:max(1, int(share * total))])).values


def scatter(layers, places, values):
    """Adds values at places numbered through the layers."""
    at = 0
    for m in layers.values():
        own = (places >= at) & (places < at + m.weight.numel())
        m.weight.data.view(-1)[places[own] - at] += values[own]
        at += m.weight.numel()


def sparse_case(base, method, names, config, checks):
    model, case = zoo.load(base), f"{base}__{method}"
    layers = linears(model, names)
    places = spread(layers, config["density"], case)
    values = torch.from_numpy(rng("adapter", case).uniform(-0.4, 0.4, len(places))).float()
    scatter(layers, places, values)
    write_case(model, base, method, None, {"sparse_values": values, "sparse_indices": places},
               {**config, "target_modules": names or "all-linear"}, checks)


def far_case(base, names, nodes, checks):
    model, case, tensors = zoo.load(base), f"{base}__far", {}
    for path, m in linears(model, names).items():
        out, inn = m.weight.shape
        g = rng("adapter", case, path)
        rows = torch.from_numpy(np.sort(g.permutation(out)[:max(1, int(nodes * out))]))
        values = torch.from_numpy(g.uniform(-0.4, 0.4, (len(rows), inn))).float()
        m.weight.data[rows] += values
        tensors[f"{path}.sparse_values"] = values.flatten()
        tensors[f"{path}.sparse_indices"] = (rows[:, None] * inn + torch.arange(inn)).flatten()
        if m.bias is not None:
            bias = torch.from_numpy(g.uniform(-0.4, 0.4, len(rows))).float()
            m.bias.data[rows] += bias
            tensors[f"{path}.far_bias"] = bias
    write_case(model, base, "far", None, tensors, dict(nodes=nodes, rewind=False, target_modules=names), checks)


def rosa_case(base, names, config, checks):
    model, case, tensors = zoo.load(base), f"{base}__rosa", {}
    for path, m in linears(model, names).items():
        (out, inn), r = m.weight.shape, config["rank"]
        g = rng("adapter", case, path)
        a, b = (torch.from_numpy(g.uniform(-0.3, 0.3, s)).float() for s in ((r, inn), (out, r)))
        places = torch.from_numpy(np.sort(g.permutation(out * inn)[:max(1, int(config["density"] * out * inn))]))
        values = torch.from_numpy(g.uniform(-0.4, 0.4, len(places))).float()
        m.weight.data += config["alpha"] / r * b @ a
        m.weight.data.view(-1)[places] += values
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b, f"{path}.sparse_values": values,
                    f"{path}.sparse_indices": places}
    write_case(model, base, "rosa", None, tensors, {**config, "target_modules": names}, checks)


def gps_case(base, names, config, checks):
    model, case, tensors = zoo.load(base), f"{base}__gps", {}
    for path, m in linears(model, names).items():
        out, inn = m.weight.shape
        g = rng("adapter", case, path)
        columns = np.sort(np.stack([g.permutation(inn)[:config["inputs"]] for _ in range(out)]), 1)
        places = torch.from_numpy((columns + np.arange(out)[:, None] * inn).reshape(-1))
        values = torch.from_numpy(g.uniform(-0.4, 0.4, len(places))).float()
        m.weight.data.view(-1)[places] += values
        tensors |= {f"{path}.sparse_values": values, f"{path}.sparse_indices": places}
        if m.bias is not None:
            m.bias.data += torch.from_numpy(g.uniform(-0.2, 0.2, out)).float()
            tensors[f"{path}.bias"] = m.bias.detach().clone()
    write_case(model, base, "gps", None, tensors, {**config, "target_modules": names or "all-linear"}, checks)


def spt_case(base, names, config, structured, checks):
    """The matrices whose path ends in one of `structured` have products, the others a common vector of values."""
    model, case, tensors, at, places = zoo.load(base), f"{base}__spt", {}, 0, []
    layers = linears(model, names)
    products = [p for p in layers if any(p.endswith(s) for s in structured)]
    for path, m in layers.items():
        (out, inn), r, g = m.weight.shape, config["rank"], rng("adapter", case, path)
        if path in products:
            a, b = (torch.from_numpy(g.uniform(-0.3, 0.3, s)).float() for s in ((r, inn), (out, r)))
            m.weight.data += b @ a
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        else:
            places.append(torch.from_numpy(np.sort(g.permutation(out * inn)[:20])) + at)
        at += out * inn
    places = torch.cat(places)
    values = torch.from_numpy(rng("adapter", case).uniform(-0.4, 0.4, len(places))).float()
    scatter(layers, places, values)
    tensors |= {"sparse_values": values, "sparse_indices": places}
    write_case(model, base, "spt", None, tensors, {**config, "structured": products, "entries": len(places), "target_modules": names}, checks)


# Runs.

def steps(model, data, o, causal, which, optimizer, extra=None, touch=None):
    """Optimizer steps `which`, from 1; `extra(step)` is added to the loss, `touch(step)` may change gradients. Losses."""
    losses, size, many = [], o["batch_size"], o["gradient_accumulation"]
    for step in which:
        micro = [{k: v[i * size:(i + 1) * size] for k, v in data.items()} for i in range((step - 1) * many, step * many)]
        counts = [label_count(model, b, causal) for b in micro]
        total = 0.0
        for b, n in zip(micro, counts):
            model.now = step
            loss = model(**b).loss * (n / sum(counts))
            loss.backward()
            total += float(loss.detach())
        if extra:
            more = extra(step)
            more.backward()
            total += float(more.detach())
        if touch:
            touch(step)
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def adam(groups, o):
    return torch.optim.AdamW(groups, lr=o["learning_rate"], betas=(0.9, 0.999), eps=1e-8, weight_decay=o["weight_decay"])


class Change(torch.nn.Module):
    """W + D, or W + z * w."""

    def __init__(self, model, path, shape, gates=None):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(shape))
        self.model, self.path, self.gates = [model], path, gates
        if gates:
            self.gate = torch.nn.Parameter(torch.full(shape, 5.0))
            self.group_gate = torch.nn.Parameter(torch.full((1,), 5.0)) if gates != "none" else None

    def z(self, a, part, step):
        s = a
        if step:
            u = 1e-4 + (1 - 2e-4) * uniform(0, fnv(f"{self.path}.{part}") ^ step, a.shape)
            s = u.log() - (1 - u).log() + a
        return (s.sigmoid() * 3.0 - 1.5).clamp(0, 1)

    def change(self, step):
        if not self.gates:
            return self.w
        z = self.z(self.gate, "gate", step)
        if self.group_gate is not None:
            z = z * self.z(self.group_gate, "group_gate", step)
        return z * self.w

    def forward(self, weight):
        return weight + self.change(self.model[0].now)


def frozen(base):
    model = zoo.load(base)
    for p in model.parameters():
        p.requires_grad_(False)
    model.now = 0
    return model


def dense(model, layers, gates=None):
    out = {}
    for path, m in layers.items():
        out[path] = Change(model, path, m.weight.shape, gates)
        parametrize.register_parametrization(m, "weight", out[path])
    return out


def by_margin(scores, k):
    """The k highest, clearly above the next."""
    order = torch.sort(scores, descending=True, stable=True)
    a, b = float(order.values[k - 1]), float(order.values[k])
    assert a - b > 3e-5 * a, f"{a} and {b} are too near"
    return torch.sort(order.indices[:k]).values


def two_stages(base, names, o, causal, data, config, share, gates=None):
    model = frozen(base)
    changes = dense(model, linears(model, names), gates)
    own = [c.w for c in changes.values()]
    groups, extra = [{"params": own}], None
    if gates:
        open_ = [p for c in changes.values() for p in (c.gate, c.group_gate) if p is not None]
        groups.append({"params": open_, "lr": o["learning_rate"] * config["gate_rate"], "weight_decay": 0.0})

        def extra(step):
            total = 0.0
            for c in changes.values():
                own, group = c.gate.sigmoid().sum(), None if c.group_gate is None else c.group_gate.sigmoid().sum()
                total += own if group is None else own * group if gates == "product" else own + c.w.numel() * group
            return config["penalty"] * total
    last = max(1, int(share * o["steps"]))
    losses = steps(model, data, o, causal, range(1, last + 1), adam(groups, o), extra)
    final = [c.change(0).detach() for c in changes.values()]
    flat = torch.cat([f.flatten() for f in final])
    places = by_margin(flat.abs(), max(1, int(config["density"] * len(flat))))
    start = flat[places] if gates else torch.zeros(len(places))
    at, split = 0, {}
    for path, f in zip(changes, final):
        mine = (places >= at) & (places < at + f.numel())
        split[path] = (places[mine] - at, start[mine])
        at += f.numel()
    model = masks.attach(zoo.load(base), {p: s[0] for p, s in split.items()}, lambda path, _: split[path][1].clone())
    model.now = 0
    values = [p for p in model.parameters() if p.requires_grad]
    losses += steps(model, data, o, causal, range(last + 1, o["steps"] + 1), adam(values, o))
    return losses, {"sparse_values": torch.cat([v.detach() for v in values]), "sparse_indices": places}


def far_run(base, names, o, causal, data, config, share):
    model = frozen(base)
    changes = dense(model, linears(model, names))
    last = max(1, int(share * o["steps"]))
    losses = steps(model, data, o, causal, range(1, last + 1), adam([c.w for c in changes.values()], o))
    chosen, tensors = {}, {}
    for path, c in changes.items():
        out, inn = c.w.shape
        rows = by_margin(c.w.detach().abs().sum(1), max(1, int(config["nodes"] * out)))
        places = (rows[:, None] * inn + torch.arange(inn)).flatten()
        start = torch.zeros(len(places)) if config["rewind"] else c.w.detach().flatten()[places].clone()
        chosen[path], tensors[f"{path}.sparse_indices"] = (places, start, rows), places
    model = masks.attach(zoo.load(base), {p: c[0] for p, c in chosen.items()}, lambda path, _: chosen[path][1])
    model.now, values, modules = 0, {}, dict(model.named_modules())
    for path, (_, _, rows) in chosen.items():
        values[f"{path}.sparse_values"] = modules[path].parametrizations.weight[0].values
        if modules[path].bias is not None:
            bias = masks.Added(rows, torch.zeros(len(rows)))
            parametrize.register_parametrization(modules[path], "bias", bias)
            values[f"{path}.far_bias"] = bias.values
    losses += steps(model, data, o, causal, range(last + 1, o["steps"] + 1), adam(list(values.values()), o))
    return losses, {**tensors, **{k: v.detach() for k, v in values.items()}}


class Rosa(torch.nn.Module):
    def __init__(self, path, shape, rank, alpha, places):
        super().__init__()
        out, inn = shape
        start = (2 * uniform(0, fnv(f"{path}.lora_A.weight"), (rank, inn)) - 1) / math.sqrt(inn)
        self.a, self.b = torch.nn.Parameter(start), torch.nn.Parameter(torch.zeros(out, rank))
        self.values, self.places, self.scale = torch.nn.Parameter(torch.zeros(len(places))), places, alpha / rank

    def forward(self, w):
        sparse = torch.zeros_like(w).flatten().index_put((self.places,), self.values).reshape(w.shape)
        return w + self.scale * self.b @ self.a + sparse


def rosa_run(base, names, o, causal, data, config):
    if config["warmup"]:
        return rosa_warm_run(base, names, o, causal, data, config)
    model = zoo.load(base)
    scores = masks.score(model, linears(model, names), "squares", data, o["batch_size"], config["batches"], causal)
    places = masks.chosen(scores, "tensor", config["density"])
    model, tensors = frozen(base), {}
    for path, m in linears(model, names).items():
        own = Rosa(path, m.weight.shape, config["rank"], config["alpha"], places[path])
        parametrize.register_parametrization(m, "weight", own)
        tensors |= {f"{path}.lora_A.weight": own.a, f"{path}.lora_B.weight": own.b, f"{path}.sparse_values": own.values}
    losses = steps(model, data, o, causal, range(1, o["steps"] + 1), adam(list(tensors.values()), o))
    return losses, {**{k: v.detach() for k, v in tensors.items()}, **{f"{p}.sparse_indices": at for p, at in places.items()}}


def rosa_warm_run(base, names, o, causal, data, config):
    """The product alone for `warmup` steps; the squared gradient of W' in the last of them chooses the places."""
    model, owns, tensors = frozen(base), {}, {}
    for path, m in linears(model, names).items():
        own = Rosa(path, m.weight.shape, config["rank"], config["alpha"], torch.arange(0))
        parametrize.register_parametrization(m, "weight", own)
        own.dense = torch.nn.Parameter(torch.zeros_like(m.weight.detach()))
        own.sum = lambda w, own=own: w + own.scale * own.b @ own.a + own.dense
        own.forward = own.sum
        owns[path] = own
    product = [t for own in owns.values() for t in (own.a, own.b)]
    optimizer = adam(product, o)
    seen = {}

    def touch(step):
        if step == config["warmup"]:
            seen.update({path: own.dense.grad.clone() ** 2 for path, own in owns.items()})
        for own in owns.values():
            own.dense.grad = None

    losses = steps(model, data, o, causal, range(1, config["warmup"] + 1), optimizer, touch=touch)
    places = masks.chosen(seen, "tensor", config["density"])
    for path, own in owns.items():
        own.places, own.values = places[path], torch.nn.Parameter(torch.zeros(len(places[path])))
        own.dense = None
        del own.forward
        optimizer.add_param_group({"params": [own.values]})
        tensors |= {f"{path}.lora_A.weight": own.a, f"{path}.lora_B.weight": own.b, f"{path}.sparse_values": own.values}
    losses += steps(model, data, o, causal, range(config["warmup"] + 1, o["steps"] + 1), optimizer)
    return losses, {**{k: v.detach() for k, v in tensors.items()}, **{f"{p}.sparse_indices": at for p, at in places.items()}}


class LowRank(torch.nn.Module):
    def __init__(self, path, shape, rank):
        super().__init__()
        self.a = torch.nn.Parameter((2 * uniform(0, fnv(f"{path}.lora_A.weight"), (rank, shape[1])) - 1) / math.sqrt(shape[1]))
        self.b = torch.nn.Parameter(torch.zeros(shape[0], rank))

    def forward(self, w):
        return w + self.b @ self.a


def spt_run(base, names, o, causal, data, config):
    model = zoo.load(base)
    layers = linears(model, names)
    scores = masks.score(model, layers, "squares", data, o["batch_size"], config["batches"], causal)
    flat = torch.cat([s.flatten() for s in scores.values()])
    order = torch.sort(flat, descending=True, stable=True)
    ends = np.cumsum([s.numel() for s in scores.values()])
    cost = [config["rank"] * sum(s.shape) for s in scores.values()]
    counts, structured, total, last = [0] * len(ends), [False] * len(ends), 0, 0
    for place in order.indices.tolist():
        m = int(np.searchsorted(ends, place, side="right"))
        becomes = not structured[m] and counts[m] + 1 >= cost[m] / config["alpha"]
        after = total if structured[m] else total + cost[m] - counts[m] if becomes else total + 1
        if after > int(config["budget"] * len(flat)):
            break
        counts[m] += 1
        structured[m] |= becomes
        total, last = after, last + 1
    a, b = float(order.values[last - 1]), float(order.values[last])
    assert a - b > 1e-4 * a and True in structured and False in structured, (a, b, structured)
    taken, at, sparse = torch.sort(order.indices[:last]).values, 0, {}
    for (path, s), product in zip(scores.items(), structured):
        if not product:
            sparse[path] = taken[(taken >= at) & (taken < at + s.numel())] - at
        at += s.numel()
    model, tensors = masks.attach(zoo.load(base), sparse, lambda path, places: torch.zeros(len(places))), {}
    model.now, at, places, modules = 0, 0, [], dict(model.named_modules())
    for (path, s), product in zip(scores.items(), structured):
        if product:
            own = LowRank(path, s.shape, config["rank"])
            parametrize.register_parametrization(modules[path], "weight", own)
            tensors |= {f"{path}.lora_A.weight": own.a, f"{path}.lora_B.weight": own.b}
        else:
            places.append(sparse[path] + at)
        at += s.numel()
    losses = steps(model, data, o, causal, range(1, o["steps"] + 1), adam([p for p in model.parameters() if p.requires_grad], o))
    values = [modules[p].parametrizations.weight[0].values.detach() for p in sparse if len(sparse[p])]
    return losses, {**{k: v.detach() for k, v in tensors.items()}, "sparse_values": torch.cat(values), "sparse_indices": torch.cat(places)}


def contrastive(features, classes, temperature):
    z = F.normalize(features, dim=1)
    total, count = 0.0, 0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        same = [p for p in others if classes[p] == classes[i]]
        if same:
            sums = torch.logsumexp(torch.stack([z[i] @ z[a] / temperature for a in others]), 0)
            total, count = total + sum(sums - z[i] @ z[p] / temperature for p in same) / len(same), count + 1
    return total / count if count else None


def gps_run(base, names, o, causal, data, config):
    model = zoo.load(base)
    layers = linears(model, names)
    total = {p: torch.zeros_like(m.weight) for p, m in layers.items()}
    for batch in parts(data, o["batch_size"])[:config["batches"]]:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        loss = contrastive(model.bert(**inputs).pooler_output, batch["labels"].tolist(), config["temperature"])
        if loss is not None:
            for p, g in zip(layers, torch.autograd.grad(loss, [m.weight for m in layers.values()], allow_unused=True)):
                total[p] += 0 if g is None else g
    assert all(t.abs().sum() > 0 for t in total.values())
    places = {}
    for p, t in total.items():
        at = torch.stack([highest(row, config["inputs"]) for row in t.abs()])
        places[p] = (at + torch.arange(len(at))[:, None] * t.shape[1]).flatten()
    model = masks.attach(zoo.load(base), places, lambda path, at: torch.zeros(len(at)))
    model.now, trained, modules = 0, {}, dict(model.named_modules())
    for p in places:
        trained[f"{p}.sparse_values"] = modules[p].parametrizations.weight[0].values
        if modules[p].bias is not None:
            trained[f"{p}.bias"] = modules[p].bias.requires_grad_(True)
    losses = steps(model, data, o, causal, range(1, o["steps"] + 1), adam(list(trained.values()), o))
    return losses, {**{k: v.detach() for k, v in trained.items()}, **{f"{p}.sparse_indices": at for p, at in places.items()}}


def lisa_run(base, names, o, causal, data, config):
    model = zoo.load(base)
    params = dict(model.named_parameters())
    blocks = sorted({blocks_of(n) for n in params if blocks_of(n)})

    def touch(step):
        period = (step - 1) // config["interval"]
        bits = [int(w) for w in words(0, fnv("lisa") ^ period, 2 * len(blocks))]
        active, count = set(), min(config["active_blocks"], len(blocks))
        for number, last in enumerate(range(len(blocks) - count, len(blocks))):
            place = ((bits[2 * number] << 32 | bits[2 * number + 1]) * (last + 1)) >> 64
            active.add(last if place in active else place)
        for n, p in params.items():
            if blocks_of(n) and blocks.index(blocks_of(n)) not in active:
                p.grad = None
    losses = steps(model, data, o, causal, range(1, o["steps"] + 1), adam(list(params.values()), o), touch=touch)
    return losses, {n: p.detach() for n, p in params.items()}


def child_run(base, names, o, causal, data, config):
    model, drop = frozen(base), float(np.float32(1 - config["share"]))
    params = {f"{p}.weight": m.weight.requires_grad_(True) for p, m in linears(model, names).items()}

    def touch(step):
        for n, p in params.items():
            keep = words(0, fnv(n) ^ step, p.numel()) >= np.uint64(round(drop * 2 ** 32))
            p.grad *= torch.from_numpy(keep.astype(np.float32)).reshape(p.shape) / np.float32(1 - np.float32(drop))
    losses = steps(model, data, o, causal, range(1, o["steps"] + 1), adam(list(params.values()), o), touch=touch)
    return losses, {n: p.detach() for n, p in params.items()}


# name -> (model, kind of batches, targets, the method's configuration in a recipe, what its file says, options, run)
RUNS = {
    "llama__lt_sft": ("llama", "padded", ["q_proj", "v_proj"], dict(density=0.03, full_share=0.5, l1=0.0), ("density", "l1"), {},
                      lambda b, n, o, c, d, k: two_stages(b, n, o, c, d, k, k["full_share"])),
    "bert__diff_pruning": ("bert", "padded", ["query", "value"], dict(density=0.05, gated_share=0.5, penalty=1e-4, gate_rate=20.0, structured="product"),
                           ("density", "penalty", "gate_rate", "structured"), dict(weight_decay=0.1),
                           lambda b, n, o, c, d, k: two_stages(b, n, o, c, d, k, k["gated_share"], k["structured"])),
    "llama__diff_pruning": ("llama", "full", ["q_proj"], dict(density=0.05, gated_share=0.25, penalty=1e-4, gate_rate=20.0, structured="none"),
                            ("density", "penalty", "gate_rate", "structured"), {},
                            lambda b, n, o, c, d, k: two_stages(b, n, o, c, d, k, k["gated_share"], k["structured"])),
    "bert__far": ("bert", "padded", ["intermediate.dense", "output.dense"], dict(nodes=0.1, priming_share=0.25, rewind=False), ("nodes", "rewind"), {},
                  lambda b, n, o, c, d, k: far_run(b, n, o, c, d, k, k["priming_share"])),
    "llama__rosa": ("llama", "padded", ["q_proj", "v_proj"], dict(rank=2, alpha=4, density=0.03, batches=2, warmup=0),
                    ("rank", "alpha", "density", "batches"), {}, rosa_run),
    "bert__rosa_warm": ("bert", "padded", ["query", "value"], dict(rank=2, alpha=4, density=0.03, batches=1, warmup=3),
                        ("rank", "alpha", "density", "batches"), {}, rosa_run),
    "bert__gps": ("bert", "padded", ["query", "value", "intermediate.dense"], dict(inputs=1, loss="contrastive", temperature=0.5, batches=3),
                  ("inputs", "loss", "temperature", "batches"), dict(batch_size=4), gps_run),
    "bert__spt": ("bert", "padded", ["query", "value", "intermediate.dense"], dict(budget=0.06, rank=2, alpha=4, batches=3),
                  ("budget", "rank", "alpha", "batches"), {}, spt_run),
    "llama__lisa": ("llama", "full", None, dict(active_blocks=1, interval=3), ("active_blocks", "interval"), dict(learning_rate=1e-3), lisa_run),
    "bert__child_tuning_free": ("bert", "padded", ["query", "value"], dict(variant="F", share=0.3), ("variant", "share"), {}, child_run),
}


def attempt(name, out, salt):
    base, kind, names, config, keys, options, run = RUNS[name]
    method, causal = name.split("__")[1].removesuffix("_free").removesuffix("_warm"), zoo.is_causal(base)
    o = {**DEFAULTS, "learning_rate": 5e-3, **options}
    data = batches(name + salt, base, kind, o["steps"] * o["batch_size"] * o["gradient_accumulation"])
    if method == "far":  # attention.output.dense is no feed-forward layer
        names = [p for p in linears(zoo.load(base), names) if "attention" not in p]
    try:
        losses, tensors = run(base, names, o, causal, data, config)
    except AssertionError:
        return False
    targets = {} if method == "lisa" else {"target_modules": names}
    save(out / "adapter", base, method, tensors, {**{k: config[k] for k in keys}, **targets})
    write_tensors(out / "batches.safetensors", data)
    chosen = {"targets": names} if names else {}
    write_json(out / "expected.json", {"name": name, "model": base, "method": {"name": method, **config, **chosen}, **o, "losses": losses,
                                       "transcription": "tools/golden/stages.py", "transformers": transformers.__version__})
    print(f"{name}: {losses[0]:.4f} to {losses[-1]:.4f}", flush=True)
    return True


def make():
    for row in WHOLE:
        whole_case(*row)
    sparse_case("llama", "lt_sft", None, dict(density=0.05, l1=0.0), "one numbering through all linears")
    sparse_case("bert", "lt_sft", ["query", "value"], dict(density=0.05, l1=0.1), "some targets")
    sparse_case("roberta", "diff_pruning", None, dict(density=0.02, penalty=1e-4, gate_rate=20.0, structured="product"), "all linears")
    sparse_case("qwen2", "diff_pruning", ["q_proj", "up_proj"], dict(density=0.05, penalty=1e-4, gate_rate=20.0, structured="none"), "some targets")
    far_case("llama", MLP, 0.2, "rows of three matrices without biases")
    far_case("vit", ["fc1", "fc2"], 0.2, "rows and biases")
    rosa_case("llama", ["q_proj", "v_proj"], dict(rank=2, alpha=4, density=0.03, batches=1), "queries and values")
    rosa_case("bert", ["query", "intermediate.dense"], dict(rank=3, alpha=3, density=0.02, batches=1), "with biases")
    spt_case("llama", ["q_proj", "v_proj", "up_proj"], dict(budget=0.1, rank=2, alpha=10, batches=8), ["0.self_attn.q_proj", "up_proj"], "both kinds")
    spt_case("bert", ["query", "value"], dict(budget=0.1, rank=3, alpha=10, batches=8), ["1.attention.self.value"], "one product")
    gps_case("llama_bias", ["q_proj", "v_proj", "up_proj"], dict(inputs=2, loss="task", temperature=0.1, batches=4), "two inputs a neuron")
    gps_case("vit", None, dict(inputs=1, loss="contrastive", temperature=0.1, batches=4), "one input a neuron, and biases")
    for name in RUNS:
        if not any(attempt(name, fresh(MASKS / name), salt) for salt in ("", *(f"#{i}" for i in range(1, 20)))):
            raise SystemExit(f"{name}: no well-posed batches found")
