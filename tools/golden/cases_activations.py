"""Adapters that no library has in a file form: AdaptFormer, KronA^B, CIAT, SSF, MoV. PyTorch transcriptions of the papers' formulas.

A part hangs on the modules of `transformers` by hooks: it sees the stream u that a sublayer's output is added to, what the
sublayer reads (x, behind a pre-norm model's norm), and may add to the output. Files hold `base_model.model.<site>.<name>`, a
site being AdapterHub's name of the place, beside an `adapter_config.json` in `peft`'s form with a `peft_type` of their own.
"""

import copy

import torch
import transformers
from torch import nn

import zoo
from batches import batches
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of,
                    write_json, write_logits, write_tensors)
from training import trajectory, well_posed

PREFIX = "base_model.model."
TASKS = {"CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS", "ConditionalGeneration": "SEQ_2_SEQ_LM"}


def sublayers(model):
    """(site, role, module that reads the stream, norm or None, module whose output is added to the stream) of every sublayer."""
    for path, m in model.named_modules():
        kind = type(m).__name__
        if kind == "LlamaDecoderLayer":
            yield f"{path}.attention_adapters", "attention", m.input_layernorm, m.input_layernorm, m.self_attn
            yield f"{path}.output_adapters", "mlp", m.post_attention_layernorm, m.post_attention_layernorm, m.mlp
        elif kind == "GPT2Block":
            yield f"{path}.attention_adapters", "attention", m.ln_1, m.ln_1, m.attn
            yield f"{path}.output_adapters", "mlp", m.ln_2, m.ln_2, m.mlp
        elif kind == "ViTLayer":
            hub = path.replace("vit.layers", "vit.encoder.layer")
            yield f"{hub}.attention_adapters", "attention", m.layernorm_before, m.layernorm_before, m.attention
            yield f"{hub}.output.output_adapters", "mlp", m.layernorm_after, m.layernorm_after, m.mlp
        elif kind in ("BertLayer", "RobertaLayer"):
            yield f"{path}.attention.output", "attention", m.attention, None, m.attention.output.dense
            yield f"{path}.output", "mlp", m.intermediate, None, m.output.dense
        elif kind in ("T5LayerSelfAttention", "T5LayerCrossAttention"):
            own = kind == "T5LayerSelfAttention"
            yield path, "attention" if own else "cross", m.layer_norm, m.layer_norm, m.SelfAttention if own else m.EncDecAttention
        elif kind == "T5LayerFF":
            yield path, "mlp", m.layer_norm, m.layer_norm, m.DenseReluDense


def blocks(model):
    """(path, block) of every block."""
    kinds = ("LlamaDecoderLayer", "GPT2Block", "ViTLayer", "BertLayer", "RobertaLayer", "T5Block")
    return [(path, m) for path, m in model.named_modules() if type(m).__name__ in kinds]


class Part(nn.Module):
    """What hangs on one sublayer. Hooks are methods, so that a copy of the model has hooks of its own."""

    def __init__(self, path):
        super().__init__()
        self.path, self.u, self.x = path, None, None

    def hang(self, stream, norm, adds):
        stream.register_forward_pre_hook(self.see_stream, with_kwargs=True)
        if norm is not None:
            norm.register_forward_hook(self.see_read)
        adds.register_forward_hook(self.add)

    def see_stream(self, module, args, kwargs):
        self.u = self.x = args[0] if args else kwargs["hidden_states"]

    def see_read(self, module, args, output):
        self.x = output

    def add(self, module, args, output):
        if isinstance(output, tuple):
            return (output[0] + self.branch(self.u, self.x), *output[1:])
        return output + self.branch(self.u, self.x)


class Narrow(nn.Module):
    def __init__(self, width, size, norm=None):
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        if norm:
            self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.up(torch.relu(self.down(x)))


class AdaptFormer(Part):
    """y = u + MLP(LN u) + s·up(relu(down u))."""

    def __init__(self, path, width, c):
        super().__init__(path)
        self.c = c
        self.adaptformer = Narrow(width, c["size"], c["norm"] != "none")

    def branch(self, u, x):
        a, where = self.adaptformer, self.c["norm"]
        y = self.c["scale"] * a(a.norm(u) if where == "in" else u)
        return a.norm(y) if where == "out" else y


class KronaB(Part):
    """y = u + MLP(x) + s·(A⊗B)x, and + s_res·x."""

    def __init__(self, path, width, c):
        super().__init__(path)
        self.c = c
        self.krona_A = nn.Parameter(torch.zeros(c["a1"], c["a2"]))
        self.krona_B = nn.Parameter(torch.zeros(width // c["a1"], width // c["a2"]))
        if c["residual"]:
            self.krona_scale = nn.Parameter(torch.zeros(1))

    def branch(self, u, x):
        y = self.c["scale"] * (x @ torch.kron(self.krona_A, self.krona_B).T)
        return y + self.krona_scale * x if self.c["residual"] else y


class Ciat(Part):
    """y = x + S(LN x) + A(LN x); the embedded input e becomes e + A(LN' e)."""

    def __init__(self, path, width, c, embeds=False):
        super().__init__(path)
        self.ciat = Narrow(width, int(width // c["reduction"]), embeds)

    def branch(self, u, x):
        return self.ciat(x)

    def embed(self, module, args, kwargs):
        if args:
            return (args[0] + self.ciat(self.ciat.norm(args[0])), *args[1:]), kwargs
        e = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": e + self.ciat(self.ciat.norm(e))}


class Ssf(nn.Module):
    """y' = scale * y + shift behind a linear layer, a convolution or a norm (an RMS norm has no shift)."""

    def __init__(self, path, module):
        super().__init__()
        self.path = path
        n = module.weight.shape[1] if type(module).__name__ == "Conv1D" else module.weight.shape[0]
        self.ssf_scale = nn.Parameter(torch.ones(n))
        if not (is_norm(module) and getattr(module, "bias", None) is None):
            self.ssf_shift = nn.Parameter(torch.zeros(n))
        self.channels = isinstance(module, nn.Conv2d)
        module.register_forward_hook(self.after)

    def after(self, module, args, y):
        shape = (-1, 1, 1) if self.channels else (-1,)
        y = y * self.ssf_scale.view(shape)
        return y + self.ssf_shift.view(shape) if hasattr(self, "ssf_shift") else y


def is_norm(module):
    return "Norm" in type(module).__name__


def ssf(model, width, c):
    """Every linear layer of the blocks, the patch embedding, and the norms if asked for; not the head."""
    for path, m in list(model.named_modules()):
        blocks = any(part.isdigit() for part in path.split("."))
        linear = blocks and (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
        if linear or isinstance(m, nn.Conv2d) or c["norms"] and is_norm(m):
            yield Ssf(path, m)


class Mov(nn.Module):
    """y' = y * sum_e p_e l_e with p = softmax(R y): keys and values by heads, the inner activations of the MLP as a whole."""

    def __init__(self, path, module, experts, n, part, inner):
        super().__init__()
        self.path, self.n, self.part = path, n, part
        self.mov_l = nn.Parameter(torch.ones(experts, n))
        self.mov_router = nn.Linear(part, experts, bias=False)
        if inner:
            module.register_forward_pre_hook(self.before)
        else:
            module.register_forward_hook(self.after)

    def scaled(self, y):
        parts = y.view(*y.shape[:-1], self.n // self.part, self.part)
        p = torch.softmax(self.mov_router(parts), -1)
        l = self.mov_l.view(len(self.mov_l), self.n // self.part, self.part)
        return (parts * torch.einsum("...he,ehd->...hd", p, l)).view(y.shape)

    def before(self, module, args):
        return (self.scaled(args[0]),)

    def after(self, module, args, y):
        return self.scaled(y)


# Last parts of paths: keys and values, and what ends an MLP.
KEYS = ("k_proj", "v_proj", "key", "value", "SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v")
DOWNS = ("down_proj", "mlp.fc2", "wo", "mlp.c_proj")


def mov(model, width, c):
    config = model.config
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    head = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or width // heads
    for path, m in list(model.named_modules()):
        down = path.endswith(DOWNS) or path.endswith("output.dense") and not path.endswith("attention.output.dense")
        if not (path.endswith(KEYS) or down) or not hasattr(m, "weight"):
            continue
        transposed = type(m).__name__ == "Conv1D"
        out, inn = m.weight.shape[::-1] if transposed else m.weight.shape
        yield Mov(path, m, c["experts"], inn if down else out, inn if down else head, down)


def on_mlps(kind):
    def attach(model, width, c):
        for path, role, stream, norm, adds in sublayers(model):
            if role == "mlp":
                part = kind(path, width, c)
                part.hang(stream, norm, adds)
                yield part
    return attach


def ciat(model, width, c):
    for path, _, stream, norm, adds in sublayers(model):
        part = Ciat(path, width, c)
        part.hang(stream, norm, adds)
        yield part
    for path, block in blocks(model):
        if path.endswith(".0"):
            part = Ciat(path, width, c, embeds=True)
            block.register_forward_pre_hook(part.embed, with_kwargs=True)
            yield part


METHODS = {"adaptformer": on_mlps(AdaptFormer), "krona_b": on_mlps(KronaB), "ciat": ciat, "ssf": ssf, "mov": mov}
ADAPTFORMER = dict(size=5, scale=0.1, dropout=0.0, norm="none")
KRONA = dict(a1=4, a2=8, scale=1.0, dropout=0.0, residual=False)
CIAT = dict(reduction=4, dropout=0.0, zero_init=False)
SSF = dict(norms=True, init="normal")
MOV = dict(experts=3)
# model, method, variant, settings, what it checks
TABLE = [
    *[(m, "adaptformer", None, ADAPTFORMER, "beside the MLP") for m in ("vit", "bert", "llama", "t5")],
    ("vit_grey", "adaptformer", "norm_in", {**ADAPTFORMER, "norm": "in", "scale": 2.0}, "a norm before the branch"),
    ("gpt2", "adaptformer", "norm_out", {**ADAPTFORMER, "norm": "out"}, "a norm behind the branch"),
    *[(m, "krona_b", None, KRONA, "KronA^B") for m in ("t5", "roberta", "llama")],
    ("t5", "krona_b", "res", {**KRONA, "residual": True, "scale": 2.5}, "KronA^B_res"),
    ("gpt2", "krona_b", "res", {**KRONA, "a1": 8, "a2": 2, "residual": True}, "KronA^B_res"),
    ("vit", "krona_b", "res", {**KRONA, "a1": 2, "a2": 2, "residual": True}, "KronA^B_res"),
    *[(m, "ssf", None, SSF, "every linear layer and norm") for m in ("vit", "bert", "gpt2", "llama_bias")],
    ("llama", "ssf", None, SSF, "layers without biases"),
    ("t5", "ssf", "linears", {**SSF, "norms": False}, "linear layers alone"),
    *[(m, "mov", None, MOV, "keys and values by heads, the MLP") for m in ("t5", "llama", "bert", "qwen2", "vit")],
    ("gpt2", "mov", None, {**MOV, "experts": 5}, "the MLP alone, queries, keys and values being one matrix"),
    *[(m, "ciat", None, CIAT, "every sublayer and the embedded input") for m in ("t5", "bert", "llama", "gpt2", "vit")],
]
TRAINED = {
    "vit__adaptformer": ("vit", "images", "adaptformer", {**ADAPTFORMER, "scale": 1.0}),
    "llama__krona_b_res": ("llama", "padded", "krona_b", {**KRONA, "residual": True}),
    "bert__ciat": ("bert", "padded", "ciat", CIAT),
    "llama__ssf": ("llama", "padded", "ssf", SSF),
    "llama__mov": ("llama", "padded", "mov", MOV),
}


def trained(model):
    """The trained tensors by their names in the file."""
    return {f"{PREFIX}{part.path}.{k}": p for part in model.own for k, p in part.named_parameters()}


def attach(base, method, c, case):
    """The frozen model with filled parts on it."""
    model = zoo.load(base).eval()
    model.requires_grad_(False)
    width = getattr(model.config, "hidden_size", None) or model.config.d_model
    model.own = nn.ModuleList(METHODS[method](model, width, c))
    for key, p in trained(model).items():
        bound = 0.25 if p.ndim == 1 else (3.0 / p.shape[1]) ** 0.5
        value = torch.from_numpy(rng("adapter", case, key).uniform(-bound, bound, tuple(p.shape))).float()
        p.data = value + 1.0 if key.endswith(("norm.weight", "ssf_scale", "mov_l")) else value
    return model


def task_of(base):
    cls = zoo.MODELS_TABLE[base]["cls"]
    return next((t for suffix, t in TASKS.items() if cls.endswith(suffix)), None)


def targets(model, method):
    """The weights that have parts of their own, by their paths."""
    if method not in ("ssf", "mov"):
        return {}
    parts = [part.path for part in model.own]
    return {"target_modules": [p for p in parts if not is_norm(model.get_submodule(p))]}


def folded(base, model):
    """The base with SSF in its tensors; None where a layer has no bias that takes the shift."""
    plain = zoo.load(base).eval()
    for part in model.own:
        m = plain.get_submodule(part.path)
        scale, transposed = part.ssf_scale.detach(), type(m).__name__ == "Conv1D"
        if hasattr(part, "ssf_shift") and m.bias is None:
            return None
        m.weight.data *= scale if transposed else scale.view(-1, *[1] * (m.weight.ndim - 1))
        if hasattr(part, "ssf_shift"):
            m.bias.data = m.bias.data * scale + part.ssf_shift.detach()
    return plain


def save(model, path, base, method, c):
    path.mkdir(parents=True)
    write_tensors(path / "adapter_model.safetensors", trained(model))
    write_json(path / "adapter_config.json", {
        "peft_type": f"ENGRAFT_{method.upper()}", "task_type": task_of(base), "modules_to_save": None, **c, **targets(model, method),
        "base_model_name_or_path": f"models/{base}", "inference_mode": True})


def write_case(base, method, variant, c, checks):
    name = f"{base}__{method}" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    before = tensors_of(INPUTS / base / "base_logits.safetensors")["logits"]
    keep = logits_mask(before, inputs).bool()
    model = attach(base, method, c, name)
    logits, rel = forward_both(model, inputs)
    save(model, out / "adapter", base, method, c)
    again = attach(base, method, c, "other")
    for key, p in trained(again).items():
        p.data = tensors_of(out / "adapter" / "adapter_model.safetensors")[key]
    meta = {"case": name, "model": base, "method": method, "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": False, "tolerance": TOLERANCE, "num_virtual_tokens": 0, "inputs": None,
            "effect_rel": relative(logits[keep], before[keep]), "transcription": "tools/golden/cases_activations.py",
            "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": relative(forward(again, inputs)[keep], logits[keep])}}
    whole = folded(base, model) if method == "ssf" else None
    if whole is not None:
        merged = forward(whole, inputs)
        meta.update(merge=True, merge_tolerance=TOLERANCE)
        meta["self_check"]["merge_rel"] = relative(merged[keep], logits[keep])
        assert meta["self_check"]["merge_rel"] < 1e-5, meta
        merged[~keep] = 0.0
        write_logits(out / "merged_logits.safetensors", merged, inputs)
    assert rel < 1e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def attempt(name, out, salt):
    base, kind, method, c = TRAINED[name]
    data = batches(name + salt, base, kind, 16)
    model = attach(base, method, c, "trajectory/" + name)
    save(copy.deepcopy(model), out / "init_adapter", base, method, c)
    expected = trajectory(model, data, zoo.is_causal(base))
    if not well_posed(expected):
        return False
    save(model, out / "final_adapter", base, method, c)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": method, "notes": "the head stays frozen",
                                       "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make(only=""):
    for row in TABLE:
        if only in row[1]:
            write_case(*row)
    for name in TRAINED:
        if only not in name:
            continue
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
