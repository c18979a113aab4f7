"""The peer of `engraft-bench generation`: answers `{"tokens": n}` with the seconds that n steps of a cached decoder took.

    python bench/peers/generation.py '{"model": DIR, "sequences": 1, "dtype": "bf16", "read": 64, "written": 128, "threads": 2}'

Each step is one call of the model with its cache and takes the most probable token, as `generate` does inside.
"""

import json
import os
import sys
import time

settings = json.loads(sys.argv[1])
os.environ["OMP_NUM_THREADS"] = str(settings["threads"])

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
torch.set_num_threads(settings["threads"])
dtype = torch.float32 if settings["dtype"] == "f32" else torch.bfloat16
model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype, local_files_only=True).eval()
words = model.config.vocab_size - 5


@torch.no_grad()
def begin():
    count = settings["sequences"] * settings["read"]
    ids = torch.tensor([5 + 37 * i % words for i in range(count)]).reshape(settings["sequences"], -1)
    out = model(ids, use_cache=True)
    return out.past_key_values, out.logits[:, -1:].argmax(-1)


@torch.no_grad()
def step(cache, ids):
    out = model(ids, past_key_values=cache, use_cache=True)
    return out.past_key_values, out.logits[:, -1:].argmax(-1)


print(json.dumps({"ready": True}), flush=True)
state, written = begin(), 0
for line in sys.stdin:
    tokens = json.loads(line)["tokens"]
    if written + tokens > settings["written"]:
        state, written = begin(), 0
    started = time.perf_counter()
    for _ in range(tokens):
        state = step(*state)
    written += tokens
    print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
