"""Draws of NumPy's default generator (PCG64) as UniLoRA's indices need them."""

import numpy as np

from common import GOLDEN, write_json


def make():
    raw = [{"seed": seed, "words": [str(w) for w in np.random.default_rng(seed).bit_generator.random_raw(5)]} for seed in (0, 42, 2**40 + 3)]
    choices = [{"seed": seed, "n": n, "count": k, "chosen": np.random.default_rng(seed).choice(n, size=k, replace=False).tolist()}
               for seed, n, k in [(42, 20, 7), (1, 300, 300), (5, 12000, 30), (7, 10001, 201)]]
    shuffles = []
    for seed, n in [(42, 10), (3, 257)]:
        data = np.arange(n)
        np.random.default_rng(seed).shuffle(data)
        shuffles.append({"seed": seed, "n": n, "order": data.tolist()})
    write_json(GOLDEN / "random" / "numpy.json", {"numpy": np.__version__, "raw": raw, "choices": choices, "shuffles": shuffles})
