"""CoDA, conditional adapters (Lei et al., NeurIPS 2023, arXiv:2304.04947): a transcription in PyTorch, a sequence at a time.

In each block of an encoder: s = LN(h) w, LN without numbers of its own; lam = the soft choice of k = ceil(share n) by coordinate
descent (20 steps, eps from 4 down by 0.7 to its least); I the k highest scores; the block runs on h_I alone (k-to-k, each token
at its own position); h + W_u relu(W_d LN(h) + b_d) + b_u, and lam_i (block(h_I) - h_I)_i on top where i is in I.
"""

import copy
import math

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
BLOCKS = {"t5": "encoder.block", "bert": "bert.encoder.layer", "roberta": "roberta.encoder.layer", "vit": "vit.layers"}


def soft_choice(s, k, c):
    eps, b = max(4.0, c["epsilon"]), -s
    for _ in range(c["iterations"]):
        a = eps * (math.log(k) - torch.logsumexp((s + b) / eps, -1))
        b = -F.relu(s + a)
        eps = max(eps * 0.7, c["epsilon"])
    return torch.exp((s + a + b) / eps)


class Router(nn.Module):
    def __init__(self, d, reduction):
        super().__init__()
        r = d // reduction
        self.d = d
        self.own = nn.ParameterDict({
            "router|weight": nn.Parameter(torch.zeros(d)), "adapter|down|weight": nn.Parameter(torch.zeros(r, d)),
            "adapter|down|bias": nn.Parameter(torch.zeros(r)), "adapter|up|weight": nn.Parameter(torch.zeros(d, r)),
            "adapter|up|bias": nn.Parameter(torch.zeros(d))})

    def forward(self, h, mask, c, block):
        p = self.own
        x = F.layer_norm(h, (self.d,), eps=1e-5)
        out = h + F.relu(x @ p["adapter|down|weight"].T + p["adapter|down|bias"]) @ p["adapter|up|weight"].T + p["adapter|up|bias"]
        scores, rows = x @ p["router|weight"], []
        for i in range(len(h)):
            real = mask[i].nonzero().flatten()
            k = min(max(math.ceil(len(real) * c["share"]), 1), len(real))
            lam = soft_choice(scores[i, real], k, c)
            best = torch.sort(scores[i, real], descending=True, stable=True).indices[:k].sort().values
            chosen = real[best]
            change = lam[best, None] * (block(h[i:i + 1, chosen], chosen)[0] - h[i, chosen])
            rows.append(torch.zeros_like(h[i]).index_add(0, chosen, change))
        return out + torch.stack(rows)


class Coda(nn.Module):
    def __init__(self, base, c, head):
        super().__init__()
        self.model, self.c, self.head, self.base = zoo.load(base), c, head or [], base
        for key, p in self.model.named_parameters():
            p.requires_grad = any(key.startswith(h + ".") for h in self.head)
        config = self.model.config
        self.path = BLOCKS[base.split("_")[0]]
        if self.path.split(".")[0] not in dict(self.model.named_children()):
            self.path = self.path.split(".", 1)[1]
        width = getattr(config, "d_model", None) or config.hidden_size
        count = len(self.model.get_submodule(self.path))
        self.routers = nn.ModuleList(Router(width, c["reduction"]) for _ in range(count))

    def named(self):
        out = {PREFIX + k: p for k, p in self.model.named_parameters() if p.requires_grad}
        for i, router in enumerate(self.routers):
            out.update({f"{PREFIX}{self.path}.{i}.{k.replace('|', '.')}": p for k, p in router.own.items()})
        return out

    def forward(self, **inputs):
        blocks = self.model.get_submodule(self.path)
        mask = inputs.get("attention_mask")
        t5 = self.base.startswith("t5")

        def wrapped(i, block, plain):
            def run(h, at):
                if not t5:
                    out = plain(h, None)
                    return out[0] if isinstance(out, tuple) else out
                n = int(at.max()) + 1
                bias = blocks[0].layer[0].SelfAttention.compute_bias(n, n, device=h.device)[:, :, at][:, :, :, at]
                return plain(h, attention_mask=None, position_bias=bias)[0]

            def change(hidden_states, *_args, **_kw):
                own = torch.ones(hidden_states.shape[:2]) if mask is None else mask
                out = self.routers[i](hidden_states, own, self.c, run)
                return (out, None, None) if t5 else out
            return change
        saved = [block.forward for block in blocks]
        for i, block in enumerate(blocks):
            block.forward = wrapped(i, block, saved[i])
        try:
            return self.model(**inputs)
        finally:
            for block in blocks:
                del block.forward


SMALL = dict(share=0.5, reduction=4, iterations=20, epsilon=1.0)
# model, variant, settings, trained modules, inputs, what it checks
TABLE = [
    ("t5", None, {}, None, "", "the encoder of two stacks"),
    ("t5_uneven", "few", dict(share=0.2, epsilon=0.3), None, "", "few tokens, a hard choice"),
    ("bert", None, {}, ["classifier"], "", "post-norm, trained classifier"),
    ("roberta", "all", dict(share=1.0, reduction=8), None, "", "all tokens pass"),
    ("bert_token", None, dict(share=0.34, iterations=5, epsilon=2.0), None, "", "a row of logits a token"),
    ("vit", None, dict(share=0.4), ["classifier"], "", "pictures"),
]


def attach(base, c, head, name):
    whole = Coda(base, {**SMALL, **c}, head)
    for key, p in whole.named().items():
        width = 0.8 if "router" in key else 0.3
        p.data = p.data + torch.from_numpy(rng("adapter", name, key).uniform(-width, width, tuple(p.shape))).float()
    return whole.eval()


def save(whole, path, base):
    path.mkdir(parents=True)
    write_tensors(path / "adapter_model.safetensors", whole.named())
    write_json(path / "adapter_config.json", {
        **whole.c, "peft_type": "ENGRAFT_CODA", "task_type": None if base.startswith("vit") else task_of(base),
        "modules_to_save": whole.head or None, "base_model_name_or_path": f"models/{base}", "inference_mode": True})


def write_case(base, variant, c, head, side, checks):
    name = f"{base}__coda" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / f"inputs{side}.safetensors")
    before = tensors_of(INPUTS / base / f"base_logits{side}.safetensors")["logits"]
    whole = attach(base, c, head, name)
    logits, rel = forward_both(whole, inputs)
    save(whole, out / "adapter", base)
    meta = {"case": name, "model": base, "method": "coda", "variant": variant, "checks": checks,
            "task_type": None if base.startswith("vit") else task_of(base), "merge": False, "tolerance": TOLERANCE, "inputs": None,
            "effect_rel": relative(logits, before), "transcription": "tools/golden/coda.py", "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel}}
    assert rel < 1e-5 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


# name -> kind of batches, options, settings, trained modules
TRAINED = {
    "t5__coda": ("ragged", dict(learning_rate=3e-4), {}, None),
    "bert__coda": ("padded", dict(learning_rate=3e-4), dict(epsilon=0.5), ["classifier"]),
}


def attempt(name, out, salt):
    kind, options, c, head = TRAINED[name]
    base = name.split("__")[0]
    data = batches(name + salt, base, kind, 16)
    whole = attach(base, c, head, "trajectory/" + name)
    save(copy.deepcopy(whole), out / "init_adapter", base)
    expected = trajectory(whole, data, False, **options)
    if not well_posed(expected):
        return False
    save(whole, out / "final_adapter", base)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": "coda", "notes": None,
                                       "transcription": "tools/golden/coda.py", "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4", "#5", "#6")):
            raise SystemExit(f"{name}: no well-posed batches found")
