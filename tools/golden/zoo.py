"""The tiny models: one random checkpoint for each architecture and setting that the engine claims.

Weights are scaled so that logits are of order one and every part matters: gains differ from one, biases from zero.
"""

import json

import numpy as np
import torch
import transformers as tf

import zoo_gpt2
import zoo_post_vit
import zoo_t5
import zoo_vit
from common import INPUTS, MODELS, PAD, forward_both, fresh, rng, write_json, write_logits, write_tensors
from spec import spec

LLAMA = dict(vocab_size=101, hidden_size=48, intermediate_size=77, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, pad_token_id=PAD, bos_token_id=1,
             eos_token_id=2, tie_word_embeddings=False, rope_theta=10000.0)
SMALL = dict(LLAMA, hidden_size=32, intermediate_size=56, num_hidden_layers=2)
YARN = dict(SMALL, head_dim=16, max_position_embeddings=256)
QWEN = dict(SMALL, rms_norm_eps=1e-6, rope_theta=1e6)
BERT = dict(vocab_size=103, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=40, type_vocab_size=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            pad_token_id=PAD, layer_norm_eps=1e-12, hidden_act="gelu")
ROBERTA = dict(BERT, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, layer_norm_eps=1e-5)


def rope(kind, **more):
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


# `old_rope`: config.json in the form of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`), as most files on
# the Hub have it; the others are as transformers 5 writes them.
MODELS_TABLE = {
    "llama": spec("LlamaForCausalLM", LLAMA),
    "llama_tied": spec("LlamaForCausalLM", dict(SMALL, tie_word_embeddings=True), old_rope=True),
    "llama_bias": spec("LlamaForCausalLM", dict(SMALL, attention_bias=True, mlp_bias=True)),
    "llama_mha": spec("LlamaForCausalLM", dict(SMALL, num_key_value_heads=4, head_dim=12)),
    "llama_rope_llama3": spec("LlamaForCausalLM", dict(SMALL, max_position_embeddings=512, rope_parameters=rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)),
        length=29, old_rope=True),
    "llama_rope_linear": spec("LlamaForCausalLM", dict(SMALL, rope_parameters=rope("linear", factor=3.0)), length=23),
    "llama_rope_linear_old": spec("LlamaForCausalLM", dict(SMALL, rope_parameters=rope("linear", factor=3.0)),
                                  length=23, old_rope=True),
    "llama_rope_dynamic": spec("LlamaForCausalLM", dict(SMALL, max_position_embeddings=16, rope_parameters=rope(
        "dynamic", factor=2.0)), length=37),
    "llama_rope_yarn": spec("LlamaForCausalLM", dict(YARN, rope_parameters=dict(rope(
        "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=1.0), rope_theta=1000.0)),
        length=29),
    "llama_rope_yarn_old": spec("LlamaForCausalLM", dict(YARN, rope_parameters=dict(rope(
        "yarn", factor=4.0, original_max_position_embeddings=64), rope_theta=1000.0)), length=29, old_rope=True),
    "mistral": spec("MistralForCausalLM", dict(SMALL, num_key_value_heads=1, sliding_window=5), length=14),
    "mistral_head_dim": spec("MistralForCausalLM", dict(SMALL, head_dim=12, sliding_window=None), old_rope=True),
    "qwen2": spec("Qwen2ForCausalLM", dict(QWEN, tie_word_embeddings=True)),
    "qwen2_sliding": spec("Qwen2ForCausalLM", dict(QWEN, num_hidden_layers=3, use_sliding_window=True,
                                                   sliding_window=5, max_window_layers=1), length=14),
    "qwen3": spec("Qwen3ForCausalLM", dict(QWEN, head_dim=16)),
    "llama_bf16": spec("LlamaForCausalLM", SMALL, dtype="bfloat16"),
    "llama_f16": spec("LlamaForCausalLM", SMALL, dtype="float16", old_rope=True),
    "llama_sharded": spec("LlamaForCausalLM", SMALL, shard="40KB"),
    "bert": spec("BertForSequenceClassification", dict(BERT, num_labels=3)),
    "bert_token": spec("BertForTokenClassification", dict(BERT, num_labels=5)),
    "bert_mlm": spec("BertForMaskedLM", BERT),
    "bert_gelu_new": spec("BertForSequenceClassification", dict(BERT, num_labels=2, hidden_act="gelu_new")),
    "bert_bf16": spec("BertForSequenceClassification", dict(BERT, num_labels=3), dtype="bfloat16"),
    "bert_encoder": spec("BertModel", BERT),
    "roberta": spec("RobertaForSequenceClassification", dict(ROBERTA, num_labels=3)),
    "roberta_token": spec("RobertaForTokenClassification", dict(ROBERTA, num_labels=4)),
    "roberta_mlm": spec("RobertaForMaskedLM", ROBERTA),
    **zoo_gpt2.TABLE, **zoo_t5.TABLE, **zoo_vit.TABLE, **zoo_post_vit.TABLE,
}


def is_causal(name):
    """Whether the model predicts each token of its input from those before."""
    cls = MODELS_TABLE[name]["cls"]
    return "Causal" in cls or "LMHead" in cls


def fill(model, name):
    """Every parameter from a generator seeded by model and parameter name."""
    family = MODELS_TABLE[name].get("draw", lambda key, shape, unit: None)
    for key, p in model.named_parameters():
        draw = rng("model", name, key).standard_normal(tuple(p.shape))
        is_norm = "norm" in key.lower()
        own = family(key, tuple(p.shape), draw)
        if own is not None:
            value = own
        elif key.endswith("bias"):
            value = 0.1 * draw
        elif is_norm:
            value = 1.0 + 0.15 * draw
        elif "position_embeddings" in key or "token_type" in key:
            value = 0.3 * draw
        elif "embed" in key:
            tied = getattr(model.config, "tie_word_embeddings", False)
            value = draw * (p.shape[1] ** -0.5 if tied else 0.5)
        else:
            value = draw * p.shape[1] ** -0.5
        p.data = torch.from_numpy(value).to(torch.float32)


def rewrite_old(path):
    """Puts config.json into the form of transformers 4."""
    c = json.loads(path.read_text())
    r = c.pop("rope_parameters")
    c["rope_theta"] = r.pop("rope_theta")
    kind = r.pop("rope_type")
    c["rope_scaling"] = None if kind == "default" else {**r, ("type" if kind == "linear" else "rope_type"): kind}
    c["torch_dtype"] = c.pop("dtype")
    c["transformers_version"] = "4.57.6"
    c.pop("layer_types", None)
    write_json(path, c)


def class_of(s):
    """The class of `transformers`, or the transcription that stands for one."""
    return s.get("transcription") or getattr(tf, s["cls"])


def build(name):
    s = MODELS_TABLE[name]
    cls = class_of(s)
    settings = dict(s["settings"])
    if "rope_parameters" in settings:
        settings.pop("rope_theta")
    config = cls.config_class(**settings)
    config._attn_implementation = "eager"
    model = cls(config)
    if s.get("untied"):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    fill(model, name)
    if not s.get("untied"):
        model.tie_weights()
    if s["dtype"]:
        model.to(getattr(torch, s["dtype"]))
    out = fresh(MODELS / name)
    model.save_pretrained(out, **({"max_shard_size": s["shard"]} if s["shard"] else {}))
    (out / "generation_config.json").unlink(missing_ok=True)
    if s["old_rope"]:
        rewrite_old(out / "config.json")
    if "files" in s:
        s["files"](out)


def load(name):
    """The checkpoint in f32, with plain attention."""
    s = MODELS_TABLE[name]
    return class_of(s).from_pretrained(MODELS / name, dtype=torch.float32, attn_implementation="eager").eval()


def batch(name, side, length=None):
    """Rows of three lengths (one full, one short, one very short), padded on `side`."""
    s = MODELS_TABLE[name]
    length = length or s["length"]
    pad, vocab, cls = s["settings"]["pad_token_id"], s["settings"]["vocab_size"], s["cls"]
    g = rng("inputs", name, side, length)
    lengths = [length, length - 3, max(2, length // 3)]
    ids, mask, kinds = (torch.zeros(3, length, dtype=torch.int64) for _ in range(3))
    ids += pad
    for i, n in enumerate(lengths):
        at = slice(0, n) if side == "right" else slice(length - n, length)
        ids[i, at] = torch.from_numpy(g.integers(3, vocab, n))
        mask[i, at] = 1
        kinds[i, at] = torch.from_numpy((g.random() < 0.9) * (np.arange(n) >= n // 2)).long()
    out = {"input_ids": ids, "attention_mask": mask}
    if s["settings"].get("type_vocab_size") == 2:
        out["token_type_ids"] = kinds
    if is_causal(name):
        out["labels"] = ids.masked_fill(mask == 0, -100)
    elif "Sequence" in cls:
        out["labels"] = torch.from_numpy(g.integers(0, s["settings"]["num_labels"], 3))
    elif "Token" in cls:
        out["labels"] = torch.from_numpy(g.integers(0, s["settings"]["num_labels"], (3, length))).masked_fill(mask == 0, -100)
    return out


def write_inputs(name):
    model = load(name)
    out = fresh(INPUTS / name)
    own = MODELS_TABLE[name].get("batch")
    sides = {"": ("right", None), "_left": ("left", None)}
    if "dynamic" in name:
        sides["_short"] = ("right", 13)  # below the trained length: the rope does not grow
    if own:
        sides = {suffix: (None, None) for suffix in MODELS_TABLE[name].get("sides", sides)}
    worst = 0.0
    for suffix, (side, length) in sides.items():
        inputs = own(name, MODELS_TABLE[name], suffix) if own else batch(name, side, length)
        more = {}
        if "token_type_ids" in inputs and suffix == "_left":
            del inputs["token_type_ids"]  # the default, all zeros
        logits, rel = forward_both(model, inputs)
        if MODELS_TABLE[name]["cls"] in ("BertModel", "T5EncoderModel"):
            with torch.no_grad():
                more["last_hidden_state"] = model(**{k: v for k, v in inputs.items() if k != "labels"}).last_hidden_state
        assert rel < 1e-5 and torch.isfinite(logits).all(), (name, rel)
        worst = max(worst, rel)
        write_tensors(out / f"inputs{suffix}.safetensors", inputs)
        write_logits(out / f"base_logits{suffix}.safetensors", logits, inputs, **more)
    size = float(logits.abs().max())
    print(f"{name}: largest logit {size:.2f}, f32 against f64 {worst:.1e}", flush=True)


def make():
    for name in MODELS_TABLE:
        build(name)
        write_inputs(name)
