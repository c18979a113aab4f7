"""Tiny T5 models: an encoder and a decoder with relative positions, no biases, attention that is not scaled.

`transformers` 5 reads `tie_word_embeddings: false` as "do not scale the decoder's output" and ties the head anyway,
unless the file holds a head that differs. It writes `scale_decoder_outputs` instead.
"""

import json

import torch

from common import PAD, rng, tensors_of, write_json, write_tensors
from spec import spec

T5 = dict(vocab_size=73, d_model=32, d_kv=8, d_ff=44, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=PAD,
          eos_token_id=1, decoder_start_token_id=PAD)
GATED = dict(T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def drawing(settings):
    """Queries are small, since attention is not scaled; a table that is also the head is scaled by `d_model ** -0.5`."""
    is_scaled = settings.get("tie_word_embeddings", True)
    width = settings["d_model"]

    def draw(key, shape, unit):
        if key.endswith("relative_attention_bias.weight"):
            return 0.7 * unit
        if key.endswith(".q.weight"):
            return unit * (width * settings["d_kv"]) ** -0.5
        if key == "shared.weight":
            return unit if is_scaled else 0.5 * unit
        return None
    return draw


def batch(name, s, suffix):
    """Ragged rows of both sides. The decoder reads its labels shifted right and is padded on the right always."""
    c, length, target = s["settings"], s["length"], s.get("target", 9)
    g = rng("inputs", name, suffix)
    ids, mask = (torch.zeros(3, length, dtype=torch.int64) for _ in range(2))
    for i, n in enumerate([length, length - 3, max(2, length // 3)]):
        at = slice(length - n, length) if suffix == "_left" else slice(0, n)
        ids[i, at] = torch.from_numpy(g.integers(3, c["vocab_size"], n))
        mask[i, at] = 1
    out = {"input_ids": ids, "attention_mask": mask}
    if s["cls"] == "T5EncoderModel":
        return out
    labels = torch.full((3, target), -100)
    for i, n in enumerate([target - 2, target, max(2, target // 3)]):
        labels[i, :n] = torch.from_numpy(g.integers(3, c["vocab_size"], n))
    shifted = torch.cat([torch.full((3, 1), c["decoder_start_token_id"]), labels[:, :-1]], 1)
    out["decoder_attention_mask"] = (labels != -100).long()
    out["decoder_input_ids"] = shifted.masked_fill(shifted == -100, c["pad_token_id"]) * out["decoder_attention_mask"]
    out["labels"] = labels
    return out


def rows(name, s, count):
    """Ragged rows for training; the model shifts the labels right to have the decoder's input."""
    c, length, target = s["settings"], 12, 8
    g = rng("batches", name)
    out = {"input_ids": torch.full((count, length), c["pad_token_id"]), "attention_mask": torch.zeros(count, length, dtype=torch.int64),
           "labels": torch.full((count, target), -100)}
    for i, (n, m) in enumerate(zip(g.integers(4, length + 1, count), g.integers(3, target + 1, count))):
        out["input_ids"][i, :n] = torch.from_numpy(g.integers(3, c["vocab_size"], n))
        out["attention_mask"][i, :n] = 1
        out["labels"][i, :m] = torch.from_numpy(g.integers(3, c["vocab_size"], m))
    return out


def rewrite(folder, tied, copies):
    """config.json in the form of `transformers` 4; `copies`: names under which older files hold the table again."""
    c = json.loads((folder / "config.json").read_text())
    del c["scale_decoder_outputs"], c["tie_word_embeddings"], c["is_decoder"]
    if not tied:
        c["tie_word_embeddings"] = False
    c["torch_dtype"] = c.pop("dtype")
    c["transformers_version"] = "4.57.6"
    write_json(folder / "config.json", c)
    path = folder / "model.safetensors"
    tensors = tensors_of(path)
    tensors.update({k: tensors["shared.weight"] for k in copies})
    write_tensors(path, tensors)


def as_first(folder):
    """As the first T5 files: no mention of the feed-forward, and a table of positions that no layer reads."""
    rewrite(folder, True, ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
    c = json.loads((folder / "config.json").read_text())
    for key in ("feed_forward_proj", "dense_act_fn", "is_gated_act", "num_decoder_layers", "classifier_dropout",
                "relative_attention_max_distance"):
        del c[key]
    c["n_positions"] = 512
    write_json(folder / "config.json", c)
    path = folder / "model.safetensors"
    tensors = tensors_of(path)
    unread = torch.from_numpy(rng("unread", folder.name).standard_normal((c["relative_attention_num_buckets"], c["num_heads"])))
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = unread.float()
    write_tensors(path, tensors)


def as_flan(folder):
    rewrite(folder, False, ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])


def t5(settings, cls="T5ForConditionalGeneration", **family):
    return spec(cls, settings, draw=drawing(settings), batch=batch, rows=rows, **family)


TABLE = {
    "t5": t5(T5, length=23, target=21),
    "t5_hub": t5(dict(T5, d_model=24, num_heads=2, d_kv=12, num_layers=1), files=as_first),
    "t5_flan": t5(dict(GATED, d_kv=6, d_ff=40), untied=True, files=as_flan),
    "t5_untied": t5(dict(GATED, d_model=24, num_heads=3, d_ff=31, num_layers=1), untied=True),
    "t5_unscaled": t5(dict(T5, d_model=24, num_heads=3, tie_word_embeddings=False, feed_forward_proj="gated-silu", num_layers=1)),
    "t5_uneven": t5(dict(T5, num_decoder_layers=3, num_layers=1, d_kv=10, num_heads=3)),
    "t5_buckets": t5(dict(T5, d_model=24, num_heads=3, relative_attention_num_buckets=8,
                          relative_attention_max_distance=13), length=31, target=19),
    "t5_encoder": t5(T5, cls="T5EncoderModel", length=14),
}
