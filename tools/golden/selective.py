"""BitFit and head-only tuning: a PyTorch transcription of their definition (`peft` has neither).

BitFit (Ben Zaken et al., ACL 2022): every bias (linear layers, the beta of LayerNorm) and the whole task head are
trained, nothing else. The sparse variant trains the query bias and the first feed-forward bias only. The adapter file
holds the *new values* (not differences) as `base_model.model.<path>`, beside an `adapter_config.json` in `peft`'s form
whose `peft_type` is `ENGRAFT_BITFIT`, or `ENGRAFT_HEAD` where only the head is trained.
"""

import tempfile

import torch
import transformers

import zoo
from common import (CASES, INPUTS, TOLERANCE, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of,
                    write_json, write_logits, write_tensors)

PREFIX = "base_model.model."
SPARSE = ["attention.self.query", "intermediate.dense"]
# model, variant, biases (None: all; else suffixes of module paths), head modules, side, what it checks
TABLE = [
    ("bert", "bitfit", None, None, ["classifier"], "", "every bias and the classifier"),
    ("bert", "bitfit", "left", None, ["classifier"], "_left", "the same with padding on the left"),
    ("bert", "bitfit", "sparse", SPARSE, ["classifier"], "", "query and first feed-forward biases, and the classifier"),
    ("bert", "bitfit", "no_head", None, None, "", "every bias, the head's too, no head weights"),
    ("bert", "head", None, [], ["classifier"], "", "the classifier alone"),
    ("roberta", "bitfit", None, None, ["classifier"], "", "every bias, and a classifier of two layers"),
    ("roberta", "head", None, [], ["classifier"], "", "a classifier of two layers alone"),
    ("bert_token", "bitfit", None, None, ["classifier"], "", "every bias and the token classifier"),
    ("bert_mlm", "bitfit", None, None, None, "", "every bias, the vocabulary's too"),
    ("qwen2", "bitfit", None, None, None, "", "biases of q, k, v"),
    ("llama_bias", "bitfit", None, None, None, "", "biases of all linears"),
    ("gpt2", "bitfit", None, None, None, "", "every bias, in linears and norms"),
    ("gpt2_cls", "bitfit", None, None, ["score"], "", "every bias, and a score without one"),
    ("gpt2_cls", "head", None, [], ["score"], "", "the score alone"),
    ("t5_flan", "head", None, [], ["lm_head"], "", "the head alone; T5 has no biases for BitFit"),
    ("vit", "bitfit", None, None, ["classifier"], "", "every bias, of the patches too, and the classifier"),
    ("vit", "bitfit", "sparse", ["attention.q_proj", "fc1"], ["classifier"], "", "query and first feed-forward biases, and the classifier"),
    ("vit", "head", None, [], ["classifier"], "", "the classifier alone"),
    ("vit_grey", "bitfit", None, None, ["classifier"], "", "queries, keys and values have none"),
    ("deit_teacher", "head", None, [], ["cls_classifier", "distillation_classifier"], "", "two classifiers alone"),
    ("dinov2", "bitfit", None, None, ["classifier"], "", "every bias and the classifier"),
    ("post_vit", "bitfit", None, None, ["classifier"], "", "every bias, that of a fused projection too"),
]


def chosen(name, biases, head):
    """Whether the parameter `name` is trained."""
    if any(name.startswith(h + ".") for h in head or []):
        return True
    # `torch.nn.MultiheadAttention` calls that of its fused projection `in_proj_bias`.
    if not name.endswith((".bias", "_proj_bias")):
        return False
    path = name.removesuffix(".bias")
    return biases is None or any(path.endswith("." + b) for b in biases)


def attach(model, biases, head, case):
    """Freezes all but the chosen parameters and moves these by seeded amounts."""
    for name, p in model.named_parameters():
        p.requires_grad = chosen(name, biases, head)
        if p.requires_grad:
            p.data = p.data + torch.from_numpy(rng("adapter", case, name).uniform(-0.3, 0.3, tuple(p.shape))).float()
    return model


def save(model, path, base, method, task, biases, head):
    path.mkdir(parents=True)
    write_tensors(path / "adapter_model.safetensors", {PREFIX + k: p for k, p in model.named_parameters() if p.requires_grad})
    write_json(path / "adapter_config.json", {
        "peft_type": f"ENGRAFT_{method.upper()}", "task_type": task, "target_modules": biases, "modules_to_save": head,
        "base_model_name_or_path": f"models/{base}", "inference_mode": True})


def write_case(base, method, variant, biases, head, side, checks):
    from cases import task_of
    name = f"{base}__{method}" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / f"inputs{side}.safetensors")
    before = tensors_of(INPUTS / base / f"base_logits{side}.safetensors")["logits"]
    model = attach(zoo.load(base), biases, head, name)
    logits, rel = forward_both(model, inputs)
    save(model, out / "adapter", base, method, task_of(base), biases, head)
    keep = logits_mask(logits, inputs).bool()
    again = zoo.load(base)
    missing = again.load_state_dict({k.removeprefix(PREFIX): v for k, v in
                                     tensors_of(out / "adapter" / "adapter_model.safetensors").items()}, strict=False)
    assert not missing.unexpected_keys
    reload_rel = relative(forward(again, inputs)[keep], logits[keep])
    with tempfile.TemporaryDirectory() as d:
        model.save_pretrained(d)
        whole = forward(type(model).from_pretrained(d, attn_implementation="eager"), inputs)
    whole[~keep] = 0.0
    meta = {"case": name, "model": base, "method": method, "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": True, "tolerance": TOLERANCE, "merge_tolerance": TOLERANCE, "num_virtual_tokens": 0,
            "inputs": f"../../inputs/{base}/inputs{side}.safetensors" if side else None,
            "effect_rel": relative(logits, before), "transcription": "tools/golden/selective.py",
            "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "reload_rel": reload_rel, "merge_rel": relative(whole[keep], logits[keep])}}
    assert rel < 1e-5 and max(reload_rel, meta["self_check"]["merge_rel"]) < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_logits(out / "merged_logits.safetensors", whole, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def make():
    for row in TABLE:
        write_case(*row)
