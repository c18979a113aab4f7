"""Cases and trajectories of AdaLoRA, and cases of Poly, both from `peft`.

AdaLoRA's file holds only the triplets that `rank_pattern` marks; the cases `_pruned` have such a pattern, a matrix that
lost all of them included. Its trajectories call `update_and_allocate` after each update with the number of the step from
1, so that the last cut falls on step `total_step - tfinal`. Poly is told the task with each batch: here it is the first.
"""

import copy
import warnings

import peft
import torch
import transformers
from peft.tuners.poly.router import PolyRouter

import cases
import zoo
from adapters_io import save_adapter
from batches import batches
from common import TRAJECTORIES, fresh, rng, write_json, write_tensors
from rows import case
from training import DEFAULTS, trajectory, well_posed

cases.CONFIGS.update(adalora=peft.AdaLoraConfig, poly=peft.PolyConfig)


def adalora(model, variant, checks, merge=True, **config):
    config = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 100, **config}
    return case(model, "adalora", variant, checks, merge, **config)


def poly(model, variant, checks, **config):
    return case(model, "poly", variant, checks, False, **{"r": 4, "n_skills": 3, **config})


SAVED = dict(modules_to_save=["classifier"])
TABLE = [
    adalora("llama", None, "default targets (q_proj, v_proj)"),
    adalora("llama", "pruned", "some triplets gone, all of one matrix", target_modules=cases.LINEARS),
    adalora("llama", "schedule", "every setting of the schedule", tinit=5, tfinal=10, deltaT=3, beta1=0.9, beta2=0.8,
            orth_reg_weight=0.1, layers_to_transform=[0, 2]),
    adalora("llama_bias", "bias_all", "every bias of the model trained", bias="all"),
    adalora("llama_bias", "bias_lora_only", "biases of adapted linears trained", bias="lora_only", target_modules=["q_proj", "down_proj"]),
    adalora("qwen2", "pruned", "biases on q, k, v; tied head", target_modules="all-linear"),
    adalora("qwen3", None, "norms on queries and keys"),
    adalora("bert", None, "default targets, trained classifier"),
    adalora("bert", "pruned", "triplets gone beside a classifier", target_modules=cases.BERT_ALL),
    adalora("roberta", None, "default query, key, value, dense; a classifier of two layers", merge=False),
    adalora("gpt2", "pruned", "a fused projection, stored transposed"),
    adalora("t5", None, "default targets on both sides and across"),
    adalora("vit", None, "queries and values, trained classifier", target_modules=["q_proj", "v_proj"], **SAVED),
    adalora("vit", "patches", "the convolution that makes the patches", target_modules=["projection", "fc1"]),
    poly("llama", None, "queries and values", target_modules=["q_proj", "v_proj"]),
    poly("llama", "splits", "parts mixed apart, several tasks", target_modules=["q_proj", "o_proj"], n_splits=4, n_tasks=3),
    poly("qwen2", None, "biases on q, k, v", target_modules="all-linear", r=2),
    poly("bert", None, "trained classifier", target_modules=["query", "value"], n_splits=2),
    poly("t5", None, "both sides and across", target_modules=["q", "v"]),
    poly("vit", None, "queries and values", target_modules=["q_proj", "v_proj"], **SAVED),
]

TRAJECTORIES_TABLE = {
    "llama__adalora": ("llama", "full", {}, dict(tinit=1, tfinal=2)),
    "llama__adalora_every_two": ("llama", "padded", dict(learning_rate=5e-3, max_grad_norm=0.5, schedule="linear", warmup_ratio=0.25),
                                 dict(tinit=1, tfinal=1, deltaT=2, target_modules=cases.LINEARS)),
    "llama__adalora_accumulation": ("llama", "uneven", dict(gradient_accumulation=2), dict(orth_reg_weight=0.1)),
    "bert__adalora": ("bert", "padded", dict(weight_decay=0.1), dict(tfinal=3, beta1=0.7, beta2=0.9)),
    "t5__adalora": ("t5", "ragged", {}, dict(tfinal=2, orth_reg_weight=0.0)),
}

plain_attach, plain_router = cases.attach, PolyRouter.forward


def route(self, task_ids, input_ids):
    return plain_router(self, torch.zeros(len(input_ids), dtype=torch.long) if task_ids is None else task_ids, input_ids)


def attach(c, base):
    model = plain_attach(c, base)
    if c["method"] == "adalora" and (c["variant"] or "").startswith("pruned"):
        prune(model, cases.label(c))
    return model


def prune(model, name):
    """Marks some triplets as gone and zeroes their numbers, as `RankAllocator` leaves them."""
    pattern = {}
    for number, (key, p) in enumerate(sorted((k, p) for k, p in model.base_model.model.named_parameters() if "lora_E" in k)):
        keep = rng("pattern", name, key).random(len(p)) < 0.6
        keep[:] = keep if number != 1 else False
        p.data[~torch.from_numpy(keep)] = 0.0
        pattern[key] = keep.tolist()
    model.peft_config["default"].rank_pattern = pattern


def attempt(name, out, salt):
    model, kind, options, settings = TRAJECTORIES_TABLE[name]
    o = {**DEFAULTS, **options}
    data = batches(name + salt, model, kind, o["steps"] * o["batch_size"] * o["gradient_accumulation"])
    c = adalora(model, "trajectory_" + name, "", **{"total_step": o["steps"], **settings})
    m = plain_attach(c, zoo.load(model))
    m.after_update = lambda model, step, optimizer: model.base_model.update_and_allocate(step)
    save_adapter(copy.deepcopy(m), out / "init_adapter", model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = trajectory(m, data, zoo.is_causal(model), **options)
    if not well_posed(expected):
        return False
    save_adapter(m, out / "final_adapter", model)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": model, "method": "adalora", "notes": None,
                                       "peft": peft.__version__, "transformers": transformers.__version__, **expected})
    ranks = [sum(v) for v in m.peft_config["default"].rank_pattern.values()]
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, ranks {ranks}, {expected['self_check']}", flush=True)
    return True


def make():
    cases.attach, PolyRouter.forward = attach, route
    try:
        for c in TABLE:
            cases.write_case(c)
    finally:
        cases.attach, PolyRouter.forward = plain_attach, plain_router
    for name in TRAJECTORIES_TABLE:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
