"""Adapters with the head that the library `adapters` saves beside them: those of classes of `transformers` and flexible ones.

Runs in the environment of requirements-adapters.txt, as bottleneck.py. A case's `head` says whose it is: `class`, `flexible`, or
`of_model` where the class has trained nothing of it.
"""

import copy
import json
import warnings

import adapters
import torch
import transformers
from adapters import LoRAConfig, SeqBnConfig

import zoo
from bottleneck import NAME
from common import (CASES, INPUTS, TOLERANCE, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of, write_json,
                    write_logits)

BN = SeqBnConfig(reduction_factor=8)
# model, method, variant, class, names or number of the labels, a flexible head, configuration, side, what it checks
TABLE = [
    ("bert", "seq_bn", "head", "BertForSequenceClassification", ["no", "yes", "maybe"], None, BN, "", "names of classes"),
    ("bert_encoder", "seq_bn", "head", "BertForSequenceClassification", 5, None, BN, "", "a base without a head"),
    ("bert_encoder", "lora", "hub_head", "BertForTokenClassification", 2, None, LoRAConfig(r=2, alpha=4), "", "a base without a head"),
    ("roberta", "seq_bn", "head", "RobertaForSequenceClassification", 2, None, BN, "_left", "two layers, fewer classes than the base"),
    ("roberta", "seq_bn", "head_tokens", "RobertaForTokenClassification", 4, None, BN, "", "another task than the base's"),
    ("gpt2_cls", "seq_bn", "head", "GPT2ForSequenceClassification", 4, None, BN, "", "a matrix alone"),
    ("gpt2", "seq_bn", "head_tokens", "GPT2ForTokenClassification", 3, None, BN, "", "classes on a language model"),
    ("vit", "seq_bn", "head", "ViTForImageClassification", 3, None, BN, "", "pictures"),
    ("llama", "seq_bn", "head", "LlamaForCausalLM", None, None, BN, "", "the model's own head over words"),
    ("bert", "seq_bn", "flexible", "BertAdapterModel", ["a", "b", "c", "d"], {"layers": 1, "use_pooler": True}, BN, "", "one layer on the pooled row"),
    ("roberta", "seq_bn", "flexible", "RobertaAdapterModel", 3, {"layers": 2}, BN, "", "two layers with tanh between"),
    ("bert_encoder", "seq_bn", "flexible_tokens", "BertAdapterModel", 3, {"head_type": "tagging", "layers": 1}, BN, "", "a base without a head"),
    ("gpt2", "seq_bn", "flexible", "GPT2AdapterModel", 3, {"layers": 1, "bias": False}, BN, "", "classes on a language model"),
]


def load(base, cls, labels, flexible):
    names = labels if isinstance(labels, list) else [f"LABEL_{i}" for i in range(labels or 0)]
    options = dict(torch_dtype=torch.float32, attn_implementation="eager")
    if flexible is not None:
        return getattr(adapters, cls).from_pretrained(zoo.MODELS / base, **options).eval(), names
    if labels is not None:
        options |= dict(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, ignore_mismatched_sizes=True)
    model = getattr(transformers, cls).from_pretrained(zoo.MODELS / base, **options).eval()
    adapters.init(model)
    return model, names


def fill(model, case, head):
    for key, p in model.named_parameters():
        if f".{NAME}." in key or head and not key.startswith(model.base_model_prefix):
            width = 0.25 if p.ndim == 1 else (3.0 / p.shape[1]) ** 0.5
            p.data = torch.from_numpy(rng("adapter", case, key).uniform(-width, width, tuple(p.shape))).float()


def write_case(base, method, variant, cls, labels, flexible, config, side, checks):
    name = f"{base}__{method}_{variant}"
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / f"inputs{side}.safetensors")
    model, names = load(base, cls, labels, flexible)
    model.add_adapter(NAME, config=copy.deepcopy(config))
    if flexible is not None:
        usual = {"head_type": "classification", "activation_function": "tanh"}
        model.add_prediction_head_from_config(NAME, {**usual, "num_labels": len(names), "id2label": dict(enumerate(names)), **flexible})
    fill(model, name, labels is not None)
    model.set_active_adapters(None)
    before = forward(model, inputs)
    model.set_active_adapters(NAME)
    logits, rel = forward_both(model, inputs)
    path = out / "adapter"
    model.save_adapter(str(path), NAME, use_safetensors=True)
    for file in path.glob("*.json"):
        write_json(file, {**json.loads(file.read_text()), "model_name": f"models/{base}"})
    again, _ = load(base, cls, labels, flexible)
    again.load_adapter(str(path), use_safetensors=True)
    again.set_active_adapters(NAME)
    keep = logits_mask(logits, inputs).bool()
    form = "flexible" if flexible is not None else "class" if labels is not None else "of_model"
    meta = {"case": name, "model": base, "method": method, "variant": variant, "checks": checks, "merge": False, "tolerance": TOLERANCE,
            "format": "adapterhub", "head": form, "effect_rel": relative(logits[keep], before[keep]), "model_name": f"models/{base}", "adapters": "1.3.0",
            "inputs": f"../../inputs/{base}/inputs{side}.safetensors" if side else None, "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": relative(forward(again, inputs)[keep], logits[keep])}}
    assert rel < 1e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: {list(logits.shape)}, effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def make(only=""):
    warnings.simplefilter("ignore")
    for row in TABLE:
        if only in f"{row[0]}__{row[1]}_{row[2]}":
            write_case(*row)
