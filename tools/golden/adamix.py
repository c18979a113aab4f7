"""AdaMix (Wang et al., EMNLP 2022, arXiv:2205.12410): a transcription in PyTorch.

On the output g of every MLP: g + W_u^j act(W_d^i g + b_d^i) + b_u^j, i and j drawn for every layer and pass; otherwise the
means of the experts' tensors. loss = CE(p1) + consistency * (KL(sg p2 || p1) + KL(sg p1 || p2)) / 2 over the labelled rows
of two passes. What a run leaves is a bottleneck adapter of the means, in AdapterHub's form.

Draws are those of philox.py with seed 0: of the words of the stream "PATH.STEP.PASS" the first is for W_d, the second for
W_u, modulo their numbers; passes count through the micro-batches of a step, two each.
"""

import copy

import torch
import transformers
from torch import nn
from torch.nn import functional as F

import philox
import zoo
from batches import batches
from cases import task_of
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of,
                    write_json, write_logits, write_tensors)
from training import trajectory, well_posed

# module that gives the MLP's output, and the name of its place in files, by family
ENDS = {"bert": ("output.dense", "output"), "roberta": ("output.dense", "output"), "llama": ("mlp", "output_adapters"),
        "gpt2": ("mlp", "output_adapters"), "qwen2": ("mlp", "output_adapters"), "t5": ("DenseReluDense", "")}
ACT = {"gelu": F.gelu, "relu": F.relu}


def places(model, base):
    end, place = ENDS[base.split("_")[0]]
    for path, _ in model.named_modules():
        if path.endswith("." + end) and not path.endswith("attention." + end):
            stem = path[:-len(end) - 1]
            yield path, f"{stem}.{place}" if place else stem


class AdaMix(nn.Module):
    def __init__(self, base, c, head):
        super().__init__()
        self.model, self.c, self.head = zoo.load(base), c, head
        self.places = list(places(self.model, base))
        config = self.model.config
        d = getattr(config, "d_model", None) or getattr(config, "n_embd", None) or config.hidden_size
        r = max(int(d / c["reduction"]), 1)
        for key, p in self.model.named_parameters():
            p.requires_grad = any(key.startswith(h + ".") for h in head)
        self.own = nn.ParameterDict()
        for _, place in self.places:
            for part, shape, shared in (("adapter_down.0", (r, d), c["share_down"]), ("adapter_up", (d, r), c["share_up"])):
                for n in range(1 if shared else c["experts"]):
                    self.own[self.key(place, n, part + ".weight")] = nn.Parameter(torch.zeros(shape))
                    self.own[self.key(place, n, part + ".bias")] = nn.Parameter(torch.zeros(shape[0]))
        self.trains, self.step, self.passes = False, 1, 0

    @staticmethod
    def key(place, n, end):
        return f"{place}.adapters.engraft.{f'experts.{n}.' if n else ''}{end}".replace(".", "|")

    def experts(self, part):
        return 1 if self.c["share_down" if "down" in part else "share_up"] else self.c["experts"]

    def expert(self, place, part, word):
        count, of = self.experts(part), lambda n, end: self.own[self.key(place, n, f"{part}.{end}")]
        if self.trains:
            n = int(philox.words(0, f"{place}.{self.step}.{self.passes}", 2)[word]) % count
            return of(n, "weight"), of(n, "bias")
        return [torch.stack([of(n, end) for n in range(count)]).mean(0) for end in ("weight", "bias")]

    def once(self, inputs):
        def hook(place):
            def change(_module, _args, out):
                (wd, bd), (wu, bu) = self.expert(place, "adapter_down.0", 0), self.expert(place, "adapter_up", 1)
                return out + ACT[self.c["activation"]](out @ wd.T + bd) @ wu.T + bu
            return change
        hooks = [self.model.get_submodule(path).register_forward_hook(hook(place)) for path, place in self.places]
        try:
            return self.model(**inputs)
        finally:
            for h in hooks:
                h.remove()
            self.passes += 1

    def forward(self, **inputs):
        out = self.once(inputs)
        if not self.trains:
            return out
        again, labels = self.once(inputs), inputs["labels"]
        if out.logits.ndim == 3:
            moved = int(type(self.model).__name__.endswith("CausalLM"))
            keep = labels[:, moved:] != -100
            rows = [o.logits[:, :o.logits.shape[1] - moved][keep] for o in (out, again)]
        else:
            rows = [out.logits, again.logits]
        a, b = (F.log_softmax(z, -1) for z in rows)
        kl = lambda teacher, student: (teacher.exp().detach() * (teacher.detach() - student)).sum(-1).mean()
        out.loss = out.loss + self.c["consistency"] * (kl(b, a) + kl(a, b)) / 2
        return out

    def tensors(self):
        out = {"base_model.model." + k: p for k, p in self.model.named_parameters() if p.requires_grad}
        return {**out, **{k.replace("|", "."): p for k, p in self.own.items()}}

    def finished(self):
        out = {k: p.detach() for k, p in self.tensors().items() if ".experts." not in k}
        for _, place in self.places:
            for part in ("adapter_down.0", "adapter_up"):
                for end in ("weight", "bias"):
                    all_of = [self.own[self.key(place, n, f"{part}.{end}")].detach() for n in range(self.experts(part))]
                    out[f"{place}.adapters.engraft.{part}.{end}"] = torch.stack(all_of).mean(0)
        return out


SMALL = dict(experts=4, share_down=False, share_up=True, reduction=4, activation="gelu", consistency=1)
# model, variant, settings, trained modules, what it checks
TABLE = [
    ("bert", None, {}, ["classifier"], "the means of the experts, the second layer common to them"),
    ("roberta", "apart", dict(share_up=False, experts=3), [], "experts of both layers"),
    ("llama", None, dict(share_down=True, share_up=False, activation="relu"), [], "causal, the first layer common"),
    ("gpt2", None, dict(experts=2, reduction=8), [], "causal"),
    ("t5", None, {}, [], "encoder and decoder"),
]


def attach(base, c, head, name):
    whole = AdaMix(base, {**SMALL, **c}, head)
    for key, p in whole.tensors().items():
        width = (3.0 / p.shape[1]) ** 0.5 if p.ndim == 2 and ".adapters." in key else 0.25
        p.data = p.data + torch.from_numpy(rng("adapter", name, key).uniform(-width, width, tuple(p.shape))).float()
    return whole.eval()


def save(whole, path, base):
    path.mkdir(parents=True)
    write_tensors(path / "adapter_model.safetensors", whole.tensors())
    write_json(path / "adapter_config.json", {
        **whole.c, "peft_type": "ENGRAFT_ADAMIX", "task_type": task_of(base), "modules_to_save": whole.head or None,
        "base_model_name_or_path": f"models/{base}", "inference_mode": True})


def write_case(base, variant, c, head, checks):
    name = f"{base}__adamix" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    before = tensors_of(INPUTS / base / "base_logits.safetensors")["logits"]
    whole = attach(base, c, head, name)
    logits, rel = forward_both(whole, inputs)
    save(whole, out / "adapter", base)
    again = AdaMix(base, {**SMALL, **c}, head)
    saved = tensors_of(out / "adapter" / "adapter_model.safetensors")
    for key, p in again.tensors().items():
        p.data = saved.pop(key)
    assert not saved
    keep = logits_mask(logits, inputs).bool()
    reload = relative(forward(again.eval(), inputs)[keep], logits[keep])
    meta = {"case": name, "model": base, "method": "adamix", "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": False, "tolerance": TOLERANCE, "inputs": None, "effect_rel": relative(logits, before),
            "transcription": "tools/golden/adamix.py", "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": reload}}
    assert rel < 1e-5 and reload < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


# name -> (kind of batches, options, settings, trained modules)
TRAINED = {
    "bert__adamix": ("padded", dict(gradient_accumulation=2), {}, ["classifier"]),
    "llama__adamix": ("padded", {}, dict(experts=3, share_up=False, consistency=2), []),
}


def next_step(whole, step, _optimizer):
    whole.step, whole.passes = step + 1, 0


def attempt(name, out, salt):
    kind, options, c, head = TRAINED[name]
    base = name.split("__")[0]
    data = batches(name + salt, base, kind, 16 * options.get("gradient_accumulation", 1))
    whole = attach(base, c, head, "trajectory/" + name)
    save(copy.deepcopy(whole), out / "init_adapter", base)
    whole.trains, whole.before_update = True, next_step
    expected = trajectory(whole, data, zoo.is_causal(base), **options)
    if not well_posed(expected):
        print(name, salt, expected["self_check"], expected["rounding_only_tensors"])
        return False
    (out / "final_adapter").mkdir()
    write_tensors(out / "final_adapter" / "adapter_model.safetensors", whole.finished())
    write_json(out / "final_adapter" / "adapter_config.json", {"peft_type": "ENGRAFT_BOTTLENECK", "name": "engraft"})
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": "adamix", "notes": None,
                                       "transcription": "tools/golden/adamix.py", "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
