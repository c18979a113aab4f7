"""Greedy continuations of two prompts by the causal models, past the sliding window where there is one."""

import torch

import generation_t5
import zoo
from common import GOLDEN, fresh, rng, write_json

STEPS = 20
MODELS = ["llama", "llama_tied", "llama_rope_yarn", "mistral", "qwen2", "qwen2_sliding", "qwen3", "gpt2", "gpt2_untied",
          "gpt2_inverse_layer", "gpt2_gelu"]


def gap(model, ids, start):
    """Smallest lead of the best over the second logit along the way: where it is large, rounding cannot decide."""
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, start - 1:-1].topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


def continuation(model, prompt):
    """The argmax of a full forward pass, token by token: no cache, so nothing but the definition."""
    ids = list(prompt)
    for _ in range(STEPS):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def make():
    fresh(GOLDEN / "generation")
    for name in MODELS:
        model = zoo.load(name)
        vocab = model.config.vocab_size
        rows, trial = [], 0
        while len(rows) < 2:
            length = (7, 3)[len(rows)]
            prompt = [int(v) for v in rng("generation", name, trial).integers(3, vocab, length)]
            trial += 1
            ids = continuation(model, prompt)
            if gap(model, ids, length) < 1e-3 or len(set(ids[length:])) < 4:
                continue
            cached = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, length, dtype=torch.long),
                                    max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0)
            assert cached[0].tolist() == ids, name
            rows.append({"prompt": prompt, "new_tokens": ids[length:], "smallest_lead": gap(model, ids, length)})
        write_json(GOLDEN / "generation" / f"{name}.json", {"model": name, "max_new_tokens": STEPS, "stop_at_eos": False, "rows": rows})
        print(name, [len(set(r["new_tokens"])) for r in rows], [round(r["smallest_lead"], 4) for r in rows], flush=True)
    generation_t5.make()
