"""The peer of recipes/banking77.toml: LoRA on MiniLM for BANKING77 with `peft`, same settings, one JSON line a seed.

    python bench/peers/banking77.py --model DIR --train train.csv --test test.csv [--seeds 0 1 2] [--steps N]

Rows are padded to the longest of their batch, as `peft` users do it. `useful_tokens_per_second` counts real tokens of
training only. With `--steps` training stops early and only the speed is of interest.
"""

import argparse
import csv
import json
import resource
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup


def read(path):
    with open(path, encoding="utf-8", newline="") as f:
        return [(row["text"], row["category"]) for row in csv.DictReader(f)]


def batches(rows, size, generator=None):
    order = torch.randperm(len(rows), generator=generator).tolist() if generator else range(len(rows))
    order = list(order)
    return [[rows[i] for i in order[at : at + size]] for at in range(0, len(order), size)]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--model", required=True)
    p.add_argument("--train", required=True)
    p.add_argument("--test", required=True)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--steps", type=int, default=0)
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    a = p.parse_args()
    train, test = read(a.train), read(a.test)
    labels = sorted({label for _, label in train})
    number = {label: i for i, label in enumerate(labels)}
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32

    def encode(batch):
        x = tokenizer([t for t, _ in batch], padding=True, truncation=True, max_length=64, return_tensors="pt")
        return x, torch.tensor([number[label] for _, label in batch])

    for seed in a.seeds:
        torch.manual_seed(seed)
        # Dropout of the base is off on both sides, so that the comparison is of the same computation.
        model = AutoModelForSequenceClassification.from_pretrained(
            a.model, num_labels=len(labels), dtype=dtype, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="SEQ_CLS")
        model = get_peft_model(model, config)
        optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=a.learning_rate, weight_decay=0.0)
        total = a.steps or a.epochs * ((len(train) + 31) // 32)
        schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * total), total)
        generator = torch.Generator().manual_seed(seed)
        model.train()
        step, tokens, seconds = 0, 0, 0.0
        while step < total:
            for batch in batches(train, 32, generator):
                start = time.perf_counter()
                x, y = encode(batch)
                loss = torch.nn.functional.cross_entropy(model(**x).logits.float(), y)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                seconds += time.perf_counter() - start
                tokens += int(x["attention_mask"].sum())
                step += 1
                if step == total:
                    break
        result = {"peer": "peft", "dtype": a.dtype, "seed": seed, "steps": step, "seconds": round(seconds, 2)}
        result["useful_tokens_per_second"] = round(tokens / seconds, 1)
        if not a.steps:
            model.eval()
            hits = 0
            with torch.no_grad():
                for batch in batches(test, 64):
                    x, y = encode(batch)
                    hits += int((model(**x).logits.argmax(-1) == y).sum())
            result["accuracy"] = hits / len(test)
        result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
