"""SHiRA and trainable tokens of `peft`: cases and trajectories, made as those of the other methods are."""

import peft

import cases
import trajectories
from common import TRAJECTORIES, fresh
from rows import case

cases.CONFIGS.update(shira=peft.ShiraConfig, trainable_tokens=peft.TrainableTokensConfig)


def shira(model, variant, checks, merge=True, side="", **config):
    return case(model, "shira", variant, checks, merge, side, **{"r": 2, **config})


def tokens(model, variant, checks, merge=True, side="", **config):
    return case(model, "trainable_tokens", variant, checks, merge, side, **{"token_indices": [5, 3, 11, 20], **config})


TABLE = [
    shira("llama", None, "default targets, the default generator's mask"),
    shira("llama", "left", "padding on the left, a seed", side="_left", random_seed=7),
    shira("llama", "linears", "every linear of the blocks, one entry a row and column", r=1, target_modules=cases.LINEARS),
    shira("llama_bias", None, "linears with biases", target_modules=["q_proj", "down_proj"], random_seed=1),
    shira("qwen2", None, "biases and a tied head", random_seed=2),
    shira("qwen3", None, "norms on queries and keys", target_modules=["q_proj", "up_proj"]),
    shira("bert", None, "default targets, trained classifier"),
    shira("roberta", None, "a classifier of two layers trained (peft cannot merge beside it)", merge=False, random_seed=3),
    shira("t5", None, "encoder, decoder and cross-attention"),
    shira("vit", None, "attention and MLP of a vision model", target_modules=["q_proj", "fc2"], modules_to_save=["classifier"]),
    tokens("llama", None, "rows of the table, in the order given"),
    tokens("llama", "head", "rows of an untied head", target_modules=["lm_head"]),
    tokens("llama_tied", None, "a tied head follows the table"),
    tokens("qwen2", None, "a tied head follows the table", side="_left"),
    tokens("gpt2", None, "a tied head follows the table"),
    tokens("bert", None, "a classifier", token_indices=list(range(3, 40))),
    tokens("roberta", None, "a classifier of two layers", token_indices=list(range(3, 40))),
    tokens("t5", None, "one table for encoder, decoder and head"),
]

TRAINED = {
    "llama__shira": ("llama", "full", dict(learning_rate=5e-3), "shira", dict(r=2)),
    "bert__shira": ("bert", "padded", dict(learning_rate=5e-3, weight_decay=0.1), "shira",
                    dict(r=1, target_modules=["query", "intermediate.dense"], random_seed=5)),
    "llama_tied__trainable_tokens": ("llama_tied", "full", dict(learning_rate=5e-3), "trainable_tokens",
                                     dict(token_indices=list(range(3, 40)))),
}


def make():
    for c in TABLE:
        cases.write_case(c)
    trajectories.TABLE.update(TRAINED)
    for name in TRAINED:
        if not any(trajectories.attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
