"""The peer of `engraft-bench step`: answers `{"steps": n}` with seconds, useful tokens and peak memory.

    python bench/peers/step.py '{"model": DIR, "examples": FILE, "batch": 4, "dtype": "bf16", …}'

Batches are taken in the order of the file and padded to their longest row, as `peft` users do it.
"""

import json
import os
import resource
import sys
import time

START = time.perf_counter()
settings = json.loads(sys.argv[1])
os.environ["OMP_NUM_THREADS"] = str(settings["threads"])

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

torch.set_num_threads(settings["threads"])


def load():
    dtype = torch.float32 if settings["dtype"] == "f32" else torch.bfloat16
    common = dict(dtype=dtype, local_files_only=True)
    if settings["classifies"]:
        labels = 1 + max(e["label"] for e in examples)
        # Dropout of the base is off on both sides, so that the comparison is of the same computation.
        model = AutoModelForSequenceClassification.from_pretrained(
            settings["model"], num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common)
    else:
        model = AutoModelForCausalLM.from_pretrained(settings["model"], **common)
        model.config.use_cache = False
    if settings["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    task = "SEQ_CLS" if settings["classifies"] else "CAUSAL_LM"
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type=task))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float() if settings["dtype"] == "f32" else p.data
    return model.to(settings["device"]).train()


def wait():
    if settings["device"] != "cpu":
        torch.cuda.synchronize()


def batches():
    size = settings["batch"]
    while True:
        for at in range(0, len(examples) - size + 1, size):
            rows = examples[at:at + size]
            longest = max(len(r["ids"]) for r in rows)
            pad = lambda values, filler: values + [filler] * (longest - len(values))
            batch = {"input_ids": torch.tensor([pad(r["ids"], 0) for r in rows]),
                     "attention_mask": torch.tensor([pad([1] * len(r["ids"]), 0) for r in rows])}
            if settings["classifies"]:
                batch["labels"] = torch.tensor([r["label"] for r in rows])
            else:
                batch["labels"] = torch.tensor([pad(r["labels"], -100) for r in rows])
            yield {name: t.to(settings["device"]) for name, t in batch.items()}, sum(len(r["ids"]) for r in rows)


with open(settings["examples"]) as f:
    examples = json.load(f)
model = load()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
forward = torch.compile(model) if settings["compile"] else model
feed = batches()
print(json.dumps({"seconds": time.perf_counter() - START, "torch": torch.__version__}), flush=True)
for line in sys.stdin:
    wait()
    tokens, start = 0, time.perf_counter()
    for _ in range(json.loads(line)["steps"]):
        batch, useful = next(feed)
        loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += useful
    wait()
    seconds = time.perf_counter() - start
    if settings["device"] == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_bytes": peak, "loss": float(loss.detach())}), flush=True)
