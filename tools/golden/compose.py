"""Adapters that LoRAHub and MerA make of several, written down from the papers' formulas, and what the results compute.

LoRAHub (arXiv:2307.13269): A and B are each the sum of the adapters' own, with the whole weight. MerA (arXiv:2308.15982): the
units of the other bottlenecks are moved to meet those of the first, by optimal transport of equal masses between the rows of W_d,
then all are averaged.
"""

import itertools
import json

import numpy as np
import peft
import torch

import zoo
from combine import COMBINE, TERMS
from common import CASES, GOLDEN, INPUTS, TOLERANCE, forward, fresh, tensors_of, write_json, write_logits, write_tensors

COMPOSE = GOLDEN / "compose"
BASE = "llama"
# Weights of the adapters `a` and `b` of combine/, which sit at the same modules.
WEIGHTS = {"lorahub": {"a": 0.8, "b": -1.1}, "one": {"b": 1.0}}


def scale(config, path):
    """alpha/r as peft counts it: patterns by the end of the path, the root of the rank for rslora."""
    alpha = next((v for k, v in config["alpha_pattern"].items() if path.endswith(k)), config["lora_alpha"])
    return alpha / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])


def lorahub(weights):
    """Puts (Σ w·√s·B)(Σ w·√s·A) on the base's weights."""
    model = zoo.load(BASE).eval()
    files = {name: (json.loads((COMBINE / name / "adapter_config.json").read_text()),
                    tensors_of(COMBINE / name / "adapter_model.safetensors")) for name in weights}
    first = next(iter(files.values()))[1]
    for key in [k for k in first if k.endswith(".lora_A.weight")]:
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        sums = [0, 0]
        for name, weight in weights.items():
            config, tensors = files[name]
            root = scale(config, path) ** 0.5
            for side, end in enumerate(["lora_A", "lora_B"]):
                sums[side] = sums[side] + weight * root * tensors[key.replace("lora_A", end)].double()
        weight = model.get_submodule(path).weight
        weight.data += (sums[1] @ sums[0]).to(weight.dtype)
    return model


def transport(cost):
    """The order of units with the least sum of costs; so few that all orders can be looked at."""
    n = len(cost)
    return min(itertools.permutations(range(n)), key=lambda order: sum(cost[i][order[i]] for i in range(n)))


def mera(terms):
    """The mean of bottlenecks after each unit of the others has met one of the first."""
    first, *rest = terms
    aligned = [first]
    for other in rest:
        own = dict(other)
        for key in [k for k in first if k.endswith("adapter_up.weight")]:
            stem = key.removesuffix("adapter_up.weight")
            down = next(k for k in first if k.startswith(stem + "adapter_down.") and first[k].ndim == 2)
            bias = down.replace(".weight", ".bias")
            cost = torch.cdist(first[down].double(), other[down].double()).square().numpy()
            order = list(transport(cost))
            own[down], own[bias], own[key] = other[down][order], other[bias][order], other[key][:, order]
        aligned.append(own)
    return {k: sum(t[k].double() for t in aligned).div(len(aligned)).float() for k in first}


def make():
    inputs = {k: v for k, v in tensors_of(INPUTS / BASE / "inputs.safetensors").items() if k != "labels"}
    out = fresh(COMPOSE)
    for name, weights in WEIGHTS.items():
        logits = forward(lorahub(weights), inputs)
        write_logits(out / f"{name}.safetensors", logits, inputs)
        print(name, float(logits.abs().max()), flush=True)
    # The bottleneck of a case, and the same with other numbers and its units in another order.
    source = tensors_of(CASES / "bert__seq_bn_gelu" / "adapter" / "adapter.safetensors")
    random = np.random.default_rng(41)
    keep = {k: v for k, v in source.items() if ".adapters." in k}
    noise = {k: v + 0.02 * torch.from_numpy(random.standard_normal(v.shape)).float() for k, v in keep.items()}
    for key in [k for k in keep if k.endswith("adapter_up.weight")]:
        order = random.permutation(keep[key].shape[1])
        stem = key.removesuffix("adapter_up.weight")
        for k in [k for k in noise if k.startswith(stem + "adapter_down.")]:
            noise[k] = noise[k][order]
        noise[key] = noise[key][:, order]
    other = {**source, **noise}
    write_tensors(out / "moved.safetensors", {k: v.contiguous() for k, v in other.items()})
    write_tensors(out / "mera.safetensors", {k: v.contiguous() for k, v in mera([source, other]).items()})
    write_json(out / "cases.json", {"model": BASE, "weights": WEIGHTS, "tolerance": TOLERANCE, "terms": list(TERMS)[:2],
                                    "bottleneck": "bert__seq_bn_gelu", "peft": peft.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    make()
