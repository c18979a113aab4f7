"""AdapterFusion by the library `adapters`: bottleneck adapters of random numbers, fused, in a file of ours.

The library keeps a fusion and its adapters in directories of their own; here the tensors of both lie in one file by the
names that the library has for them. Its regularisation is added to the loss, as its trainer does with the gradient.
"""

import copy
import warnings

import torch
import transformers
from adapters import DoubleSeqBnConfig, SeqBnConfig
from adapters.composition import Fuse

import zoo
from batches import batches
from bottleneck import load, task_of
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of,
                    write_json, write_logits, write_tensors)
from training import trajectory, well_posed

PAIR = [SeqBnConfig(reduction_factor=4), SeqBnConfig(reduction_factor=8, non_linearity="gelu", scaling=1.5)]
# model, variant, form, the fused adapters, side, what it checks
TABLE = [
    ("bert", None, "dynamic", PAIR, "", "two widths, activations and factors"),
    ("bert", "static", "static", [*PAIR, SeqBnConfig(reduction_factor=2)], "", "three adapters without values"),
    ("bert", "houlsby", "dynamic", [DoubleSeqBnConfig(reduction_factor=4), DoubleSeqBnConfig(reduction_factor=8)], "_left",
     "after both sublayers, padding on the left"),
    ("roberta", None, "dynamic", [SeqBnConfig(reduction_factor=4, ln_before=True), PAIR[0]], "", "a norm before one of them"),
    ("llama", None, "dynamic", PAIR, "", "pre-norm"),
    ("gpt2", "static", "static", PAIR, "", "pre-norm, without values"),
    ("bert", "places", "dynamic", [SeqBnConfig(reduction_factor=4, original_ln_before=False), DoubleSeqBnConfig(reduction_factor=8)], "",
     "the second alone after attention"),
    ("t5", None, "dynamic", [DoubleSeqBnConfig(reduction_factor=4), DoubleSeqBnConfig(reduction_factor=8)], "", "encoder and decoder"),
]


def attach(base, form, configs, case):
    """The model under a fusion of random adapters; only the fusion trains."""
    model = load(base)
    names = [f"probe_{n}" for n in range(len(configs))]
    for name, config in zip(names, configs):
        model.add_adapter(name, config=copy.deepcopy(config))
    # The library's forward mixes those that sit at a sublayer, but its check refuses adapters of unlike places.
    config = model.adapters_config
    config.common_config_value = lambda names, key: any(config.get(name).get(key) for name in names)
    model.add_adapter_fusion(Fuse(*names), form)
    model.train_adapter_fusion(Fuse(*names))
    for key, p in model.named_parameters():
        fusion = ".adapter_fusion_layer." in key
        p.requires_grad = fusion
        if not fusion and ".adapters." not in key and "shared_parameters." not in key:
            continue
        width = 0.25 if p.ndim == 1 else (3.0 / p.shape[1]) ** 0.5 * (0.4 if fusion else 1.0)
        value = torch.from_numpy(rng("adapter", case, key).uniform(-width, width, tuple(p.shape))).float()
        keep = p.ndim == 1 and not key.endswith("bias") or key.endswith("value.weight")
        p.data = value + (p.data if keep else 0.0)
    model.configs = [(name, model.adapters_config.get(name).to_dict()) for name in names]
    model.form = form
    return model.eval()


def save(model, path, base):
    path.mkdir(parents=True)
    own = {k: p for k, p in model.state_dict().items() if ".adapter_fusion_layer." in k or ".adapters." in k}
    # A norm before the bottleneck has two names; ours is one of them.
    is_copy = lambda k: k.replace(".adapter_down.0.", ".adapter_norm_before.") in set(own) - {k}
    own = {k: v for k, v in own.items() if not is_copy(k)}
    write_tensors(path / "adapter_model.safetensors", own)
    dynamic = model.form == "dynamic"
    inner = lambda c: {k: v for k, v in c.items() if k != "architecture"}
    write_json(path / "adapter_config.json", {
        "adapters": [{"config": inner(c), "name": name} for name, c in model.configs],
        "fusion_config": {"dropout_prob": 0.0, "key": True, "query": True, "query_before_ln": False, "regularization": dynamic,
                          "residual_before": False, "temperature": False, "value": dynamic, "value_before_softmax": True,
                          "value_initialized": dynamic},
        "regularization_weight": 0.01 if dynamic else 0, "peft_type": "ENGRAFT_ADAPTER_FUSION", "task_type": task_of(base),
        "base_model_name_or_path": f"models/{base}", "inference_mode": True, "modules_to_save": None})


def write_case(base, variant, form, configs, side, checks):
    name = f"{base}__adapter_fusion" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / f"inputs{side}.safetensors")
    before = tensors_of(INPUTS / base / f"base_logits{side}.safetensors")["logits"]
    model = attach(base, form, configs, name)
    logits, rel = forward_both(model, inputs)
    save(model, out / "adapter", base)
    again, saved = load_again(base, form, configs, name), tensors_of(out / "adapter" / "adapter_model.safetensors")
    again.load_state_dict(saved, strict=False)
    keep = logits_mask(logits, inputs).bool()
    reload = relative(forward(again, inputs)[keep], logits[keep])
    meta = {"case": name, "model": base, "method": "adapter_fusion", "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": False, "tolerance": TOLERANCE, "effect_rel": relative(logits, before), "adapters": "1.3.0",
            "inputs": f"../../inputs/{base}/inputs{side}.safetensors" if side else None,
            "transformers": transformers.__version__, "self_check": {"f32_f64_rel": rel, "reload_rel": reload}}
    assert rel < 1e-5 and reload < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def load_again(base, form, configs, name):
    """The same shapes with other numbers."""
    return attach(base, form, configs, name + "/again")


TRAINED = {"bert__adapter_fusion": ("padded", "dynamic"), "llama__adapter_fusion": ("padded", "dynamic")}


class Regularised(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs):
        out = self.model(**inputs)
        out.loss = out.loss + self.model.base_model.get_fusion_regularization_loss().to(out.loss.dtype)
        return out


def attempt(name, out, salt):
    kind, form = TRAINED[name]
    base = name.split("__")[0]
    data = batches(name + salt, base, kind, 16)
    model = attach(base, form, PAIR, "trajectory/" + name)
    save(copy.deepcopy(model), out / "init_adapter", base)
    expected = trajectory(Regularised(model), data, zoo.is_causal(base))
    if not well_posed(expected):
        print(name, salt, expected["self_check"], expected["rounding_only_tensors"])
        return False
    save(model, out / "final_adapter", base)
    # Scores move together with the bias of keys, which the softmax ignores.
    expected["rounding_only_tensors"] = [k.removeprefix("model.") for k in expected["rounding_only_tensors"]]
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": "adapter_fusion", "notes": "the head stays frozen",
                                       "adapters": "1.3.0", "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    warnings.simplefilter("ignore")
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
