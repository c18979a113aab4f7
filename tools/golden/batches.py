"""Training batches of the trajectories."""

import torch

import zoo
from common import rng


def batches(name, model, kind, rows):
    """Rows of tokens: `full`; `padded` on the right; `uneven`, where also a varying share of the labels is -100.

    T5 and images have one kind of their own.
    """
    s = zoo.MODELS_TABLE[model]
    if "rows" in s:
        return s["rows"](name, s, rows)
    settings, cls, length = s["settings"], s["cls"], 12
    g = rng("batches", name)
    ids = torch.from_numpy(g.integers(3, settings["vocab_size"], (rows, length)))
    mask = torch.ones_like(ids)
    if kind != "full":
        for i, n in enumerate(g.integers(4, length + 1, rows)):
            mask[i, n:] = 0
    ids = ids.masked_fill(mask == 0, settings["pad_token_id"])
    out = {"input_ids": ids} if kind == "full" else {"input_ids": ids, "attention_mask": mask}
    if "Sequence" in cls:
        out["labels"] = torch.from_numpy(g.integers(0, settings["num_labels"], rows))
        return out
    if zoo.is_causal(model):
        labels = ids.clone()
    else:
        labels = torch.from_numpy(g.integers(0, settings.get("num_labels", settings["vocab_size"]), (rows, length)))
    if kind == "uneven":
        share = torch.from_numpy(g.uniform(0.1, 0.9, (rows, 1)))
        drop = torch.from_numpy(g.random((rows, length))) < share
        drop[:, 3] = False  # a label in every row
        labels = labels.masked_fill(drop, -100)
    out["labels"] = labels.masked_fill(mask == 0, -100)
    return out
