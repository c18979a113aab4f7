"""CARTRIDGE of `peft`, a prefix whose first tokens are not trained (PyTorch's generator draws them), and CPT, whose file is a prompt."""

import copy
import warnings

import peft
import torch
import transformers

import cases
import zoo
from adapters_io import save_adapter
from batches import batches
from common import TRAJECTORIES, fresh, write_json, write_tensors
from rows import case, virtual
from training import DEFAULTS, trajectory, well_posed

cases.CONFIGS.update(cartridge=peft.CartridgeConfig, prompt_cpt=peft.CPTConfig)
TABLE = [
    virtual("llama", "cartridge", None, "one token frozen, grouped-query attention"),
    virtual("llama", "cartridge", "left", "padding on the left, none frozen", side="_left", num_frozen_tokens=0),
    virtual("qwen3", "cartridge", None, "norms on queries and keys", tokens=5, num_frozen_tokens=3),
    virtual("gpt2", "cartridge", None, "learned positions"),
    virtual("bert", "cartridge", None, "trained classifier, all frozen", tokens=3, num_frozen_tokens=3),
    virtual("t5", "cartridge", None, "rows of layers counted round"),
]
CONTEXT = [
    virtual("llama", "prompt_cpt", None, "a prompt near to its examples", tokens=5, cpt_token_ids=[5, 9, 30, 7, 2], cpt_mask=[1] * 5,
            cpt_tokens_type_mask=[1, 2, 2, 3, 4], opt_weighted_loss_type="decay", opt_loss_decay_factor=0.95, opt_projection_epsilon=30.0),
    virtual("gpt2", "prompt_cpt", None, "padding on the left", side="_left", tokens=3, cpt_token_ids=[5, 9, 30],
            opt_projection_format_epsilon=20.0),
]
# name -> (model, kind of batches, options of training, settings)
TRAINED = {
    "llama__cartridge": ("llama", "full", dict(learning_rate=1e-2, weight_decay=0.1), dict(num_virtual_tokens=4, num_frozen_tokens=2)),
    "gpt2__cartridge": ("gpt2", "padded", dict(learning_rate=1e-2), dict(num_virtual_tokens=3)),
}


def attempt(name, out, salt):
    """Writes one trajectory; false where its batches, drawn with `salt`, make rounding visible."""
    model, kind, options, settings = TRAINED[name]
    o = {**DEFAULTS, **options}
    data = batches(name + salt, model, kind, o["steps"] * o["batch_size"] * o["gradient_accumulation"])
    torch.manual_seed(0)
    m = cases.attach(case(model, "cartridge", "trajectory_" + name, "", **settings), zoo.load(model))
    save_adapter(copy.deepcopy(m), out / "init_adapter", model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = trajectory(m, data, zoo.is_causal(model), **options)
    if not well_posed(expected):
        return False
    save_adapter(m, out / "final_adapter", model)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": model, "method": "cartridge", "notes": None,
                                       "peft": peft.__version__, "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    for c in TABLE + CONTEXT:
        torch.manual_seed(0)
        cases.write_case(c)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
