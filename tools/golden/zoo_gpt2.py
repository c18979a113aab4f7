"""Tiny GPT-2 models: learned positions, fused queries, keys and values, weights stored as [inputs, outputs].

Positions are columns, padding included, where a call gives none. The classifier of sequences reads the last token that
is not the padding id (it looks at ids, not at the mask).
"""

import json

import torch

from common import PAD, tensors_of, write_json, write_tensors
from spec import spec

GPT2 = dict(vocab_size=97, n_positions=40, n_embd=32, n_layer=2, n_head=4, n_inner=56, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)


def draw(key, shape, unit):
    if key.endswith("bias"):
        return None
    if ".ln_" in key:
        return 1.0 + 0.15 * unit
    if "wpe" in key:
        return 0.3 * unit
    if ".c_" in key:  # stored as [inputs, outputs]
        return unit * shape[0] ** -0.5
    return None


def as_on_hub(folder):
    """The form of the first files on the Hub: no `transformer.` before the names, and each layer's causal mask."""
    path = folder / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in tensors_of(path).items()}
    c = json.loads((folder / "config.json").read_text())
    for layer in range(c["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, c["n_positions"], c["n_positions"]))
    write_tensors(path, tensors)
    for key in ("dtype", "tie_word_embeddings", "add_cross_attention", "reorder_and_upcast_attn", "pad_token_id", "n_inner",
                "scale_attn_by_inverse_layer_idx", "scale_attn_weights", "use_cache"):
        del c[key]
    c["n_ctx"] = c["n_positions"]
    c["transformers_version"] = "4.57.6"
    write_json(folder / "config.json", c)


def gpt2(cls, **more):
    family = {k: more.pop(k) for k in ("length", "files") if k in more}
    return spec(cls, dict(GPT2, **more), draw=draw, **family)


TABLE = {
    "gpt2": gpt2("GPT2LMHeadModel"),
    "gpt2_hub": gpt2("GPT2LMHeadModel", n_embd=24, n_head=2, n_positions=24, n_inner=None, files=as_on_hub),
    "gpt2_untied": gpt2("GPT2LMHeadModel", n_embd=30, n_head=3, n_inner=37, n_layer=1, tie_word_embeddings=False,
                        layer_norm_epsilon=1e-3),
    "gpt2_inverse_layer": gpt2("GPT2LMHeadModel", n_layer=3, scale_attn_by_inverse_layer_idx=True,
                               reorder_and_upcast_attn=True),
    "gpt2_gelu": gpt2("GPT2LMHeadModel", n_embd=24, activation_function="gelu", scale_attn_weights=False, n_inner=40),
    "gpt2_cls": gpt2("GPT2ForSequenceClassification", num_labels=3),
    "gpt2_token": gpt2("GPT2ForTokenClassification", num_labels=5, classifier_dropout=0.0),
}
