"""X-LoRA by `peft`'s forward, and the forms of GLoRA that `peft` has no words for, transcribed.

- X-LoRA (arXiv:2402.07148): `peft`'s XLoraModel around adapters that it makes itself instead of loading them. It saves its router
  alone; here A and B of all adapters lie in one file (`ENGRAFT_XLORA`), one adapter after another: A [experts * r, in],
  B [out, experts * r], `xlora_classifier.N` the N-th linear layer of the router. With `scalings` "sequence" the
  router reads what the head reads of the sequence: BERT's pooled first token, a causal model's last.
- GLoRA (arXiv:2306.07967): W' = W + W * A + B, b' = b + b * D + E + W C, each of the five of its own kind (`ENGRAFT_GLORA`).
"""

import copy

import peft
import torch
import transformers
from peft.tuners.xlora import model as xlora_model
from torch import nn
from torch.nn import functional as F

import zoo
from batches import batches
from cases import task_of
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, rng,
                    tensors_of, write_json, write_logits, write_tensors)
from training import DEFAULTS, trajectory, well_posed

PREFIX = "base_model.model."
QV = ["q_proj", "v_proj"]


def uniform(case, key, shape, width):
    return torch.from_numpy(rng("adapter", case, key).uniform(-width, width, tuple(shape))).float()


def write_config(path, base, kind, config, targets):
    write_json(path / "adapter_config.json", {
        **config, "peft_type": kind, "task_type": task_of(base), "target_modules": sorted(targets), "modules_to_save": None,
        "base_model_name_or_path": f"models/{base}", "inference_mode": True})


# X-LoRA

class OfSequence(nn.Module):
    """The router's layers, reading one state of each sequence in the place of its tokens'."""

    def __init__(self, layers, pooler=None):
        super().__init__()
        self.layers, self.pooler, self.mask = layers, pooler, None

    def forward(self, hidden):
        if self.pooler is not None:
            row = self.pooler(hidden)
        else:
            last = self.mask.sum(1) - 1
            row = hidden[torch.arange(len(hidden)), last]
        return self.layers(row[:, None].expand(hidden.shape))


def xlora(base, c, targets):
    def make(lora_model, adapter_name, **_):
        own = peft.LoraConfig(r=c["r"], lora_alpha=c["lora_alpha"], target_modules=targets, fan_in_fan_out=base.startswith("gpt2"))
        lora_model.peft_config[adapter_name] = own
        lora_model.inject_adapter(lora_model.model, adapter_name)

    model = zoo.load(base)
    model.config.use_cache = False
    own = {k: v for k, v in c.items() if k not in ("r", "lora_alpha", "lora_dropout", "experts", "scalings")}
    config = peft.XLoraConfig(hidden_size=model.config.hidden_size, adapters={str(i): "" for i in range(c["experts"])},
                              task_type=None if "Token" in zoo.MODELS_TABLE[base]["cls"] else task_of(base), **own)
    loading, xlora_model._load_adapter_into_lora_model = xlora_model._load_adapter_into_lora_model, make
    try:
        whole = peft.get_peft_model(model, config)
    finally:
        xlora_model._load_adapter_into_lora_model = loading
    for name, p in whole.named_parameters():
        own = ("internal_xlora_classifier", *((".lora_A.", ".lora_B.") if c["use_trainable_adapters"] else ()))
        p.requires_grad = any(part in name for part in own)
    router = whole.base_model.internal_xlora_classifier
    if "Sequence" in zoo.MODELS_TABLE[base]["cls"] and c["scalings"] == "sequence":
        pooler = model.bert.pooler if hasattr(model, "bert") else None
        router.layers = OfSequence(router.layers, pooler)
        for p in pooler.parameters() if pooler is not None else ():
            p.requires_grad = False
    elif c["scalings"] == "sequence":
        router.layers = OfSequence(router.layers)
    return whole


def routers(whole):
    layers = whole.base_model.internal_xlora_classifier.layers
    layers = layers.layers if isinstance(layers, OfSequence) else layers
    return [m for m in layers if isinstance(m, nn.Linear)]


def modules(whole):
    inner = whole.base_model.lora_model.model
    return {path: m for path, m in inner.named_modules() if isinstance(m, peft.tuners.lora.Linear)}


def packed(whole, experts):
    """The tensors of the file."""
    out = {}
    for path, m in modules(whole).items():
        of = lambda factors, dim: torch.cat([factors[str(i)].weight.detach() for i in range(experts)], dim)
        out[f"{PREFIX}{path}.lora_A.weight"], out[f"{PREFIX}{path}.lora_B.weight"] = of(m.lora_A, 0), of(m.lora_B, 1)
    for n, m in enumerate(routers(whole)):
        out[f"{PREFIX}xlora_classifier.{n}.weight"], out[f"{PREFIX}xlora_classifier.{n}.bias"] = m.weight.detach(), m.bias.detach()
    return {k: v.clone() for k, v in out.items()}


def unpack(whole, tensors, c):
    n, r = c["experts"], c["r"]
    for path, m in modules(whole).items():
        for i in range(n):
            m.lora_A[str(i)].weight.data = tensors[f"{PREFIX}{path}.lora_A.weight"][i * r:(i + 1) * r].clone()
            m.lora_B[str(i)].weight.data = tensors[f"{PREFIX}{path}.lora_B.weight"][:, i * r:(i + 1) * r].clone()
    for k, m in enumerate(routers(whole)):
        m.weight.data = tensors[f"{PREFIX}xlora_classifier.{k}.weight"].clone()
        m.bias.data = tensors[f"{PREFIX}xlora_classifier.{k}.bias"].clone()


def filled(base, c, targets, name):
    whole = xlora(base, c, targets)
    drawn = {}
    for key, t in packed(whole, c["experts"]).items():
        router = "xlora_classifier" in key
        width = 0.35 if "lora_B" in key else 0.5 if key.endswith("bias") else (3.0 / t.shape[1]) ** 0.5 * (2 if router else 1)
        drawn[key] = uniform(name, key, t.shape, width)
    unpack(whole, drawn, c)
    return whole


def see(whole, inputs):
    layers = whole.base_model.internal_xlora_classifier.layers
    if isinstance(layers, OfSequence):
        layers.mask = inputs["attention_mask"]


def xlora_case(base, variant, config, targets, checks):
    name = f"{base}__xlora" + (f"_{variant}" if variant else "")
    c = {**XLORA, **config}
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    before = tensors_of(INPUTS / base / "base_logits.safetensors")["logits"]
    whole = filled(base, c, targets, name)
    see(whole, inputs)
    logits, rel = forward_both(whole, inputs)
    keep = logits_mask(logits, inputs).bool()
    out = fresh(CASES / name)
    (out / "adapter").mkdir()
    tensors = packed(whole, c["experts"])
    write_tensors(out / "adapter" / "adapter_model.safetensors", tensors)
    write_config(out / "adapter", base, "ENGRAFT_XLORA", c, targets)
    other = xlora(base, c, targets)
    unpack(other, tensors, c)
    see(other, inputs)
    again = forward(other, inputs)
    meta = {"case": name, "model": base, "method": "xlora", "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": False, "tolerance": TOLERANCE, "num_virtual_tokens": 0, "inputs": None, "effect_rel": relative(logits, before),
            "peft": peft.__version__, "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": relative(again[keep], logits[keep])}}
    assert rel < 1e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def xlora_run(name, out, salt):
    base, kind, config, targets, options = XLORA_RUNS[name]
    c, o = {**XLORA, **config}, {**DEFAULTS, **options}
    data = batches(name + salt, base, kind, o["steps"] * o["batch_size"])
    whole = filled(base, c, targets, "trajectory/" + name)
    start = packed(whole, c["experts"])
    expected = trajectory(whole, data, zoo.is_causal(base), **options)
    if not well_posed(expected):
        return False
    for folder, tensors in (("init_adapter", start), ("final_adapter", packed(whole, c["experts"]))):
        (out / folder).mkdir(parents=True)
        write_tensors(out / folder / "adapter_model.safetensors", tensors)
        write_config(out / folder, base, "ENGRAFT_XLORA", c, targets)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": "xlora", "notes": None, "peft": peft.__version__,
                                       "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


XLORA = dict(r=2, lora_alpha=4, lora_dropout=0.0, experts=3, scalings="token", layerwise_scalings=False, xlora_depth=1, xlora_size=8,
             xlora_dropout_p=0.0, enable_softmax=True, softmax_temperature=1.0, top_k_lora=None, enable_softmax_topk=False,
             global_scaling_weight=1.0, use_trainable_adapters=True)
XLORA_CASES = [
    ("llama", None, {}, QV, "one scaling for all layers"),
    ("qwen3", "layerwise", dict(layerwise_scalings=True, xlora_depth=3, softmax_temperature=0.5, global_scaling_weight=1.5),
     ["q_proj", "v_proj", "down_proj"], "scalings of each layer, a router of three layers"),
    ("gpt2", "top", dict(top_k_lora=2, experts=4), ["c_attn", "c_proj"], "the two largest, stored transposed"),
    ("qwen2", "softmax_top", dict(top_k_lora=2, enable_softmax=False, enable_softmax_topk=True, layerwise_scalings=True), QV,
     "a softmax over the two largest"),
    ("bert", None, dict(experts=2, r=3, xlora_depth=2), ["query", "value"], "a classifier, scalings of tokens"),
    ("bert", "sequence", dict(scalings="sequence", xlora_depth=2), ["query", "value"], "scalings of sequences, from the pooled token"),
    ("llama_bias", "sequence", dict(scalings="sequence", layerwise_scalings=True), ["q_proj", "o_proj"], "scalings of the last token"),
    ("bert_token", None, dict(enable_softmax=False), ["query", "value"], "no softmax, rows of tokens"),
    ("gpt2", "layerwise", dict(layerwise_scalings=True, xlora_depth=3, softmax_temperature=2.0, use_trainable_adapters=False), ["c_attn", "c_fc"],
     "three layers and a warm softmax, adapters at rest"),
    ("gpt2_cls", "top", dict(top_k_lora=1, softmax_temperature=0.4, xlora_depth=3), ["c_attn", "c_proj"],
     "a classifier that reads the last token, one adapter of three for each"),
    ("bert", "layerwise_top", dict(layerwise_scalings=True, xlora_depth=3, top_k_lora=2, softmax_temperature=0.3),
     ["query", "key", "attention.output.dense"], "a classifier, the two largest of each layer"),
    ("roberta_token", "softmax_top", dict(top_k_lora=2, experts=4, enable_softmax=False, enable_softmax_topk=True, use_trainable_adapters=False),
     ["query", "value"], "a softmax over the two largest for each token, adapters at rest"),
    ("mistral", "layerwise", dict(layerwise_scalings=True, softmax_temperature=0.1, top_k_lora=2, global_scaling_weight=0.5),
     ["q_proj", "k_proj", "gate_proj"], "one layer and a cold softmax"),
]
XLORA_RUNS = {
    "llama__xlora": ("llama", "padded", {}, QV, {}),
    "qwen2__xlora_layerwise": ("qwen2", "full", dict(layerwise_scalings=True, softmax_temperature=0.5), QV,
                               dict(learning_rate=5e-3, max_grad_norm=0.5)),
    "gpt2__xlora_router": ("gpt2", "padded", dict(xlora_depth=3, top_k_lora=2, use_trainable_adapters=False), ["c_attn", "c_proj"], {}),
    "bert__xlora": ("bert", "padded", dict(layerwise_scalings=True, softmax_temperature=0.7), ["query", "value"], {}),
}


# GLoRA

class Glora(nn.Module):
    def __init__(self, base, path, c, name):
        super().__init__()
        self.base, self.path = base, path
        out, inn = base.weight.shape
        r, has = c["r"], base.bias is not None
        for letter, shape in (("A", (out, inn)), ("B", (out, inn)), ("C", (inn, 1)), ("D", (out,)), ("E", (out,))):
            kind = c[f"config_{letter}"] if letter in "AB" or has else "none"
            draw = lambda end, s, width: self.register_parameter(
                f"{letter}_{end}", nn.Parameter(uniform(name, f"{path}.{letter}.{end}", s, width)))
            if kind == "lora":
                draw("Xd", (shape[0], r), 0.3)
                draw("Xu", (r, shape[1]), 0.3)
            elif kind == "vector":
                draw("X", (shape[0], 1) if len(shape) == 2 else shape, 0.3)
            elif kind == "constant":
                draw("X", (1,), 0.3)
            else:
                self.register_buffer(f"{letter}_zeros", torch.zeros(shape))

    def value(self, letter):
        get = lambda end: getattr(self, f"{letter}_{end}", None)
        if get("Xd") is not None:
            return get("Xd") @ get("Xu")
        return get("X") if get("X") is not None else get("zeros")

    def changed(self):
        w, b = self.base.weight, self.base.bias
        weight = w + w * self.value("A") + self.value("B")
        if b is None:
            return weight, None
        return weight, b + b * self.value("D") + self.value("E") + (w @ self.value("C")).flatten()

    def forward(self, x):
        return F.linear(x, *self.changed())

    def named(self):
        own = {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}
        return {f"{PREFIX}{self.path}.glora_{k[0]}.{k[2:]}": v for k, v in own.items()}


def glora(base, c, targets, name):
    model = zoo.load(base)
    for p in model.parameters():
        p.requires_grad = False
    for path, m in list(model.named_modules()):
        if isinstance(m, nn.Linear) and any(path == t or path.endswith("." + t) for t in targets):
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, Glora(m, path, c, name))
    return model


def glora_tensors(model):
    return {k: v.detach().clone() for m in model.modules() if isinstance(m, Glora) for k, v in m.named().items()}


def folded(model):
    model = copy.deepcopy(model)
    for path, m in list(model.named_modules()):
        if isinstance(m, Glora):
            weight, bias = m.changed()
            m.base.weight.data = weight.detach()
            if bias is not None:
                m.base.bias.data = bias.detach()
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, m.base)
    return model


def glora_case(base, variant, config, targets, checks):
    name = f"{base}__glora_{variant}"
    c = {**GLORA, **config}
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    before = tensors_of(INPUTS / base / "base_logits.safetensors")["logits"]
    model = glora(base, c, targets, name)
    logits, rel = forward_both(model, inputs)
    keep = logits_mask(logits, inputs).bool()
    merged = forward(folded(model), inputs)
    merged[~keep] = 0.0
    out = fresh(CASES / name)
    (out / "adapter").mkdir()
    write_tensors(out / "adapter" / "adapter_model.safetensors", glora_tensors(model))
    write_config(out / "adapter", base, "ENGRAFT_GLORA", c, targets)
    meta = {"case": name, "model": base, "method": "glora", "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": True, "merge_tolerance": TOLERANCE, "tolerance": TOLERANCE, "num_virtual_tokens": 0, "inputs": None,
            "effect_rel": relative(logits, before), "transcription": "tools/golden/cases_weights.py",
            "transformers": transformers.__version__, "self_check": {"f32_f64_rel": rel, "merge_rel": relative(merged[keep], logits[keep])}}
    assert rel < 1e-5 and meta["self_check"]["merge_rel"] < 1e-5 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_logits(out / "merged_logits.safetensors", merged, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def glora_run(name, out, salt):
    base, kind, config, targets, options = GLORA_RUNS[name]
    c, o = {**GLORA, **config}, {**DEFAULTS, **options}
    data = batches(name + salt, base, kind, o["steps"] * o["batch_size"])
    model = glora(base, c, targets, "trajectory/" + name)
    start = glora_tensors(model)
    expected = trajectory(model, data, zoo.is_causal(base), **options)
    if not well_posed(expected):
        return False
    for folder, tensors in (("init_adapter", start), ("final_adapter", glora_tensors(model))):
        (out / folder).mkdir(parents=True)
        write_tensors(out / folder / "adapter_model.safetensors", tensors)
        write_config(out / folder, base, "ENGRAFT_GLORA", c, targets)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": "glora", "notes": None,
                                       "transcription": "tools/golden/cases_weights.py", "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


GLORA = dict(r=2, bias="none", init_weights=True)
GLORA_CASES = [
    ("llama_bias", "apart", dict(config_A="vector", config_B="lora", config_C="vector", config_D="constant", config_E="vector"), QV,
     "five kinds"),
    ("bert", "apart", dict(config_A="lora", config_B="none", config_C="lora", config_D="vector", config_E="none"),
     ["query", "value", "intermediate.dense"], "low-rank scaling alone"),
    ("llama", "apart", dict(config_A="constant", config_B="vector", config_C="none", config_D="none", config_E="constant"),
     ["q_proj", "down_proj"], "layers without biases"),
    ("qwen2", "apart", dict(config_A="none", config_B="lora", config_C="lora", config_D="none", config_E="vector"), QV,
     "shifts alone"),
]
GLORA_RUNS = {
    "bert__glora_apart": ("bert", "padded", dict(config_A="vector", config_B="lora", config_C="vector", config_D="constant", config_E="vector"),
                          ["query", "value"], {}),
}


def make():
    for row in XLORA_CASES:
        xlora_case(*row)
    for row in GLORA_CASES:
        glora_case(*row)
    for runs, attempt in ((XLORA_RUNS, xlora_run), (GLORA_RUNS, glora_run)):
        for name in runs:
            if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
                raise SystemExit(f"{name}: no well-posed batches found")
