"""Greedy and beam search of T5 up to an end token, by `generate` of `transformers`.

Random models end rarely, so the end is a token that the greedy search meets midway. Prompts are tried until the
settings of the search matter, and kept where small noise in every weight leaves all sequences as they are. (The tied
models have tables so large that they only repeat their last token.)
"""

import copy
import warnings

import torch

import zoo
from common import GOLDEN, rng, write_json

STEPS = 12
MODELS = ["t5_flan", "t5_untied"]
SEARCHES = [dict(num_beams=1)] + [dict(num_beams=n, length_penalty=p, early_stopping=e)
                                  for n, p, e in [(3, 1.0, False), (3, 0.6, False), (3, 0.6, True), (4, 1.0, True), (4, 2.0, False),
                                                  (4, 1.0, "never")]]


def trimmed(ids, end):
    """New tokens up to the end token, without the start."""
    ids = ids.tolist()[1:]
    return ids[:ids.index(end) + 1] if end in ids else ids


def search(model, prompt, end, settings):
    """All sequences of one search, best first, and their scores."""
    beams = settings["num_beams"]
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                         max_new_tokens=STEPS, num_return_sequences=beams, eos_token_id=end, return_dict_in_generate=True,
                         output_scores=True, **settings)
    return [trimmed(row, end) for row in out.sequences], out.sequences_scores.tolist() if beams > 1 else None


def disturbed(model, seed):
    """A copy with noise of 2e-5 in every weight."""
    model = copy.deepcopy(model)
    for key, p in model.named_parameters():
        p.data = p.data * (1.0 + 2e-5 * torch.from_numpy(rng("noise", seed, key).standard_normal(tuple(p.shape))).float())
    return model


def end_of(model, prompt):
    """A token that the greedy search first meets at its fifth step or later; None where it repeats itself."""
    ids = search(model, prompt, model.config.vocab_size, SEARCHES[0])[0][0]
    return next((t for i, t in enumerate(ids) if i >= 4 and ids.index(t) == i), None)


def rows_of(model, prompt, others):
    """One row a search; none where the settings do not matter, or noise does."""
    end = end_of(model, prompt)
    if end is None:
        return []
    results = [search(model, prompt, end, settings) for settings in SEARCHES]
    if len({tuple(found[0]) for found, _ in results}) < 3:
        return []
    rows = []
    for settings, (found, scores) in zip(SEARCHES, results):
        if any(search(other, prompt, end, settings)[0] != found for other in others):
            return []
        row = {"prompt": prompt, "eos_token_id": end, "new_tokens": found[0], **settings}
        rows.append({**row, "beams": [{"new_tokens": f, "score": s} for f, s in zip(found, scores)]} if scores else row)
    return rows


def make():
    warnings.simplefilter("ignore")
    for name in MODELS:
        model = zoo.load(name)
        others = [disturbed(model, seed) for seed in range(2)]
        rows, trial = [], 0
        while len(rows) < 2 * len(SEARCHES):
            prompt = [int(v) for v in rng("generation", name, trial).integers(3, model.config.vocab_size, 6 + trial % 5)]
            trial += 1
            rows += rows_of(model, prompt, others)
        write_json(GOLDEN / "generation" / f"{name}.json", {"model": name, "max_new_tokens": STEPS, "stop_at_eos": True, "rows": rows})
        print(name, trial, [len(r["new_tokens"]) for r in rows], flush=True)
