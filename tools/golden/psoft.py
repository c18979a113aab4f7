"""PSOFT (Wu et al., ICLR 2026): `peft`'s logits, in a file that holds the singular vectors too.

`peft` makes A and B again when it loads an adapter, with signs that depend on the library; here they are beside its own
tensors as `psoft_A` [r, in] and `psoft_B` [out, r], and `peft_type` is `ENGRAFT_PSOFT`. All else is as `peft` writes it.
"""

import json

from peft.tuners.psoft.layer import PsoftLayer
from safetensors.torch import load_file, save_file

import adapters_io
import cases
import trajectories
from common import CASES, fresh
from common import TRAJECTORIES as PLACE
from rows import case

BOUNDS = {"psoft_R.default.vector": (None, 0.4), "psoft_R": (False, 0.5)}
DROPPED = ("fan_in_fan_out", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed")
TABLE = [
    case("llama", "psoft", None, "a rotation and both scales", r=6, psoft_alpha=6),
    case("bert", "psoft", "series", "three terms of a short generator, roots of the singular values", r=5, use_cayley_neumann=True,
         num_cayley_neumann_terms=3, cayley_neumann_eps=0.8, ab_svd_init="pissa_init", psoft_mag_b=False),
    case("qwen2", "psoft", "free", "any matrix", r=4, psoft_alpha=8, psoft_orth=False, psoft_mag_a=False),
    case("t5", "psoft", None, "the rotation alone", r=5, psoft_mag_a=False, psoft_mag_b=False),
]
TRAJECTORIES = {
    "llama__psoft": ("llama", "full", {}, "psoft", dict(r=5)),
    "bert__psoft_series": ("bert", "padded", {}, "psoft", dict(r=5, use_cayley_neumann=True, cayley_neumann_eps=0.8)),
}


def add_vectors(model, path):
    """Puts A and B into the file at `path`, and the type that says so."""
    tensors = load_file(path / "adapter_model.safetensors")
    for name, m in model.named_modules():
        if isinstance(m, PsoftLayer):
            a, b = m._get_psoft_ab_cache_buffers("default")
            tensors[f"{name}.psoft_A"], tensors[f"{name}.psoft_B"] = a.contiguous().float(), b.contiguous().float()
    save_file({k: tensors[k] for k in sorted(tensors)}, path / "adapter_model.safetensors")
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    config = {k: v for k, v in config.items() if k not in DROPPED}
    config["peft_type"] = "ENGRAFT_PSOFT"
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def register():
    import peft
    cases.CONFIGS["psoft"] = peft.PsoftConfig
    adapters_io.BOUNDS.update(BOUNDS)
    trajectories.TABLE.update(TRAJECTORIES)


def make():
    import zoo
    register()
    for c in TABLE:
        cases.write_case(c)
        model = cases.attach(c, zoo.load(c["model"]))
        add_vectors(model, CASES / cases.label(c) / "adapter")
    for name, (model, _, _, method, settings) in TRAJECTORIES.items():
        if not any(trajectories.attempt(name, fresh(PLACE / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
        start = cases.attach(case(model, method, "trajectory_" + name, "", **settings), zoo.load(model))
        for part in ("init_adapter", "final_adapter"):
            add_vectors(start, PLACE / name / part)
