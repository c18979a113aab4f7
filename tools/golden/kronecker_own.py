"""Methods on weights that `peft` does not have, as PyTorch transcriptions of their papers' formulas: DVoRA, KronA, KAdaptation,
PHM (Compacter's layers as a change of weights), NOLA and Intrinsic SAID.

The changed weight is formed as the formula says, with explicit Kronecker products and an explicit Hadamard matrix. Random
matrices that a file holds only the seed of are drawn by Philox 4x32-10 (NumPy integers here) as the method's page says.
Trained tensors are saved as `base_model.model.<name>`; `peft_type` is `ENGRAFT_<METHOD>`.
"""

import copy

import numpy as np
import torch
import transformers
from torch import nn

import cases
import zoo
from batches import batches
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of,
                    write_json, write_logits, write_tensors)
from training import DEFAULTS, trajectory, well_posed

PREFIX = "base_model.model."
QV = ["q_proj", "v_proj"]


# Random numbers

def philox(block, seed, stream):
    """The four words of the blocks with these numbers: [n, 4]."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.asarray(block, np.uint64) & mask, np.asarray(block, np.uint64) >> np.uint64(32),
         np.full(len(block), stream & 0xFFFFFFFF, np.uint64), np.full(len(block), stream >> 32, np.uint64)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        x, y = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [y >> np.uint64(32) ^ c[1] ^ np.uint64(k[0]), y & mask, x >> np.uint64(32) ^ c[3] ^ np.uint64(k[1]), x & mask]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, 1)


def stream(name):
    """FNV-1a."""
    h = 0xCBF29CE484222325
    for b in name.encode():
        h = (h ^ b) * 0x100000001B3 % 2**64
    return h


def words(seed, name, count):
    return philox(np.arange((count + 3) // 4), seed, stream(name)).reshape(-1)[:count]


def uniform(seed, name, shape, bound):
    """Uniform in ±bound, from the upper 24 bits of a word."""
    unit = (words(seed, name, int(np.prod(shape))) >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
    return torch.from_numpy(((np.float32(2) * unit - np.float32(1)) * np.float32(bound)).reshape(shape))


def normal(seed, name, count):
    """Box and Muller's two numbers from two words each."""
    w = words(seed, name, count + count % 2).astype(np.float64).reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log((w[:, 0] + 0.5) / 2**32)), 2 * np.pi * w[:, 1] / 2**32
    return torch.from_numpy(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:count].astype(np.float32))


def kaiming(fan_in):
    return 1 / fan_in**0.5


# Methods: `names` are the shapes of what is trained for a weight [out, in] (and what all targets share), `change` gives W'.

class Dvora:
    """Liu et al. 2024, section 5.2: W' = m V / |V|, V = W + diag(b) B diag(d) A, the norm held constant."""

    def __init__(self, r, seed):
        self.r, self.seed = r, seed
        self.config = {"r": r, "projection_prng_key": seed, "d_initial": 0.1, "dropout": 0.0}

    def prepare(self, shapes):
        out, inn = max(s[0] for s in shapes), max(s[1] for s in shapes)
        g = torch.Generator().manual_seed(self.seed)
        self.a = torch.empty(self.r, inn).uniform_(-(6 / inn) ** 0.5, (6 / inn) ** 0.5, generator=g)
        self.b = torch.empty(out, self.r).uniform_(-(6 / self.r) ** 0.5, (6 / self.r) ** 0.5, generator=g)
        return {}

    def names(self, out, inn):
        return {"vera_lambda_b": (out,), "vera_lambda_d": (self.r,), "lora_magnitude_vector": (out,)}

    def change(self, w, p, shared, path):
        a, b = self.a[:, :w.shape[1]].to(w), self.b[:w.shape[0]].to(w)
        v = w + (p["vera_lambda_b"][:, None] * b) @ (p["vera_lambda_d"][:, None] * a)
        return (p["lora_magnitude_vector"] / v.norm(dim=1).detach())[:, None] * v


class Krona:
    """Edalati et al. 2022: W' = W + s kron(A, B)."""

    def __init__(self, a1, a2, scale):
        self.a, self.scale = (a1, a2), scale
        self.config = {"a1": a1, "a2": a2, "scale": scale, "dropout": 0.0}

    def prepare(self, shapes):
        return {}

    def names(self, out, inn):
        root = lambda n: max(d for d in range(1, n + 1) if d * d <= n and n % d == 0)
        a1, a2 = self.a[0] or root(out), self.a[1] or root(inn)
        return {"krona_A": (a1, a2), "krona_B": (out // a1, inn // a2)}

    def change(self, w, p, shared, path):
        return w + self.scale * torch.kron(p["krona_A"], p["krona_B"])


class Kadaptation:
    """He et al. 2023: W' = W + s sum_i kron(l_i r_i, u_i v_i), l and r shared."""

    def __init__(self, n, rank, scale):
        self.n, self.rank, self.scale = n, rank, scale
        self.config = {"n": n, "rank": rank, "scale": scale, "dropout": 0.0}

    def prepare(self, shapes):
        return {"kadaptation_left": (self.n, self.n, self.rank), "kadaptation_right": (self.n, self.rank, self.n)}

    def names(self, out, inn):
        return {"kadaptation_u": (self.n, out // self.n, self.rank), "kadaptation_v": (self.n, self.rank, inn // self.n)}

    def change(self, w, p, shared, path):
        terms = [torch.kron(shared["kadaptation_left"][i] @ shared["kadaptation_right"][i], p["kadaptation_u"][i] @ p["kadaptation_v"][i])
                 for i in range(self.n)]
        return w + self.scale * sum(terms)


class Phm:
    """Karimi Mahabadi et al. 2021: W' = W + s sum_i kron(A_i, u_i v_i), A shared."""

    def __init__(self, n, rank, scale):
        self.n, self.rank, self.scale = n, rank, scale
        self.config = {"n": n, "rank": rank, "scale": scale, "dropout": 0.0}

    def prepare(self, shapes):
        return {"phm_rule": (self.n, self.n, self.n)}

    def names(self, out, inn):
        return {"phm_u": (self.n, out // self.n, self.rank), "phm_v": (self.n, self.rank, inn // self.n)}

    def change(self, w, p, shared, path):
        return w + self.scale * sum(torch.kron(shared["phm_rule"][i], p["phm_u"][i] @ p["phm_v"][i]) for i in range(self.n))


class Nola:
    """Koohpayegani et al. 2024: W' = W + alpha / r (sum_j beta_j B_j) (A_0 + sum_i alpha_i A_i)."""

    def __init__(self, rank, alpha, k, seed):
        self.rank, self.alpha, self.k, self.seed = rank, alpha, k, seed
        self.config = {"rank": rank, "alpha": alpha, "num_basis": k, "basis_seed": seed, "dropout": 0.0}

    def prepare(self, shapes):
        return {}

    def names(self, out, inn):
        return {"nola_alpha": (self.k,), "nola_beta": (self.k,)}

    def change(self, w, p, shared, path):
        (out, inn), r, k = w.shape, self.rank, self.k
        a = uniform(self.seed, f"nola.A.{r}x{inn}", (k, r, inn), k**-0.5).to(w)
        b = uniform(self.seed, f"nola.B.{out}x{r}", (k, out, r), k**-0.5).to(w)
        a0 = uniform(self.seed, f"nola.A0.{r}x{inn}", (r, inn), kaiming(inn)).to(w)
        down = a0 + torch.einsum("k,kri->ri", p["nola_alpha"], a)
        return w + self.alpha / r * torch.einsum("k,kor->or", p["nola_beta"], b) @ down


class Said:
    """Aghajanyan et al. 2021: W' = W + lambda P(z), P(z) the first numbers of H G Perm H S z / sqrt(D sum g^2)."""

    def __init__(self, d, seed):
        self.d, self.seed = d, seed
        self.config = {"dimension": d, "projection_seed": seed}

    def prepare(self, shapes):
        return {"said_z": (self.d,)}

    def names(self, out, inn):
        return {"said_lambda": (1,)}

    def change(self, w, p, shared, path):
        count = w.numel()
        length = 1 << (count - 1).bit_length()
        signs = 2.0 * torch.from_numpy((words(self.seed, f"said.S.{path}", length) & np.uint64(1)).astype(np.float32)) - 1
        order, steps = list(range(length)), words(self.seed, f"said.P.{path}", length)
        for i in range(length):
            j = i + int(steps[i]) % (length - i)
            order[i], order[j] = order[j], order[i]
        g = normal(self.seed, f"said.G.{path}", length)
        x = torch.cat([shared["said_z"], shared["said_z"].new_zeros(length - self.d)])
        x = walsh(walsh(x * signs.to(w))[order] * g.to(w)) / (count * (g.double() ** 2).sum()).sqrt().to(w)
        return w + p["said_lambda"] * x[:count].reshape(w.shape)


def walsh(x):
    """H x with H the Kronecker power of [[1, 1], [1, -1]]."""
    bits = len(x).bit_length() - 1
    h = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).to(x)
    x = x.reshape([2] * bits)
    for axis in range(bits):
        x = torch.tensordot(h, x, dims=([1], [axis])).movedim(0, axis)
    return x.reshape(-1)


METHODS = {"dvora": Dvora, "krona": Krona, "kadaptation": Kadaptation, "phm": Phm, "nola": Nola, "said": Said}
# model, method, variant, its settings, targets, what it checks
TABLE = [
    ("llama", "dvora", None, (6, 3), QV, "magnitudes over two shared random matrices"),
    ("bert", "dvora", None, (5, 0), ["query", "output.dense"], "biases stay outside of the magnitudes"),
    ("llama", "krona", None, (None, None, 1.5), QV, "divisors closest to each other"),
    ("qwen2", "krona", "sizes", (8, 2, 1.0), ["q_proj", "k_proj", "up_proj"], "given sizes"),
    ("llama", "kadaptation", None, (4, 1, 8.0), QV, "shared factors of rank one"),
    ("bert", "kadaptation", "rank", (2, 2, 3.0), ["query", "value", "intermediate.dense"], "of rank two"),
    ("llama", "phm", None, (4, 1, 2.0), QV, "a shared rule"),
    ("vit", "phm", "rank", (2, 3, 1.0), ["q_proj", "fc1"], "right factors of rank three"),
    ("llama", "nola", None, (3, 6.0, 40, 5), QV, "random matrices by their sizes and a seed"),
    ("roberta", "nola", None, (2, 4.0, 25, 0), ["query", "key"], "targets of equal sizes"),
    ("llama", "said", None, (60, 4), QV, "one vector for all targets"),
    ("t5", "said", None, (50, 0), ["q", "wi"], "both sides"),
]
WIDTHS = {"vera_lambda_b": 0.5, "vera_lambda_d": 0.5, "krona_A": 0.3, "krona_B": 0.3, "kadaptation_left": 0.5, "kadaptation_right": 0.5,
          "kadaptation_u": 0.5, "kadaptation_v": 0.5, "phm_rule": 0.4, "phm_u": 0.4, "phm_v": 0.4, "nola_alpha": 0.6, "nola_beta": 0.6,
          "said_z": 30.0}


class Adapted(nn.Module):
    """A linear layer whose weight is made anew in every pass."""

    def __init__(self, linear, method, shared, path):
        super().__init__()
        # In a list, `shared` is no submodule of this layer; a copy of the whole model copies it once.
        self.linear, self.method, self.shared, self.path = linear, method, [shared], path
        self.own = nn.ParameterDict({k: nn.Parameter(torch.zeros(s)) for k, s in method.names(*linear.weight.shape).items()})

    def weight(self):
        return self.method.change(self.linear.weight, self.own, self.shared[0], self.path)

    def forward(self, x):
        return nn.functional.linear(x, self.weight(), self.linear.bias)


def adapted(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def trained(model):
    """Trained tensors by their names in the file."""
    out = {PREFIX + k: p for k, p in model.adapter_shared.items()}
    for path, m in adapted(model).items():
        out.update({f"{PREFIX}{path}.{k}": p for k, p in m.own.items()})
    return out


def attach(base, method, settings, targets, case):
    """The model with the adapter of `case`, filled at random."""
    model = zoo.load(base)
    for p in model.parameters():
        p.requires_grad = False
    method = METHODS[method](*settings)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(n.endswith("." + t) for t in targets)]
    shared = method.prepare([m.weight.shape for _, m in found])
    model.adapter_shared = nn.ParameterDict({k: nn.Parameter(torch.zeros(s)) for k, s in shared.items()})
    for path, m in found:
        model.set_submodule(path, Adapted(m, method, model.adapter_shared, path))
    for key, p in trained(model).items():
        end = key.rpartition(".")[2]
        value = torch.from_numpy(rng("adapter", case, key).uniform(-1, 1, tuple(p.shape))).float()
        if end in WIDTHS:
            p.data = value * WIDTHS[end]
        elif end == "said_lambda":
            p.data = 1 + 0.3 * value
        else:  # magnitudes
            w = model.get_submodule(key.removeprefix(PREFIX).rpartition(".")[0]).linear.weight
            p.data = w.norm(dim=1).detach() * (1 + 0.4 * value)
    return model.eval(), method


def save(model, path, base, name, method, targets):
    path.mkdir(parents=True)
    write_tensors(path / "adapter_model.safetensors", trained(model))
    write_json(path / "adapter_config.json", {
        "peft_type": f"ENGRAFT_{name.upper()}", "task_type": cases.task_of(base), "target_modules": sorted(targets), "exclude_modules": None,
        "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None, "base_model_name_or_path": f"models/{base}",
        "inference_mode": True, **method.config})


def merged(model):
    plain = copy.deepcopy(model)
    for path, m in adapted(plain).items():
        m.linear.weight.data = m.weight().detach()
        plain.set_submodule(path, m.linear)
    return plain


def write_case(base, name, variant, settings, targets, checks):
    case = f"{base}__{name}" + (f"_{variant}" if variant else "")
    out = fresh(CASES / case)
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    before = tensors_of(INPUTS / base / "base_logits.safetensors")["logits"]
    model, method = attach(base, name, settings, targets, case)
    logits, rel = forward_both(model, inputs)
    keep = logits_mask(logits, inputs).bool()
    save(model, out / "adapter", base, name, method, targets)
    whole = forward(merged(model), inputs)
    whole[~keep] = 0.0
    meta = {"case": case, "model": base, "method": name, "variant": variant, "checks": checks, "task_type": cases.task_of(base),
            "merge": True, "tolerance": TOLERANCE, "merge_tolerance": TOLERANCE, "num_virtual_tokens": 0, "inputs": None,
            "effect_rel": relative(logits, before), "transcription": "tools/golden/kronecker_own.py",
            "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "merge_rel": relative(whole[keep], logits[keep])}}
    assert rel < 1e-5 and meta["self_check"]["merge_rel"] < 1e-5 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_logits(out / "merged_logits.safetensors", whole, inputs)
    write_json(out / "case.json", meta)
    print(f"{case}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


RUNS = {
    "llama__dvora": ("llama", "full", dict(learning_rate=1e-2), (6, 3), QV),
    "qwen2__krona": ("qwen2", "padded", {}, (None, None, 1.0), QV),
    "bert__kadaptation": ("bert", "padded", {}, (4, 1, 4.0), ["query", "value"]),
    "llama__phm": ("llama", "full", {}, (4, 1, 2.0), QV),
    "llama__nola": ("llama", "full", dict(learning_rate=1e-2), (3, 6.0, 40, 5), QV),
    "llama__said": ("llama", "full", dict(learning_rate=1e-1), (60, 4), QV),
}


def attempt(name, out, salt):
    base, kind, options, settings, targets = RUNS[name]
    method_name = name.split("__")[1]
    o = {**DEFAULTS, **options}
    data = batches(name + salt, base, kind, o["steps"] * o["batch_size"])
    model, method = attach(base, method_name, settings, targets, "trajectory/" + name)
    save(model, out / "init_adapter", base, method_name, method, targets)
    expected = trajectory(model, data, zoo.is_causal(base), **options)
    if not well_posed(expected):
        return False
    save(model, out / "final_adapter", base, method_name, method, targets)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": method_name, "notes": None,
                                       "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    for row in TABLE:
        write_case(*row)
    for name in RUNS:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
