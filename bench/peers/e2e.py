"""A tiny T5 with random weights that learns to describe restaurants: what recipes/e2e.toml starts from, and its peer.

    python bench/peers/e2e.py make --tokenizer DIR --e2e DIR --out runs/e2e-base
    python bench/peers/e2e.py train --base runs/e2e-base [--epochs N]

`make` writes the model with the tokenizer of another one, and the data set as train.jsonl and test.jsonl (`prompt`,
`completion`). `train` trains every weight with `transformers` as the recipe does and prints one JSON line; its sentences are
scored by `sacrebleu` where that is installed.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration, get_cosine_schedule_with_warmup


def make(a):
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(a.tokenizer) / name, out / name)
    vocabulary = len(json.loads((out / "tokenizer.json").read_text())["model"]["vocab"])
    torch.manual_seed(a.seed)
    config = T5Config(vocab_size=vocabulary, d_model=96, d_kv=24, num_heads=4, d_ff=192, num_layers=2, num_decoder_layers=2,
                      feed_forward_proj="gated-gelu", dropout_rate=0.0, relative_attention_num_buckets=16,
                      relative_attention_max_distance=64, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
                      tie_word_embeddings=False)
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight.data *= config.d_model**-0.5  # logits of order one
    model.save_pretrained(out)
    for part, file in (("train", "valid.txt"), ("test", "test.txt")):
        rows = [line.strip().split("||") for line in (Path(a.e2e) / file).read_text().splitlines()]
        lines = [json.dumps({"prompt": meaning.strip(), "completion": text.strip()}) + "\n" for meaning, text in rows]
        (out / f"{part}.jsonl").write_text("".join(lines))
    print(f"{sum(p.numel() for p in model.parameters())} parameters in {out}")


def batches(rows, tokenizer, size):
    """Padded batches: input, mask, labels."""
    for i in range(0, len(rows), size):
        part = rows[i:i + size]
        source = tokenizer([r["prompt"] for r in part], padding=True, return_tensors="pt")
        target = [tokenizer(r["completion"])["input_ids"][:191] for r in part]
        target = [t[1:] if t[0] == tokenizer.bos_token_id else t for t in target]
        target = [t + [tokenizer.eos_token_id] for t in target]
        longest = max(map(len, target))
        labels = torch.tensor([t + [-100] * (longest - len(t)) for t in target])
        yield source["input_ids"], source["attention_mask"], labels


def train(a):
    base = Path(a.base)
    torch.manual_seed(a.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.unk_token
    read = lambda part: [json.loads(line) for line in (base / f"{part}.jsonl").read_text().splitlines()]
    rows, test = read("train"), read("test")
    model = T5ForConditionalGeneration.from_pretrained(base)

    def evaluate():
        total, count = 0.0, 0
        with torch.no_grad():
            for ids, mask, labels in batches(test, tokenizer, 64):
                n = int((labels != -100).sum())
                total += model(input_ids=ids, attention_mask=mask, labels=labels).loss.item() * n
                count += n
        return total / count

    before = evaluate()
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.learning_rate, weight_decay=0.0)
    total = a.epochs * -(-len(rows) // a.batch)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.03 * total), total)
    generator = torch.Generator().manual_seed(a.seed)
    start = time.perf_counter()
    for _ in range(a.epochs):
        order = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
        for ids, mask, labels in batches(order, tokenizer, a.batch):
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - start
    result = {"peer": "transformers", "seconds": round(seconds, 1), "loss_before": before, "loss_after": evaluate()}
    print(json.dumps(result | bleu(model, tokenizer, test)))


def bleu(model, tokenizer, test):
    """Greedy answers to each meaning, scored against all its texts."""
    try:
        import sacrebleu
    except ImportError:
        return {}
    meanings = {}
    for row in test:
        meanings.setdefault(row["prompt"], []).append(row["completion"])
    answers = []
    for meaning in meanings:
        ids = tokenizer(meaning, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=128, do_sample=False, eos_token_id=2, decoder_start_token_id=0, pad_token_id=0)
        answers.append(tokenizer.decode(out[0], skip_special_tokens=True))
    most = max(map(len, meanings.values()))
    references = [[texts[i] if i < len(texts) else None for texts in meanings.values()] for i in range(most)]
    return {"bleu": sacrebleu.corpus_bleu(answers, references).score}


def main():
    p = argparse.ArgumentParser()
    commands = p.add_subparsers(required=True)
    m = commands.add_parser("make")
    m.add_argument("--tokenizer", required=True)
    m.add_argument("--e2e", required=True)
    m.add_argument("--out", required=True)
    m.add_argument("--seed", type=int, default=0)
    m.set_defaults(run=make)
    t = commands.add_parser("train")
    t.add_argument("--base", required=True)
    t.add_argument("--epochs", type=int, default=6)
    t.add_argument("--batch", type=int, default=32)
    t.add_argument("--learning-rate", type=float, default=3e-3)
    t.add_argument("--seed", type=int, default=0)
    t.set_defaults(run=train)
    a = p.parse_args()
    a.run(a)


if __name__ == "__main__":
    main()
