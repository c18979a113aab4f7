"""The places that `torch.topk` finds on a CPU among values of which many are equal.

The values come from a congruential generator. With `levels` 0 they are McIlroy's adversary of a quicksort with a median of three
("A killer adversary for quicksort", 1999), so that the heap takes over which such sorts fall back to.
"""

import torch

from common import GOLDEN, write_json


def drawn(n, levels, seed):
    values, x = [], seed
    for _ in range(n):
        x = (x * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append(float((x >> 33) % levels))
    return values


def killer(n):
    """Values given to places as they are compared while they are parted about the median of the second, middle and last."""
    gas, values, state = n, [n] * n, {"solid": 0, "candidate": 0}

    def before(a, b):
        if values[a] == gas and values[b] == gas:
            values[a if a == state["candidate"] else b] = state["solid"]
            state["solid"] += 1
        if values[a] == gas:
            state["candidate"] = a
        elif values[b] == gas:
            state["candidate"] = b
        return values[a] < values[b]

    places = list(range(n))

    def part(first, last):
        a, b, c = first + 1, first + (last - first) // 2, last - 1
        ab, bc, ac = (before(places[i], places[j]) for i, j in ((a, b), (b, c), (a, c)))
        m = (b if bc else c if ac else a) if ab else (a if ac else c if bc else b)
        places[first], places[m] = places[m], places[first]
        pivot, i, j = places[first], first + 1, last
        while True:
            while before(places[i], pivot):
                i += 1
            j -= 1
            while before(pivot, places[j]):
                j -= 1
            if i >= j:
                return i
            places[i], places[j] = places[j], places[i]
            i += 1

    stack = [(0, n)]
    while stack:
        first, last = stack.pop()
        if last - first > 16:
            cut = part(first, last)
            # The latter part is sorted first.
            stack += [(first, cut), (cut, last)]
    return [float(v) for v in values]


def case(n, levels, k, largest, seed=0):
    values = torch.tensor(drawn(n, levels, seed) if levels else killer(n))
    digest = 0
    for place in torch.topk(values, k, largest=largest).indices.tolist():
        digest = (digest * 31 + place) % 2**32
    return {"n": n, "levels": levels, "k": k, "largest": largest, "seed": seed, "digest": digest}


def make():
    cases = []
    for seed, n in enumerate((1, 2, 3, 4, 5, 16, 17, 18, 63, 64, 65, 128, 200, 1000, 4097)):
        for levels in (1, 2, 7, 100):
            for k in sorted({1, 2, n // 65, n // 64, n // 3, n - 1, n} & set(range(1, n + 1))):
                cases.append(case(n, levels, k, (seed + levels + k) % 2 == 0, seed))
    cases += [case(n, 0, k, largest) for n in (100, 1500) for k in (n // 64, n // 2, n) for largest in (True, False)]
    write_json(GOLDEN / "random" / "topk.json", {"torch": torch.__version__, "cases": cases})
