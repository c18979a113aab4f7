"""Poly by `peft` with rows of several tasks in one batch, each told by `task_ids`."""

import peft
import torch
import transformers

import cases
import zoo
from adapters_io import save_adapter
from common import (CASES, INPUTS, TOLERANCE, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of, write_json,
                    write_logits, write_tensors)

# model, variant, settings, task of each row, what it checks
TABLE = [
    ("llama", "tasks", dict(target_modules=["q_proj", "v_proj"], n_splits=2), [2, 0, 1], "every row another task"),
    ("bert", "tasks", dict(target_modules=["query", "value"]), [1, 1, 2], "rows of one task beside another's"),
    ("t5", "tasks", dict(target_modules=["q", "v"]), [0, 2, 0], "both sides and across"),
]


def write_case(base, variant, settings, tasks, checks):
    name = f"{base}__poly_{variant}"
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    before = tensors_of(INPUTS / base / "base_logits.safetensors")["logits"]
    rows = len(inputs["input_ids"])
    inputs["task_ids"] = torch.tensor((tasks * rows)[:rows])
    config = peft.PolyConfig(task_type=cases.task_of(base), r=4, n_skills=3, n_tasks=3, **settings)
    model = peft.get_peft_model(zoo.load(base), config)
    for key, p in model.named_parameters():
        if p.requires_grad:
            width = 1.0 if "router" in key else 0.35
            keep = p.data if ".poly_" not in key else 0.0
            p.data = keep + torch.from_numpy(rng("adapter", name, key).uniform(-width, width, tuple(p.shape))).float()
    logits, rel = forward_both(model.eval(), inputs)
    save_adapter(model, out / "adapter", base)
    again = forward(peft.PeftModel.from_pretrained(zoo.load(base), out / "adapter"), inputs)
    keep = logits_mask(logits, inputs).bool()
    meta = {"case": name, "model": base, "method": "poly", "variant": variant, "checks": checks, "task_type": cases.task_of(base),
            "merge": False, "tolerance": TOLERANCE, "inputs": "./inputs.safetensors", "effect_rel": relative(logits, before),
            "peft": peft.__version__, "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": relative(again[keep], logits[keep])}}
    assert rel < 1e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_tensors(out / "inputs.safetensors", inputs)
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def make():
    for row in TABLE:
        write_case(*row)
