"""Raw draws of PyTorch's generator for CPUs: the lower 27 bits of words, single-precision uniforms, normals and the beginnings of permutations."""

import numpy as np
import torch

from common import GOLDEN, write_json


def generator(seed):
    return torch.Generator(device="cpu").manual_seed(seed)


def case(seed, permutations, count=700):
    # `random_` takes one word modulo its bound where this is small, else two.
    words = torch.empty(count, dtype=torch.int64).random_(0, 2**27, generator=generator(seed))
    uniform = torch.empty(60).uniform_(-0.35, 0.35, generator=generator(seed))
    normals = [torch.normal(0.0, 0.7, size=(n,), generator=generator(seed)).tolist() for n in (5, 16, 40)]
    return {
        "seed": seed, "normals": normals, "low_bits": words.tolist(), "uniform_bits": uniform.numpy().view(np.uint32).tolist(),
        "permutations": [{"n": n, "first": torch.randperm(n, generator=generator(seed))[:count].tolist()} for n, count in permutations],
    }


def make():
    out = GOLDEN / "random"
    out.mkdir(exist_ok=True)
    cases = [case(0, [(1, 1), (2, 2), (9, 9)]), case(777, [(2304, 40), (768 * 768, 20)]), case(2**33 + 5, [(500, 500)]),
             case(-3, [(9, 9)], 30), case(2**64 - 7, [(9, 9)], 30)]
    write_json(out / "torch.json", {"torch": torch.__version__, "cases": cases})
