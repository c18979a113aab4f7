"""UniPELT and MAM adapters by the library `adapters`, in AdapterHub's file form.

Runs in the environment of requirements-adapters.txt, as bottleneck.py. The library's gates are means over all columns, padding
included; here no row of a gated case is padded, since the engine's are means over real tokens.
"""

import copy
import warnings

import torch
import transformers
from adapters import MAMConfig, ParBnConfig, PrefixTuningConfig, UniPELTConfig

import bottleneck
import zoo
from batches import batches
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, tensors_of,
                    write_json, write_logits, write_tensors)
from training import trajectory, well_posed


def unipelt(flat=False, matrices=("q", "v")):
    config = UniPELTConfig()
    parts = [c.replace() for c in config.configs]
    parts[0] = parts[0].replace(prefix_length=3, bottleneck_size=6, flat=flat)
    parts[1] = parts[1].replace(reduction_factor=8)
    parts[2] = parts[2].replace(r=2, attn_matrices=list(matrices))
    return UniPELTConfig(prefix_tuning=parts[0], adapter=parts[1], lora=parts[2])


def mam(flat=False):
    return MAMConfig(PrefixTuningConfig(prefix_length=4, bottleneck_size=6, flat=flat), ParBnConfig(reduction_factor=8))


# model, method, variant, configuration, side ("full": rows without padding), what it checks
TABLE = [
    ("bert", "unipelt", None, unipelt(), "full", "gates of the prefix, the adapters and the LoRAs"),
    ("bert", "unipelt", "flat", unipelt(flat=True, matrices=("k",)), "full", "a prefix without a network, LoRA at keys"),
    ("roberta", "unipelt", None, unipelt(), "full", "absolute positions stay where they are"),
    ("bert_token", "unipelt", None, unipelt(), "full", "token head"),
    ("gpt2", "unipelt", None, unipelt(), "full", "queries, keys and values in one matrix, a gate each"),
    ("llama", "unipelt", None, unipelt(), "full", "grouped-query attention, rotary positions stay"),
    ("bert", "mam", None, mam(), "", "prefix and parallel adapters"),
    ("bert", "mam", "flat", mam(flat=True), "", "a prefix without a network"),
    ("bert_token", "mam", "left", mam(), "_left", "padding on the left"),
    ("roberta", "mam", None, mam(), "", "absolute positions stay where they are"),
    ("gpt2", "mam", None, mam(), "", "causal"),
    ("llama", "mam", None, mam(), "", "grouped-query attention, rotary positions stay"),
    ("llama", "mam", "left", mam(), "_left", "padding on the left"),
]


def attach(base, config, case):
    """As bottleneck.attach, the prefix too, whose names hold the adapter's."""
    model = bottleneck.attach(base, config, case)
    for m in model.modules():
        m._supports_sdpa = False  # in f64 too: there its mask does not know the prefix
    for key, p in model.named_parameters():
        if p.requires_grad and "prefix_tuning" in key and "gate" not in key:
            p.data = p.data * (3.0 if "wte" in key or p.ndim == 1 else 1.5)
        elif p.requires_grad and "gate" in key:
            p.data = p.data * 2.0
    return model


def inputs_of(base, side):
    if side != "full":
        return tensors_of(INPUTS / base / f"inputs{side}.safetensors")
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    rows = inputs["attention_mask"].bool().all(1)
    full = {k: v[rows].repeat(2, *[1] * (v.ndim - 1)) for k, v in inputs.items() if k not in ("labels",)}
    ids = full["input_ids"]
    ids[1:] = 3 + (ids[1:] * 7 + torch.arange(ids.shape[1])) % (zoo.MODELS_TABLE[base]["settings"]["vocab_size"] - 3)
    return full


def write_case(base, method, variant, config, side, checks):
    name = f"{base}__{method}" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = inputs_of(base, side)
    before = forward(bottleneck.load(base), inputs)
    model = attach(base, config, name)
    logits, rel = forward_both(model, inputs)
    bottleneck.save(model, out / "adapter", base)
    keep = logits_mask(logits, inputs).bool()
    again = bottleneck.reloaded(base, out / "adapter", inputs)
    where = {"full": "./inputs.safetensors", "": None}.get(side, f"../../inputs/{base}/inputs{side}.safetensors")
    meta = {"case": name, "model": base, "method": method, "variant": variant, "checks": checks,
            "task_type": bottleneck.task_of(base), "merge": False, "tolerance": TOLERANCE, "num_virtual_tokens": 0,
            "format": "adapterhub", "inputs": where, "effect_rel": relative(logits[keep], before[keep]), "adapters": "1.3.0",
            "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": relative(again[keep], logits[keep])}}
    assert rel < 1e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    if side == "full":
        write_tensors(out / "inputs.safetensors", inputs)
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


TRAINED = {"bert__unipelt": ("bert", unipelt(), "full"), "roberta__mam": ("roberta", mam(), "padded"),
           "llama__mam": ("llama", mam(), "padded"), "llama__unipelt": ("llama", unipelt(), "full")}


def attempt(name, out, salt):
    base, config, kind = TRAINED[name]
    data = batches(name + salt, base, kind, 16)
    model = attach(base, config, "trajectory/" + name)
    bottleneck.save(copy.deepcopy(model), out / "init_adapter", base)
    expected = trajectory(model, data, zoo.is_causal(base))
    if not well_posed(expected):
        return False
    bottleneck.save(model, out / "final_adapter", base)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": name.split("__")[1], "format": "adapterhub",
                                       "notes": "the head stays frozen", "adapters": "1.3.0", "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    warnings.simplefilter("ignore")
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
