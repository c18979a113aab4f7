"""The peer of recipes/shakespeare.toml: LoRA on a small Llama for plain text with `peft`, same settings, one JSON line.

    python bench/peers/shakespeare.py --model DIR --train train.txt --test test.txt [--steps N]

The texts are cut into blocks of `--length` tokens without overlap; the loss is the mean over predicted tokens.
"""

import argparse
import json
import resource
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--model", required=True)
    p.add_argument("--train", required=True)
    p.add_argument("--test", required=True)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--steps", type=int, default=0)
    p.add_argument("--learning-rate", type=float, default=5e-3)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    tokenizer = AutoTokenizer.from_pretrained(a.model)

    def blocks(path):
        with open(path, encoding="utf-8") as f:
            ids = torch.tensor(tokenizer(f.read())["input_ids"])
        return ids[: len(ids) // a.length * a.length].view(-1, a.length)

    train, test = blocks(a.train), blocks(a.test)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

    def evaluate():
        model.eval()
        with torch.no_grad():
            losses = [model(input_ids=x, labels=x).loss.item() * len(x) for x in test.split(a.batch)]
        model.train()
        return sum(losses) / len(test)

    before = evaluate()
    optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=a.learning_rate, weight_decay=0.0)
    per_epoch = (len(train) + a.batch - 1) // a.batch
    total = a.steps or a.epochs * per_epoch
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.03 * total), total)
    generator = torch.Generator().manual_seed(a.seed)
    step, tokens, seconds = 0, 0, 0.0
    while step < total:
        for rows in torch.randperm(len(train), generator=generator).split(a.batch):
            start = time.perf_counter()
            x = train[rows]
            model(input_ids=x, labels=x).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seconds += time.perf_counter() - start
            tokens += x.numel()
            step += 1
            if step == total:
                break
    result = {"peer": "peft", "dtype": "f32", "steps": step, "seconds": round(seconds, 2)}
    result["tokens_per_second"] = round(tokens / seconds, 1)
    result |= {"loss_before": before, "loss_after": evaluate()}
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
