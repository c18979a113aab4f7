"""Adapters beyond Pfeiffer's and Houlsby's by the library `adapters`: Compacter, residual adapters, every option of
`BnConfig` that a file may hold, ReFT. In AdapterHub's file form; runs in the environment of requirements-adapters.txt.
"""

import json
import warnings

import torch
from adapters import (CompacterConfig, CompacterPlusPlusConfig, DiReftConfig, DoubleSeqBnConfig, LoReftConfig, NoReftConfig,
                      ParBnConfig, SeqBnConfig)

from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.reft import ReftModule, ReftUnit

import bottleneck
import philox
from common import TRAJECTORIES, forward, fresh, tensors_of, write_json, write_tensors


def residual(**more):
    """A layer's output y becomes y + A(LN(y)) (Bapna and Firat 2019, Lin et al. 2020)."""
    return SeqBnConfig(reduction_factor=4, ln_before=True, residual_before_ln=False, original_ln_after=False, **more)


# model, method, variant, configuration, side, what it checks
TABLE = [
    *[(m, "compacter", None, CompacterConfig(reduction_factor=4), "", "after both sublayers, a shared rule")
      for m in ("bert", "roberta", "gpt2", "llama", "t5", "vit")],
    ("bert", "compacter", "plus_plus", CompacterPlusPlusConfig(reduction_factor=8), "", "after the feed-forward alone"),
    ("llama", "compacter", "plus_plus", CompacterPlusPlusConfig(reduction_factor=4, phm_dim=2, phm_rank=2), "", "two products of rank 2"),
    ("bert", "compacter", "own_rule", CompacterConfig(reduction_factor=4, shared_phm_rule=False), "", "a rule of every layer's own"),
    ("gpt2", "compacter", "thin_rule", CompacterConfig(reduction_factor=4, factorized_phm_rule=True, phm_bias=False), "",
     "a rule of rank one, no biases"),
    ("bert", "compacter", "whole", CompacterConfig(reduction_factor=4, factorized_phm_W=False), "", "right factors of full rank"),
    ("t5", "compacter", "shared", CompacterPlusPlusConfig(reduction_factor=4, shared_W_phm=True), "", "right factors that all layers share"),
    ("vit", "compacter", "own_thin_rule", CompacterConfig(reduction_factor=4, shared_phm_rule=False, factorized_phm_rule=True), "",
     "a rule of rank one of every layer's own"),
    *[(m, "seq_bn", "residual", residual(), "", "own norm before, own residual, no norm after")
      for m in ("bert", "roberta", "gpt2", "llama", "t5", "vit")],
    ("bert", "seq_bn", "residual_left", residual(), "_left", "padding on the left"),
    ("bert_mlm", "seq_bn", "post_add", SeqBnConfig(reduction_factor=4, residual_before_ln="post_add"), "", "the sum as residual"),
    ("bert", "seq_bn", "input_residual", SeqBnConfig(reduction_factor=4, residual_before_ln=False), "", "the normed sum as residual"),
    ("bert", "double_seq_bn", "no_norm", DoubleSeqBnConfig(reduction_factor=4, original_ln_after=False), "",
     "the model's norms and residuals are dropped"),
    ("bert", "par_bn", "no_norm", ParBnConfig(reduction_factor=4, original_ln_after=False), "", "beside, norm and residual dropped"),
    ("bert", "seq_bn", "own_norms", SeqBnConfig(reduction_factor=4, ln_before=True, ln_after=True, adapter_residual_before_ln=True,
                                               scaling="channel"), "", "both own norms, the residual before the second; factors by channel"),
    ("vit", "seq_bn", "gating", SeqBnConfig(reduction_factor=4, use_gating=True), "", "a gate averaged over the picture"),
    ("vit", "par_bn", "gating", ParBnConfig(reduction_factor=4, use_gating=True, ln_after=True), "", "a gate beside the feed-forward"),
    ("t5", "double_seq_bn", "cross", DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True), "", "after the cross-attention too"),
    ("roberta", "seq_bn", "mish", SeqBnConfig(reduction_factor=4, non_linearity="mish"), "", "mish"),
    ("bert", "seq_bn", "laplace", SeqBnConfig(reduction_factor=4, non_linearity="laplace"), "", "Laplace"),
    ("gpt2", "seq_bn", "relu2", SeqBnConfig(reduction_factor=4, non_linearity="relu2"), "", "ReLU squared"),
    ("llama", "seq_bn", "relu6", SeqBnConfig(reduction_factor=4, non_linearity="relu6", scaling=3.0), "", "ReLU up to 6"),
    ("gpt2", "reft", None, LoReftConfig(r=2, dropout=0.0), "", "LoReFT at the first positions"),
    ("bert", "reft", None, LoReftConfig(r=3, prefix_positions=2, suffix_positions=2, dropout=0.0), "", "first and last positions"),
    ("bert", "reft", "left", LoReftConfig(r=2, suffix_positions=1, dropout=0.0), "_left", "padding on the left"),
    ("roberta", "reft", "tied", LoReftConfig(prefix_positions=1, suffix_positions=1, tied_weights=True, dropout=0.0), "",
     "one intervention for both"),
    ("llama", "reft", "noreft", NoReftConfig(r=4, dropout=0.0), "", "a free projection"),
    ("llama", "reft", "direft", DiReftConfig(r=4, suffix_positions=2, dropout=0.0), "", "no projection taken off"),
    ("llama", "reft", "layers", LoReftConfig(r=2, layers=[0, 2], non_linearity="gelu", dropout=0.0), "", "some blocks, a GELU"),
    ("t5", "reft", None, LoReftConfig(r=2, dropout=0.0), "", "both stacks"),
    ("vit", "reft", None, LoReftConfig(r=2, suffix_positions=3, dropout=0.0), "", "first and last patches"),
]
TRAINED = {
    "bert__compacter": ("bert", CompacterConfig(reduction_factor=4), "padded"),
    "llama__compacter_plus_plus": ("llama", CompacterPlusPlusConfig(reduction_factor=4), "padded"),
    "bert__seq_bn_residual": ("bert", residual(), "padded"),
    "gpt2__reft": ("gpt2", LoReftConfig(r=2, dropout=0.0), "padded"),
    "llama__reft_direft": ("llama", DiReftConfig(r=4, dropout=0.0), "padded"),
    "vit__seq_bn_gating": ("vit", SeqBnConfig(reduction_factor=4, use_gating=True), "images"),
}


# AdapterDrop, robust: the adapters of the first m layers rest in a batch, m drawn evenly from 0 to all but one.
ROBUST = {"llama__double_seq_bn_robust": ("llama", DoubleSeqBnConfig(reduction_factor=4), "padded")}
DROPS = 0x6164_6170_7465_7264  # the stream of its draws


class Drops(torch.nn.Module):
    """Counts the forwards of a run, which are its steps, and tells every adapter whether it rests."""

    def __init__(self, model):
        super().__init__()
        self.step = 0
        self.layers = [m for m in model.modules() if isinstance(m, BottleneckLayer)]
        model.register_forward_pre_hook(self.begin)

    def begin(self, module, args):
        self.step += 1
        count = 1 + max(layer.layer_idx for layer in self.layers)
        u = float(philox.words(0, DROPS, 1, self.step << 20)[0] >> 8) / 2**24
        for layer in self.layers:
            layer.rests = layer.layer_idx < int(u * count)


def without(self, states, residual, norm, plain=BottleneckLayer.bottleneck_layer_forward):
    if not getattr(self, "rests", False):
        return plain(self, states, residual, norm)
    states = states + residual
    return norm(states) if norm is not None else states


def save(model, path, base, plain=bottleneck.save):
    """With the tensors that Compacter's layers share, which the library leaves out where the model is no part of another."""
    plain(model, path, base)
    file = path / "adapter.safetensors"
    shared = {k: p for k, p in model.named_parameters() if f"shared_parameters.{bottleneck.NAME}." in k}
    write_tensors(file, {**tensors_of(file), **shared})
    # The library does not write down what tells DiReFT from NoReFT.
    if hasattr(model, "drops"):
        c = json.loads((path / "adapter_config.json").read_text())
        write_json(path / "adapter_config.json", {**c, "robust_drop": True})
    config = model.adapters_config.get(bottleneck.NAME)
    if getattr(config, "subtract_projection", True) is False:
        c = json.loads((path / "adapter_config.json").read_text())
        c["config"]["subtract_projection"] = False
        write_json(path / "adapter_config.json", c)


def attach(base, config, case, plain=bottleneck.attach):
    """Filled, with the signs on the diagonals of ReFT's reflections as they start."""
    model = plain(base, config, case)
    for key, p in model.named_parameters():
        if key.endswith("projection.parametrizations.weight.original"):
            p.data.fill_diagonal_(-1.0)
    if case.endswith("_robust"):
        model.drops = Drops(model)
    return model


def reloaded(base, path, inputs):
    model = bottleneck.load(base)
    model.load_adapter(str(path), with_head=False, use_safetensors=True)
    tensors = tensors_of(path / "adapter.safetensors")
    for key, p in model.named_parameters():
        if "shared_parameters." in key:
            p.data = tensors[key]
    subtracts = json.loads((path / "adapter_config.json").read_text())["config"].get("subtract_projection", True)
    for module in model.modules():
        if isinstance(module, ReftUnit):
            module.subtract_projection = subtracts
    model.set_active_adapters(bottleneck.NAME)
    return forward(model, inputs)


def in_own_type(self, states, plain=ReftModule._gather_adapted_states):
    """Also what is empty, which the library makes in f32 where the model is in f64."""
    return [s.to(states.dtype) for s in plain(self, states)]


def make(only=""):
    ReftModule._gather_adapted_states, BottleneckLayer.bottleneck_layer_forward = in_own_type, without
    bottleneck.save, bottleneck.reloaded, bottleneck.attach = save, reloaded, attach
    warnings.simplefilter("ignore")
    for row in TABLE:
        if only in row[1]:
            bottleneck.write_case(*row)
    bottleneck.TRAINED.update(TRAINED | ROBUST)
    for name in TRAINED | ROBUST:
        if only not in name:
            continue
        if not any(bottleneck.attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
