"""Adapters that `peft` combines by each rule of `add_weighted_adapter` that draws nothing, and what the results compute."""

import peft
import torch

import zoo
from adapters_io import fill_adapter, save_adapter
from common import GOLDEN, INPUTS, TOLERANCE, forward, fresh, tensors_of, write_json, write_logits

COMBINE = GOLDEN / "combine"
BASE = "llama"
RANK = 4
TERMS = {
    "a": dict(r=RANK, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "b": dict(r=RANK, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_rslora=True, alpha_pattern={"v_proj": 6}),
    "c": dict(r=RANK, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
}
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}
# name -> (rule of peft, its arguments)
RULES = {
    "cat": ("cat", {}),
    "linear": ("linear", {}),
    "svd": ("svd", {"svd_rank": 5}),
    "ties": ("ties", {"density": 0.4}),
    "ties_frequency": ("ties", {"density": 0.7, "majority_sign_method": "frequency"}),
    "ties_svd": ("ties_svd", {"density": 0.4, "svd_rank": 6}),
    "magnitude_prune": ("magnitude_prune", {"density": 0.3}),
    "magnitude_prune_svd": ("magnitude_prune_svd", {"density": 0.3, "svd_rank": 6}),
}


def make():
    inputs = {k: v for k, v in tensors_of(INPUTS / BASE / "inputs.safetensors").items() if k != "labels"}
    out = fresh(COMBINE)
    for name, terms in TERMS.items():
        model = peft.get_peft_model(zoo.load(BASE), peft.LoraConfig(task_type="CAUSAL_LM", **terms)).eval()
        fill_adapter(model, "combine/" + name)
        save_adapter(model, out / name, BASE)
    cases = {}
    for name, (rule, arguments) in RULES.items():
        model = zoo.load(BASE)
        first, *rest = TERMS
        model = peft.PeftModel.from_pretrained(model, out / first, adapter_name=first)
        for other in rest:
            model.load_adapter(out / other, adapter_name=other)
        model.add_weighted_adapter(list(TERMS), [WEIGHTS[t] for t in TERMS], "sum", combination_type=rule, **arguments)
        model.set_adapter("sum")
        logits = forward(model.eval(), inputs)
        write_logits(out / f"{name}.safetensors", logits, inputs)
        cases[name] = {"rule": rule, **arguments}
        print(name, float(logits.abs().max()), flush=True)
    write_json(out / "cases.json", {"model": BASE, "weights": WEIGHTS, "tolerance": TOLERANCE, "cases": cases,
                                    "peft": peft.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    make()
