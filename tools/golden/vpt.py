"""Visual prompt tuning (Jia et al., ECCV 2022, arXiv:2203.12119): a PyTorch transcription of equations 4 to 7.

Prompts stand between the class token and the patches, which have their positions already; prompts have none. Shallow:
they are put in before the first layer and go through all. Deep: each layer gets prompts of its own in the place of
those that the layer before gave out. The class token of the last layer is read. Neither projection nor dropout.

The adapter file holds `prompt_embeddings`, [tokens, width] or [layers, tokens, width] where deep, and the new values of
a trained head as `base_model.model.<path>`; `peft_type` is `ENGRAFT_VPT` with `num_virtual_tokens` and `deep`.
"""

import copy

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

import zoo
from batches import batches
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, relative, rng, tensors_of, write_json,
                    write_logits, write_tensors)
from training import trajectory, well_posed

PREFIX = "base_model.model."
# model, variant, tokens, deep, trained modules, what it checks
TABLE = [
    ("vit", None, 4, False, ["classifier"], "shallow, trained classifier"),
    ("vit", "deep", 3, True, ["classifier"], "deep, trained classifier"),
    ("vit", "no_head", 5, False, None, "the prompts alone"),
    ("vit", "deep_one", 1, True, None, "one prompt a layer"),
    ("vit_grey", "deep", 4, True, ["classifier"], "one channel, no biases on queries, keys, values"),
    ("vit_oblong", None, 2, False, ["classifier"], "an oblong image"),
]


class Prompted(nn.Module):
    """A classifier of images with prompts; only these and the chosen modules train."""

    def __init__(self, model, tokens, deep, head):
        super().__init__()
        self.model, self.tokens, self.deep, self.head = model, tokens, deep, head
        for name, p in model.named_parameters():
            p.requires_grad = any(name.startswith(h + ".") for h in head or [])
        shape = (tokens, model.config.hidden_size)
        self.prompt_embeddings = nn.Parameter(torch.zeros((model.config.num_hidden_layers, *shape) if deep else shape))

    def forward(self, pixel_values, labels=None):
        vit = self.model.vit
        states = vit.embeddings(pixel_values.to(self.prompt_embeddings.dtype))
        first, rest = states[:, :1], states[:, 1:]
        for i, layer in enumerate(vit.layers):
            if i == 0 or self.deep:
                prompts = self.prompt_embeddings[i] if self.deep else self.prompt_embeddings
                states = torch.cat([first, prompts.expand(len(states), -1, -1), rest], 1)
            states = layer(states, None)
            first, rest = states[:, :1], states[:, 1 + self.tokens:]
        logits = self.model.classifier(vit.layernorm(states)[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def trained(model):
    """Names as in the file."""
    return {PREFIX + k.removeprefix("model.") if k.startswith("model.") else k: p for k, p in model.named_parameters() if p.requires_grad}


def attach(base, tokens, deep, head, case):
    model = Prompted(zoo.load(base), tokens, deep, head)
    for key, p in trained(model).items():
        width = 1.5 if key == "prompt_embeddings" else 0.3
        p.data = p.data + torch.from_numpy(rng("adapter", case, key).uniform(-width, width, tuple(p.shape))).float()
    return model.eval()


def save(model, path, base):
    path.mkdir(parents=True)
    write_tensors(path / "adapter_model.safetensors", trained(model))
    write_json(path / "adapter_config.json", {
        "peft_type": "ENGRAFT_VPT", "task_type": None, "num_virtual_tokens": model.tokens, "deep": model.deep,
        "modules_to_save": model.head, "base_model_name_or_path": f"models/{base}", "inference_mode": True})


def reloaded(base, path, tokens, deep, head):
    model = Prompted(zoo.load(base), tokens, deep, head)
    tensors = tensors_of(path / "adapter_model.safetensors")
    for key, p in trained(model).items():
        p.data = tensors.pop(key)
    assert not tensors
    return model


def write_case(base, variant, tokens, deep, head, checks):
    name = f"{base}__vpt" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / "inputs.safetensors")
    before = tensors_of(INPUTS / base / "base_logits.safetensors")["logits"]
    bare_rel = relative(forward(Prompted(zoo.load(base), 0, False, None), inputs), before)
    model = attach(base, tokens, deep, head, name)
    logits, rel = forward_both(model, inputs)
    save(model, out / "adapter", base)
    meta = {"case": name, "model": base, "method": "vpt", "variant": variant, "checks": checks, "task_type": None, "merge": False,
            "tolerance": TOLERANCE, "num_virtual_tokens": tokens, "inputs": None, "effect_rel": relative(logits, before),
            "transcription": "tools/golden/vpt.py", "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "no_prompts_rel": bare_rel,
                           "reload_rel": relative(forward(reloaded(base, out / "adapter", tokens, deep, head), inputs), logits)}}
    assert rel < 1e-5 and max(bare_rel, meta["self_check"]["reload_rel"]) < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


TRAINED = {"vit__vpt": (4, False), "vit__vpt_deep": (3, True)}


def attempt(name, out, salt):
    base, (tokens, deep) = name.split("__")[0], TRAINED[name]
    data = batches(name + salt, base, "images", 16)
    model = attach(base, tokens, deep, ["classifier"], "trajectory/" + name)
    save(copy.deepcopy(model), out / "init_adapter", base)
    expected = trajectory(model, data, False, learning_rate=5e-3)
    if not well_posed(expected):
        return False
    save(model, out / "final_adapter", base)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": "vpt", "notes": None,
                                       "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
