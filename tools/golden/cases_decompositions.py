"""Cases and trajectories of methods that take the weights apart: FRoD those of one kind together, AdaMSS each by itself.

Two threads give other signs and, where eigenvalues are equal, other eigenvectors than one: `peft` reads such a file rightly
only where it decomposes as it did when the file was made. So cases have the basis in the file (`save_projection`), and
`frod.json` holds bases that are determined but for the signs of their columns.

AdaMSS finds the rows of its subspaces anew whenever a file is read, by k-means over singular vectors, of which there must be
fewer than outputs: the rows of a whole orthogonal matrix are all equally far from each other. Its schedule counts steps from
0, as its callback does.
"""

import numpy as np
import peft
import torch
from peft.tuners.adamss import AdamssLayer
from peft.tuners.adamss.utils import clustering_Z
from peft.tuners.frod import FrodLayer
from peft.tuners.frod.model import _projection_from_weights

import adapters_io
import cases
import cases_interchange
import common
import training
import trajectories
from common import GOLDEN, fresh, rng, write_json
from common import TRAJECTORIES as PLACE
from rows import case

CONFIGS = {"frod": peft.FrodConfig, "adamss": peft.AdamssConfig}
BOUNDS = {"frod_lambda_l": (True, 0.3), "frod_lambda_s_values": (False, 0.4), "adamss_A": (True, 0.3), "adamss_B": (False, 0.5)}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def frod(model, variant, checks, /, merge=True, **config):
    return case(model, "frod", variant, checks, merge=merge, progressbar=False, **config)


TABLE = [
    frod("llama", None, "default targets, one entry in a hundred"),
    frod("llama", "wide", "fewer rows than columns, all kinds of one block", sparse_rate=0.05, layers_to_transform=1,
         target_modules=ATTENTION + ["gate_proj", "down_proj"]),
    frod("llama_bias", "bias", "biases of targets trained, many entries, another seed", sparse_rate=0.5, bias="frod_only",
         projection_prng_key=7, target_modules=["q_proj", "v_proj"]),
    frod("llama", "diagonal", "no entries beside the diagonal", sparse_rate=0.0, target_modules=["o_proj", "up_proj"]),
    frod("qwen3", None, "another model", sparse_rate=0.03, target_modules=ATTENTION),
    frod("bert", None, "dense layers of several kinds, a classifier", sparse_rate=0.02, target_modules=["query", "dense"]),
    frod("gpt2", None, "transposed matrices", sparse_rate=0.02, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"]),
    frod("t5", None, "the decoder's basis for the encoder too", sparse_rate=0.02),
    frod("roberta", None, "every bias trained (peft cannot merge beside a classifier of two layers)", merge=False, sparse_rate=0.02, bias="all"),
    frod("vit", None, "no task type", sparse_rate=0.02, target_modules=["q_proj", "v_proj", "fc1"]),
    case("llama", "adamss", None, "default targets", r=10),
    case("llama", "adamss", "wide", "more outputs than inputs, all directions", r=100, num_subspaces=4, subspace_rank=3,
         target_modules=["up_proj", "gate_proj"]),
    case("qwen2", "adamss", None, "biases change too", r=12, num_subspaces=3, subspace_rank=2, target_modules=ATTENTION),
    case("bert", "adamss", None, "biases change too, a classifier", r=8, num_subspaces=7, target_modules=["query", "intermediate.dense"]),
    case("llama_bias", "adamss", "dynamic", "ranks by singular values", r=10, subspace_rank=6, use_dynamic_rank=True, svd_threshold=0.3,
         random_seed=5, layers_to_transform=[0, 2], target_modules=["q_proj", "down_proj"]),
    case("t5", "adamss", None, "encoder and decoder", r=9, num_subspaces=3, init_weights=None),
    case("vit", "adamss", None, "no task type, one subspace", r=11, num_subspaces=1, subspace_rank=4, target_modules=["q_proj", "fc2"]),
    case("qwen3", "adamss", "asa", "with a schedule", r=10, num_subspaces=3, use_asa=True, asa_target_subspaces=4),
]

# Models in half precision: FRoD's bases are in their type, what else a method adds in f32.
HALF = [
    frod("llama_bf16", "half", "a basis in bf16", merge=False, sparse_rate=0.05, target_modules=["q_proj", "down_proj"]),
    frod("llama_f16", "half", "a basis in f16", sparse_rate=0.05, target_modules=["v_proj"]),
    case("bert_bf16", "adamss", "half", "directions in f32 over a model in bf16", r=8, num_subspaces=4, target_modules=["query", "value"]),
]

# name -> (model, kind of batches, options of training, method and its settings), as in trajectories.py
TRAJECTORIES = {
    "llama__frod": ("llama", "full", {}, "frod", dict(sparse_rate=0.05, progressbar=False)),
    "bert__frod": ("bert", "padded", dict(weight_decay=0.1), "frod", dict(sparse_rate=0.02, bias="frod_only", progressbar=False)),
    "t5__frod": ("t5", "ragged", {}, "frod", dict(sparse_rate=0.02, progressbar=False)),
    "llama__adamss": ("llama", "full", {}, "adamss", dict(r=10, num_subspaces=3, subspace_rank=2)),
    "bert__adamss": ("bert", "padded", dict(weight_decay=0.1), "adamss", dict(r=8, num_subspaces=4)),
    "llama__adamss_asa": ("llama", "full", dict(weight_decay=0.1, max_grad_norm=0.5, learning_rate=5e-3), "adamss", dict(
        r=10, num_subspaces=3, subspace_rank=2, use_asa=True, asa_target_subspaces=6, init_warmup=1, final_warmup=7, mask_interval=2)),
}


def allocate(model, step, optimizer):
    """What AdaMSS's callback does after an update; at the end all tensors count as trained."""
    model.base_model.update_and_allocate(step - 1)
    if step == trajectories.DEFAULTS["steps"]:
        for key, p in model.named_parameters():
            if "adamss_A" in key or "adamss_B" in key:
                p.requires_grad_(True)


def with_schedule(prepared):
    def prepare(name, model, method, settings):
        m, save = prepared(name, model, method, settings)
        if settings.get("use_asa"):
            m.after_update = allocate
        return m, save
    return prepare


def wide(double):
    """AdaMSS's layers remember the type of their weights."""
    def copy(model):
        model = double(model)
        for m in model.modules():
            if isinstance(m, AdamssLayer):
                m.dtype = torch.float64
        return model
    return copy


def with_parts_of_file(tied):
    """FRoD's layers with the U that belongs to the basis they have read: `peft` keeps that of the one it made."""
    def read(model):
        for m in tied(model).modules():
            if isinstance(m, FrodLayer):
                weight = m.base_layer.weight
                m.frod_U["default"] = m._calculate_frod_u_and_lambda(m.frod_V["default"], weight)[0].to(weight.dtype)
        return model
    return read


def clusters():
    """Points and the clusters that scikit-learn puts them into, as AdaMSS asks for them."""
    found = []
    for count, width, k in [(12, 3, 4), (40, 5, 7), (9, 2, 9), (60, 8, 5), (3, 4, 6), (30, 2, 1)]:
        points = torch.from_numpy(rng("clusters", count, width, k).standard_normal((count, width)).astype(np.float32))
        labels, effective = clustering_Z(points, k, 10)
        found.append({"points": points.tolist(), "clusters": k, "labels": labels.tolist()})
    write_json(GOLDEN / "random" / "clusters.json", {"cases": found})


def bases():
    """Weights of one kind in several layers and their common basis by `peft`."""
    found = []
    for layers, out, inn in [(3, 6, 6), (2, 7, 5), (4, 3, 5), (3, 5, 8)]:
        weights = [torch.from_numpy(rng("frod", layers, out, inn, i).standard_normal((out, inn))).float() for i in range(layers)]
        basis = _projection_from_weights(weights, 1e-3)
        found.append({"weights": [w.tolist() for w in weights], "basis": basis.tolist()})
    write_json(GOLDEN / "random" / "frod.json", {"regularization_alpha": 1e-3, "bases": found})


def register():
    cases.CONFIGS.update(CONFIGS)
    trajectories.TABLE.update(TRAJECTORIES)
    adapters_io.BOUNDS.update(BOUNDS)
    common.doubled = training.doubled = wide(common.doubled)
    trajectories.prepared = with_schedule(trajectories.prepared)


def make(only=None):
    register()
    if not only or "frod" in only:
        bases()
    if not only or "adamss" in only:
        clusters()
    for c in TABLE:
        if not only or c["method"] in only:
            cases.write_case(c)
    cases_interchange.CONFIGS.update(CONFIGS)
    cases.tied = with_parts_of_file(cases.tied)
    for c in HALF:
        if not only or c["method"] in only:
            cases_interchange.write_case(c)
    for name, row in TRAJECTORIES.items():
        if only and row[3] not in only:
            continue
        if not any(trajectories.attempt(name, fresh(PLACE / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
