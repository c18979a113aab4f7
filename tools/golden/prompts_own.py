"""DePT, XPrompt, and LLaMA-Adapter with the paper's gates in its first and second version: PyTorch transcriptions.

DePT (Shi & Lipani, ICLR 2024, arXiv:2309.05173): rows P before the embedded input, and A·B·alpha/√rank added to the embedded
tokens by their columns; tokens in columns from `max_length` on get nothing. Two learning rates.

XPrompt (Ma et al., EMNLP 2022, arXiv:2210.04457): prompt tuning; then the gradient of a factor on each row, its absolute value
summed over batches, says which rows leave; then the same of parts of rows, which become zero; then the rest is trained from the
values before. The prompt rests while it is scored.

LLaMA-Adapter (Zhang et al., ICLR 2024, arXiv:2303.16199): softmax(q·K_pᵀ/√d)·V_p, times tanh of a number a head, is added to what
a head found, before the output projection. Keys and values are the layer's own projections of the prompt, not rotated; all
tokens see it. The second version (Gao et al. 2023, arXiv:2304.15010) also trains the norms, and a factor and a shift of each
linear layer's output, s·(x·W + b₀ + b), which the prompt's keys and values pass as well.

Files are in a form of their own (`ENGRAFT_DEPT`, `ENGRAFT_LLAMA_ADAPTER`, `ENGRAFT_LLAMA_ADAPTER_V2`).
"""

import copy
import math
import warnings

import torch
import transformers
from torch import nn

import cases
import training
import zoo
from batches import batches
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, fresh, logits_mask, relative, rng, tensors_of,
                    write_json, write_logits, write_tensors)

PREFIX = "base_model.model."


class DePT(nn.Module):
    """A model under a short prompt and a change of its embedded tokens."""

    def __init__(self, base, model, tokens, rank, max_length, alpha, lr_ratio):
        super().__init__()
        self.model, self.settings = model, dict(rank=rank, max_length=max_length, alpha=alpha, lr_ratio=lr_ratio)
        self.tokens, self.causal, self.by_row = tokens, zoo.is_causal(base), "Sequence" in type(model).__name__
        model.requires_grad_(False)
        width = model.get_input_embeddings().weight.shape[1]
        self.prompt_embeddings = nn.Parameter(torch.zeros(tokens, width))
        self.lora_embedding_A = nn.Parameter(torch.zeros(max_length, rank))
        self.lora_embedding_B = nn.Parameter(torch.zeros(rank, width))
        self.predicts_first = self.causal

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **more):
        rows, length = input_ids.shape
        embedded = self.model.get_input_embeddings()(input_ids)
        change = self.lora_embedding_A @ self.lora_embedding_B * (self.settings["alpha"] / math.sqrt(self.settings["rank"]))
        short = min(length, len(change))
        embedded = torch.cat([embedded[:, :short] + change[:short], embedded[:, short:]], 1)
        embedded = torch.cat([self.prompt_embeddings.expand(rows, -1, -1), embedded], 1)
        first = torch.ones(rows, self.tokens, dtype=torch.long)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if token_type_ids is not None:
            more["token_type_ids"] = torch.cat([0 * first, token_type_ids], 1)
        if labels is not None and self.causal:
            labels = torch.cat([-100 * first, labels], 1)
        return self.model(inputs_embeds=embedded, attention_mask=torch.cat([first, mask], 1), labels=labels, **more)

    def tensors(self):
        return {k: p for k, p in self.named_parameters() if p.requires_grad}

    def config(self):
        return {"peft_type": "ENGRAFT_DEPT", "num_virtual_tokens": self.tokens, **self.settings, "prompt_tuning_init": "RANDOM",
                "prompt_tuning_init_text": None, "tokenizer_kwargs": None, "tokenizer_name_or_path": None}


class XPrompt(DePT):
    """Prompt tuning that loses rows and parts of rows on its way."""

    def __init__(self, base, model, tokens, pieces, prune_tokens, prune_pieces, prompt_share, score_steps, total=8):
        super().__init__(base, model, tokens, 1, 1, 0, 1)
        del self.lora_embedding_A, self.lora_embedding_B
        self.settings = dict(pieces=pieces, prune_tokens=prune_tokens, prune_pieces=prune_pieces, prompt_share=prompt_share,
                             score_steps=score_steps)
        width = self.prompt_embeddings.shape[1]
        self.kept = list(range(tokens))
        self.part = torch.tensor([c * pieces // width for c in range(width)])
        self.register_buffer("mask", torch.ones(tokens, pieces))
        self.register_buffer("scores", torch.zeros(tokens, pieces))
        first = max(1, math.floor(prompt_share * total))
        self.ends = first, first + score_steps, first + 2 * score_steps

    def left(self):
        return (self.prompt_embeddings * self.mask[:, self.part])[self.kept]

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **more):
        rows, left = len(input_ids), self.left()
        embedded = torch.cat([left.expand(rows, -1, -1), self.model.get_input_embeddings()(input_ids)], 1)
        first = torch.ones(rows, len(left), dtype=torch.long)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if token_type_ids is not None:
            more["token_type_ids"] = torch.cat([0 * first, token_type_ids], 1)
        if labels is not None and self.causal:
            labels = torch.cat([-100 * first, labels], 1)
        return self.model(inputs_embeds=embedded, attention_mask=torch.cat([first, mask], 1), labels=labels, **more)

    def before_update(self, model, step, optimizer):
        start, rows, pieces = self.ends
        if not start < step <= pieces:
            return
        p = self.prompt_embeddings
        # d loss / d factor, by parts; a row's is their sum.
        product = torch.zeros_like(self.mask).index_add_(1, self.part, (p.grad * p).detach())
        self.scores += (product.sum(1, keepdim=True) if step <= rows else product).abs()
        p.grad = None

    def after_update(self, model, step, optimizer):
        _, rows, pieces = self.ends
        keep = lambda n, share: max(1, n - math.floor(n * share + 1e-9))
        if step == rows:
            order = sorted(self.kept, key=lambda row: -float(self.scores[row, 0]))
            self.kept = sorted(order[:keep(len(order), self.settings["prune_tokens"])])
            self.scores.zero_()
        if step == pieces:
            cells = sorted(((row, c) for row in self.kept for c in range(self.mask.shape[1])), key=lambda at: -float(self.scores[at]))
            self.mask.zero_()
            for at in cells[:keep(len(cells), self.settings["prune_pieces"])]:
                self.mask[at] = 1
            optimizer.state.pop(self.prompt_embeddings, None)

    def finish(self):
        self.done = True

    def tensors(self):
        if getattr(self, "done", False):
            return {"prompt_embeddings": self.left().detach()}
        return {"prompt_embeddings": self.prompt_embeddings}

    def config(self):
        start = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_kwargs": None, "tokenizer_name_or_path": None}
        if getattr(self, "done", False):
            config = self.model.config
            return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(self.kept), "num_transformer_submodules": 1,
                    "token_dim": self.prompt_embeddings.shape[1], **start}
        return {"peft_type": "ENGRAFT_XPROMPT", "num_virtual_tokens": self.tokens, **self.settings, **start}


class Gated(nn.Module):
    """A model with prompts in its top attentions; in the second version with trained norms, factors and shifts too."""

    def __init__(self, base, model, tokens, layers, second):
        super().__init__()
        self.model, self.second, self.count, self.layers = model, second, tokens, layers
        model.requires_grad_(False)
        self.own = {}  # name in the file -> parameter
        of_bert = hasattr(model, "bert")
        blocks = (model.bert.encoder.layer if of_bert else model.model.layers)[-layers:]
        self.paths = {m: n for n, m in model.named_modules()}
        if second:
            self.tune(model)
        for block in blocks:
            attention = block.attention.self if of_bert else block.self_attn
            names = ("query", "key", "value") if of_bert else ("q_proj", "k_proj", "v_proj")
            self.prompt(attention, [getattr(attention, n) for n in names], block.attention.output.dense if of_bert else attention.o_proj)
        self.module = self.paths[attention].rsplit(".", 1)[1]

    def add(self, name, value):
        self.own[name] = p = nn.Parameter(value)
        self.register_parameter(name.replace(".", "!"), p)
        return name.replace(".", "!")

    def prompt(self, attention, projections, output):
        path, config = self.paths[attention], self.model.config
        heads, width = config.num_attention_heads, config.hidden_size
        rows = self.add(f"{path}.adaption_prompt", torch.zeros(1, self.count, width))
        gate = self.add(f"{path}.adaption_gate", torch.zeros(heads))
        seen = {}
        # Where queries are normed, they are read after that.
        getattr(attention, "q_norm", projections[0]).register_forward_hook(lambda m, args, y: seen.update(q=y))
        attention.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)

        def before_output(module, args):
            y, q = args[0], seen["q"]
            q = (q if q.ndim == 4 else q.unflatten(-1, (heads, -1))).transpose(1, 2)
            d = q.shape[-1]
            if "position_embeddings" in seen:
                from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
                q = apply_rotary_pos_emb(q, q, *seen["position_embeddings"])[0]
            p = getattr(self, rows)[0]
            k, v = (linear(p).unflatten(-1, (-1, d)).transpose(0, 1) for linear in projections[1:])
            k, v = (t.repeat_interleave(heads // len(t), 0) for t in (k, v))
            found = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(d), -1) @ v
            found = torch.tanh(getattr(self, gate))[:, None, None] * found
            return (y + found.transpose(1, 2).reshape(y.shape),)

        output.register_forward_pre_hook(before_output)

    def tune(self, model):
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for name, m in model.named_modules():
            if "norm" in type(m).__name__.lower():
                for end, p in m.named_parameters(recurse=False):
                    p.requires_grad = True
                    self.own[f"{name}.{end}"] = p
            elif isinstance(m, nn.Linear) and m is not head and name.split(".")[0] not in ("score", "classifier") and "pooler" not in name:
                scale = self.add(f"{name}.adapter_scale", torch.ones(m.out_features))
                shift = self.add(f"{name}.adapter_bias", torch.zeros(m.out_features))
                m.register_forward_hook(lambda m, args, y, s=scale, b=shift: getattr(self, s) * (y + getattr(self, b)))

    def forward(self, **inputs):
        return self.model(**inputs)

    def tensors(self):
        return {PREFIX + k: p for k, p in self.own.items()}

    def config(self):
        second = "_V2" if self.second else ""
        return {"peft_type": f"ENGRAFT_LLAMA_ADAPTER{second}", "adapter_len": self.count, "adapter_layers": self.layers,
                "target_modules": self.module, "gate": "tanh"}


def wide(model):
    """In f64; the plain attention overflows to NaN there on rows that see nothing, so another is taken where there is one."""
    if getattr(model.model, "_supports_sdpa", False):
        model.model.set_attn_implementation("sdpa")
    return model.double()


def dept(base, tokens=3, rank=4, max_length=6, alpha=4, lr_ratio=1):
    return DePT(base, zoo.load(base), tokens, rank, max_length, alpha, lr_ratio)


def gated(base, second=False, tokens=4, layers=2):
    return Gated(base, zoo.load(base), tokens, layers, second)


def xprompt(base, done=False, tokens=6, pieces=4, prune_tokens=0.5, prune_pieces=0.4, prompt_share=0.3, score_steps=1):
    model = XPrompt(base, zoo.load(base), tokens, pieces, prune_tokens, prune_pieces, prompt_share, score_steps)
    if done:
        # As if rows 1 and 4 had gone, and some parts.
        model.kept = [row for row in model.kept if row not in (1, 4)]
        model.mask[0, 2] = model.mask[3, 0] = model.mask[3, 1] = 0
    return model


# name of the case -> (model, method, side, how it is made, what it checks)
TABLE = {
    "llama__dept": ("llama", "dept", "", lambda m: dept(m), "tokens beyond max_length"),
    "llama__dept_left": ("llama", "dept", "_left", lambda m: dept(m, max_length=20), "rows by column, padding on the left"),
    "qwen2__dept": ("qwen2", "dept", "", lambda m: dept(m, tokens=1, rank=2, max_length=9), "tied head"),
    "gpt2__dept": ("gpt2", "dept", "", lambda m: dept(m, max_length=30), "learned positions"),
    "gpt2__dept_left": ("gpt2", "dept", "_left", lambda m: dept(m, max_length=8), "the same with padding on the left"),
    "bert__dept": ("bert", "dept", "", lambda m: dept(m, max_length=40), "the classifier stays"),
    "roberta_token__dept": ("roberta_token", "dept", "", lambda m: dept(m, max_length=7), "token head"),
    "t5__dept": ("t5", "dept", "", lambda m: dept(m, max_length=7), "the encoder's input alone"),
    "llama__xprompt": ("llama", "xprompt", "", lambda m: xprompt(m, True), "what is left is prompt tuning"),
    "bert_mlm__xprompt": ("bert_mlm", "xprompt", "", lambda m: xprompt(m, True, pieces=5), "parts of uneven width"),
    "t5__xprompt": ("t5", "xprompt", "_left", lambda m: xprompt(m, True), "rows for one half"),
    "llama__llama_adapter_tanh": ("llama", "llama_adapter", "", lambda m: gated(m), "the paper's gates"),
    "qwen2__llama_adapter_tanh": ("qwen2", "llama_adapter", "_left", lambda m: gated(m, layers=1), "biases on queries, keys and values"),
    "bert__llama_adapter_tanh": ("bert", "llama_adapter", "", lambda m: gated(m, layers=2), "an encoder"),
    "llama__llama_adapter_v2": ("llama", "llama_adapter_v2", "", lambda m: gated(m, True), "norms, factors and shifts"),
    "llama_bias__llama_adapter_v2": ("llama_bias", "llama_adapter_v2", "_left", lambda m: gated(m, True, layers=1), "linears with biases"),
    "qwen3__llama_adapter_v2": ("qwen3", "llama_adapter_v2", "", lambda m: gated(m, True, tokens=2), "norms of queries and keys are trained too"),
    "bert__llama_adapter_v2": ("bert", "llama_adapter_v2", "", lambda m: gated(m, True), "an encoder"),
}
FAST = dict(learning_rate=1e-2)
TRAINED = {
    "llama__dept": ("llama", "full", FAST, "dept", lambda m: dept(m, max_length=8, lr_ratio=0.25)),
    "bert__dept": ("bert", "padded", FAST, "dept", lambda m: dept(m, max_length=8)),
    "t5__dept": ("t5", "ragged", FAST, "dept", lambda m: dept(m, max_length=5, lr_ratio=2)),
    "llama__xprompt": ("llama", "full", FAST, "xprompt", lambda m: xprompt(m)),
    "gpt2__xprompt": ("gpt2", "padded", dict(FAST, weight_decay=0.1), "xprompt", lambda m: xprompt(m, tokens=5, pieces=5, score_steps=2)),
    "t5__xprompt": ("t5", "ragged", FAST, "xprompt", lambda m: xprompt(m, prune_tokens=0.2)),
    "llama__llama_adapter_tanh": ("llama", "full", FAST, "llama_adapter", lambda m: gated(m)),
    "llama__llama_adapter_v2": ("llama", "padded", dict(learning_rate=5e-3), "llama_adapter_v2", lambda m: gated(m, True)),
}
WIDTHS = {"prompt_embeddings": (False, 1.2), "lora_embedding": (False, 0.8), "adaption_prompt": (False, 1.5),
          "adaption_gate": (False, 0.9)}


def filled(model, name):
    for key, p in model.tensors().items():
        keep, width = next((v for k, v in WIDTHS.items() if k in key), (True, 0.25))
        value = torch.from_numpy(rng("adapter", name, key).uniform(-width, width, tuple(p.shape))).float()
        p.data = value + p.data if keep else value
    return model.eval()


def save(model, path, base):
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / "adapter_model.safetensors", model.tensors())
    write_json(path / "adapter_config.json", {**model.config(), "task_type": cases.task_of(base), "modules_to_save": None,
                                              "base_model_name_or_path": f"models/{base}", "inference_mode": True})


def write_case(name):
    base, method, side, make, checks = TABLE[name]
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / f"inputs{side}.safetensors")
    before = tensors_of(INPUTS / base / f"base_logits{side}.safetensors")["logits"]
    keep = logits_mask(before, inputs).bool()
    model = filled(make(base), name)
    # Hooks belong to the model that they were made for: the run in f64 is a second model with the same numbers.
    logits = forward_here(model, inputs)
    logits[~keep] = 0.0
    double = forward_here(wide(filled(make(base), name)), inputs)
    rel = relative(logits[keep], double[keep])
    if isinstance(model, XPrompt):
        model.finish()
    save(model, out / "adapter", base)
    again = make(base)
    for key, value in tensors_of(out / "adapter/adapter_model.safetensors").items():
        if isinstance(again, XPrompt):
            again = XPrompt(base, again.model, len(value), 1, 0, 0, 1, 1)
        again.tensors()[key].data = value
    meta = {"case": name, "model": base, "method": method, "checks": checks, "task_type": cases.task_of(base), "merge": False,
            "tolerance": TOLERANCE, "num_virtual_tokens": model.config().get("num_virtual_tokens", 0),
            "inputs": f"../../inputs/{base}/inputs{side}.safetensors" if side else None, "effect_rel": relative(logits, before),
            "transcription": "tools/golden/prompts_own.py", "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": relative(forward_here(again.eval(), inputs)[keep], logits[keep])}}
    assert rel < 1e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def forward_here(model, inputs):
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits
    if logits.ndim == 3:
        logits = logits[:, logits.shape[1] - inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]:]
    return logits


def optimizer_of(model, o):
    ratio = getattr(model, "settings", {}).get("lr_ratio", 1)
    slow = [p for k, p in model.tensors().items() if "lora_embedding" in k]
    fast = [p for k, p in model.tensors().items() if "lora_embedding" not in k]
    groups = [dict(params=fast), *([dict(params=slow, lr=o["learning_rate"] * ratio)] if slow else [])]
    return torch.optim.AdamW(groups, lr=o["learning_rate"], betas=(0.9, 0.999), eps=1e-8, weight_decay=o["weight_decay"])


def attempt(name, out, salt):
    base, kind, options, method, make = TRAINED[name]
    data = batches(name + salt, base, kind, 16)
    made = lambda: filled(make(base), "trajectory/" + name)
    model = made()
    save(model, out / "init_adapter", base)
    plain = training.optimizer_of, training.doubled, copy.deepcopy
    # Instead of copies, whose hooks would read the first model, the same model made again.
    training.optimizer_of, training.doubled = optimizer_of, lambda m: wide(made())
    training.copy.deepcopy = lambda m: made() if isinstance(m, (DePT, Gated)) else plain[2](m)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = training.trajectory(model, data, zoo.is_causal(base), **options)
    finally:
        training.optimizer_of, training.doubled, training.copy.deepcopy = plain
    if not training.well_posed(expected):
        return False
    if isinstance(model, XPrompt):
        print(name, "rows left", model.kept, "parts", int(model.mask.sum()))
        model.finish()
    save(model, out / "final_adapter", base)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": method, "notes": None,
                                       "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make(only=None):
    for name in TABLE:
        if not only or only in name:
            write_case(name)
    for name in TRAINED:
        if only and only not in name:
            continue
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
