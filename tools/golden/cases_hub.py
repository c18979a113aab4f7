"""Prefixes, prompts, LoRA and (IA)³ by the library `adapters`, each alone in a file; MAM adapters and UniPELT on encoders with decoders;
invertible adapters; fusions as setups.

In AdapterHub's file form; runs in the environment of requirements-adapters.txt. A T5 of the library counts the rows of a prefix
into the distances of keys, and not into those of queries.
"""

import json
import warnings

import torch
import transformers
from adapters import (CompacterConfig, CompacterPlusPlusConfig, DoubleSeqBnConfig, DoubleSeqBnInvConfig, IA3Config, LoRAConfig,
                      PrefixTuningConfig, PromptTuningConfig, SeqBnConfig, SeqBnInvConfig)

from adapters.composition import Fuse

import cases_fusion
import hybrid
from batches import batches
from bottleneck import load, task_of
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, tensors_of,
                    write_json, write_logits, write_tensors)


def prefix(flat=False, length=3, **more):
    return PrefixTuningConfig(prefix_length=length, bottleneck_size=6, flat=flat, **more)


# model, method, variant, configuration, side ("full": rows without padding), what it checks
TABLE = [
    ("bert", "prefix", "hub", prefix(), "", "a prefix through its network"),
    ("roberta", "prefix", "hub_flat", prefix(flat=True), "_left", "a prefix as it is, padding on the left"),
    ("gpt2", "prefix", "hub", prefix(), "", "positions stay where they are"),
    ("llama", "prefix", "hub_leave_out", prefix(leave_out=[1]), "", "grouped-query attention, one layer without"),
    ("vit", "prefix", "hub", prefix(length=2), "", "a picture"),
    ("t5", "prefix", "hub", prefix(), "", "encoder, decoder and cross-attention, a set of tensors each"),
    ("t5_flan", "prefix", "hub_decoder", prefix(encoder_prefix=False, cross_prefix=False), "_left", "the decoder's own attention"),
    ("t5_uneven", "prefix", "hub_gated", prefix(use_gating=True), "full", "gates; that of cross-attention sees the queries"),
    ("roberta", "prefix", "hub_relu", prefix(non_linearity="relu"), "", "another function in its network"),
    ("llama", "prefix", "hub_two_gates", prefix(use_gating=True, shared_gating=False), "full", "a gate for keys and one for values"),
    ("bert", "prompt", "hub", PromptTuningConfig(prompt_length=3), "", "rows behind the embeddings; the first of them is classified"),
    ("bert", "prompt", "hub_after_bos", PromptTuningConfig(prompt_length=4, combine="prefix_after_bos"), "", "rows behind the first token"),
    ("roberta_token", "prompt", "hub_left", PromptTuningConfig(prompt_length=3), "_left", "a token head, padding on the left"),
    ("vit", "prompt", "hub", PromptTuningConfig(prompt_length=2), "", "a picture"),
    ("t5", "mam", None, hybrid.mam(), "", "both stacks"),
    ("t5_flan", "mam", "flat_left", hybrid.mam(flat=True), "_left", "gated MLPs; the encoder's padding on the left"),
    ("t5", "unipelt", None, hybrid.unipelt(), "full", "gates in both stacks and between them"),
    ("t5_uneven", "unipelt", "keys", hybrid.unipelt(flat=True, matrices=("q", "k", "v")), "full", "LoRA at queries, keys and values"),
    ("bert", "lora", "hub", LoRAConfig(r=2, alpha=5), "", "queries and values"),
    ("roberta", "lora", "hub_everywhere", LoRAConfig(r=2, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True), "",
     "attention and MLP"),
    ("gpt2", "lora", "hub", LoRAConfig(r=2, alpha=3, attn_matrices=["k", "v"], output_lora=True), "", "two thirds of one matrix"),
    ("llama", "lora", "hub_leave_out", LoRAConfig(r=3, leave_out=[0], intermediate_lora=True), "", "one layer without"),
    ("t5", "lora", "hub", LoRAConfig(r=2, alpha=4, intermediate_lora=True), "", "cross-attention too"),
    ("vit", "lora", "hub", LoRAConfig(r=2), "", "a picture"),
    ("bert", "ia3", "hub", IA3Config(), "", "keys, values and the MLP's first matrix"),
    ("gpt2", "ia3", "hub", IA3Config(), "", "two thirds of one matrix"),
    ("llama", "ia3", "hub", IA3Config(alpha=2), "", "a factor of its own"),
    ("t5_flan", "ia3", "hub", IA3Config(output_lora=True), "_left", "gated MLPs, the last matrix too"),
    ("bert", "seq_bn", "invertible", SeqBnInvConfig(reduction_factor=4), "", "behind the norm of the embeddings"),
    ("bert_mlm", "seq_bn", "invertible", SeqBnInvConfig(reduction_factor=4, inv_adapter_reduction_factor=4), "", "a head of the model's own"),
    ("roberta", "double_seq_bn", "invertible", DoubleSeqBnInvConfig(reduction_factor=4), "_left", "padding on the left"),
    ("gpt2", "seq_bn", "invertible", SeqBnInvConfig(reduction_factor=4, non_linearity="gelu"), "", "behind the positions"),
    ("llama", "seq_bn", "invertible", SeqBnInvConfig(reduction_factor=4), "", "behind the table"),
    ("t5", "double_seq_bn", "invertible", DoubleSeqBnInvConfig(reduction_factor=4), "", "the encoder's alone"),
]
TRAINED = {"t5__mam": ("t5", hybrid.mam(), "ragged"), "t5__unipelt": ("t5", hybrid.unipelt(), "full"),
           "t5__seq_bn_gating": ("t5", DoubleSeqBnConfig(reduction_factor=4, use_gating=True), "full"),
           "gpt2__ia3_hub": ("gpt2", IA3Config(), "padded"),
           "bert__seq_bn_invertible": ("bert", SeqBnInvConfig(reduction_factor=4), "padded")}


def inputs_of(base, side, plain=hybrid.inputs_of):
    """Rows whose targets are without padding too, which the library's means over columns would count."""
    inputs = plain(base, side)
    if side == "full" and "decoder_input_ids" in inputs:
        ids, gaps = inputs["decoder_input_ids"], inputs["decoder_attention_mask"] == 0
        other = 3 + torch.arange(ids.numel()).view(ids.shape) * 7 % 40
        inputs |= {"decoder_input_ids": torch.where(gaps, other, ids), "decoder_attention_mask": torch.ones_like(ids)}
    return inputs


def batches_of(name, base, kind, rows, plain=hybrid.batches):
    """The same for batches of training."""
    data = plain(name, base, kind, rows)
    if kind == "full" and base.startswith("t5"):
        other = lambda t: 3 + torch.arange(t.numel()).view(t.shape) * 11 % 40
        gaps = data["attention_mask"] == 0
        data |= {"input_ids": torch.where(gaps, other(gaps), data["input_ids"]), "attention_mask": torch.ones_like(data["attention_mask"]),
                 "labels": torch.where(data["labels"] < 0, other(data["labels"]), data["labels"])}
    return data


HOULSBY = [DoubleSeqBnConfig(reduction_factor=4), DoubleSeqBnConfig(reduction_factor=8, non_linearity="gelu")]
# model, variant, form, the fused adapters, side, what it checks: fusions in the library's directories
FUSIONS = [
    ("bert", "hub", "dynamic", cases_fusion.PAIR, "", "a setup"),
    ("mistral", "hub_static", "static", [*cases_fusion.PAIR, SeqBnConfig(reduction_factor=2)], "", "three adapters, sliding window"),
    ("roberta", "hub_houlsby", "dynamic", HOULSBY, "_left", "after both sublayers, padding on the left"),
    ("t5_flan", "hub_houlsby", "dynamic", HOULSBY, "", "encoder and decoder"),
    ("vit", "hub", "dynamic", cases_fusion.PAIR, "", "a picture"),
    ("bert", "hub_leave_out", "static", [SeqBnConfig(reduction_factor=4, leave_out=[0]), SeqBnConfig(reduction_factor=8)], "",
     "one layer with the last adapter alone"),
    ("roberta", "hub_left_out", "static", [SeqBnConfig(reduction_factor=4, leave_out=[0]), SeqBnConfig(reduction_factor=8, leave_out=[0])],
     "", "one layer with none, which has tensors of a fusion all the same"),
    ("bert", "hub_reads", "dynamic", [SeqBnConfig(reduction_factor=4), SeqBnConfig(reduction_factor=8, original_ln_before=False)], "",
     "the first is given what the last reads"),
    ("bert", "hub_compacter", "dynamic", [CompacterConfig(reduction_factor=4), DoubleSeqBnConfig(reduction_factor=8, non_linearity="gelu")], "",
     "Compacter beside plain matrices"),
    ("gpt2", "hub_compacter", "static", [CompacterPlusPlusConfig(reduction_factor=4), CompacterPlusPlusConfig(
        reduction_factor=8, shared_phm_rule=False, phm_dim=2, factorized_phm_W=False)], "_left", "a shared rule and rules by layer"),
]


def save_setup(model, path, base, names):
    model.save_adapter_setup(str(path), Fuse(*names), use_safetensors=True)
    for file in path.rglob("*head*"):
        file.unlink()
    for file in path.rglob("*.safetensors"):
        # Compacter's shared tensors, which the library leaves out of files.
        shared = {k: p for k, p in model.named_parameters() if f"shared_parameters.{file.parent.name}." in k}
        write_tensors(file, {**tensors_of(file), **shared})
    for file in path.rglob("*.json"):
        c = json.loads(file.read_text())
        write_json(file, {**c, "model_name": f"models/{base}"} if "model_name" in c else c)


def write_fusion(base, variant, form, configs, side, checks):
    name = f"{base}__adapter_fusion_{variant}"
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / f"inputs{side}.safetensors")
    before = tensors_of(INPUTS / base / f"base_logits{side}.safetensors")["logits"]
    model = cases_fusion.attach(base, form, configs, name)
    logits, rel = forward_both(model, inputs)
    save_setup(model, out / "adapter", base, [n for n, _ in model.configs])
    again = load(base)
    again.load_adapter_setup(str(out / "adapter"), set_active=True, use_safetensors=True)
    saved = {k: v for file in (out / "adapter").rglob("*.safetensors") for k, v in tensors_of(file).items()}
    again.load_state_dict({k: v for k, v in saved.items() if "shared_parameters." in k}, strict=False)
    keep = logits_mask(logits, inputs).bool()
    meta = {"case": name, "model": base, "method": "adapter_fusion", "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": False, "tolerance": TOLERANCE, "format": "adapterhub", "effect_rel": relative(logits, before), "adapters": "1.3.0",
            "inputs": f"../../inputs/{base}/inputs{side}.safetensors" if side else None, "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": relative(forward(again, inputs)[keep], logits[keep])}}
    assert rel < 1e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def make(only=""):
    warnings.simplefilter("ignore")
    hybrid.inputs_of, hybrid.batches = inputs_of, batches_of
    for row in TABLE:
        if only in f"{row[0]}__{row[1]}_{row[2]}":
            hybrid.write_case(*row)
    for row in FUSIONS:
        if only in f"{row[0]}__adapter_fusion_{row[1]}":
            write_fusion(*row)
    hybrid.TRAINED.update(TRAINED)
    for name in TRAINED:
        if only not in name:
            continue
        if not any(hybrid.attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
