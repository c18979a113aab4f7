"""Bottleneck adapters (Pfeiffer, Houlsby, parallel) by the library `adapters`, in AdapterHub's file form.

Runs in the environment of requirements-adapters.txt (`adapters` 1.3.0 needs `transformers` 4.57). The models are those
of zoo.py; the library's own forward of the base is compared with their committed logits first.
"""

import copy
import json
import warnings

import adapters
import torch
import transformers
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig

import zoo
from batches import batches
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, rng,
                    tensors_of, write_json, write_logits, write_tensors)
from training import trajectory, well_posed

NAME = "probe"
TASKS = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS", "MaskedLM": None,
         "LMHeadModel": "CAUSAL_LM", "ConditionalGeneration": "SEQ_2_SEQ_LM", "ImageClassification": None}
# model, method, variant, configuration, side, what it checks
TABLE = [
    ("bert", "seq_bn", None, SeqBnConfig(reduction_factor=4), "", "Pfeiffer: after the feed-forward, relu"),
    ("bert", "seq_bn", "left", SeqBnConfig(reduction_factor=8), "_left", "padding on the left"),
    ("bert", "seq_bn", "gelu", SeqBnConfig(reduction_factor=4, non_linearity="gelu"), "", "exact GELU"),
    ("bert", "seq_bn", "tanh_scaled", SeqBnConfig(reduction_factor=4, non_linearity="tanh", scaling=2.5), "", "tanh, scaled"),
    ("bert", "seq_bn", "learned_scale", SeqBnConfig(reduction_factor=4, scaling="learned"), "", "one learned factor"),
    ("bert", "seq_bn", "leave_out", SeqBnConfig(reduction_factor=4, leave_out=[0]), "", "no adapter in layer 0"),
    ("bert", "seq_bn", "by_layer", SeqBnConfig(reduction_factor={"0": 8, "default": 2}), "", "another width by layer"),
    ("bert", "seq_bn", "ln_before", SeqBnConfig(reduction_factor=4, ln_before=True), "", "own norm before the bottleneck"),
    ("bert", "seq_bn", "ln_after", SeqBnConfig(reduction_factor=4, ln_after=True), "", "own norm after the bottleneck"),
    ("bert", "seq_bn", "leakyrelu", SeqBnConfig(reduction_factor=4, non_linearity="leakyrelu"), "", "leaky relu"),
    ("bert", "double_seq_bn", None, DoubleSeqBnConfig(reduction_factor=4), "", "Houlsby: after both sublayers, swish"),
    ("bert", "double_seq_bn", "relu", DoubleSeqBnConfig(reduction_factor=8, non_linearity="relu"), "", "relu"),
    ("bert", "double_seq_bn", "gelu_new", DoubleSeqBnConfig(reduction_factor=8, non_linearity="gelu_new"), "", "tanh GELU"),
    ("bert", "par_bn", None, ParBnConfig(reduction_factor=4), "", "beside the feed-forward, factor 4"),
    ("bert", "par_bn", "scale_1", ParBnConfig(reduction_factor=4, scaling=1.0, non_linearity="gelu"), "", "factor one, exact GELU"),
    ("bert_token", "seq_bn", None, SeqBnConfig(reduction_factor=4), "", "token head"),
    ("bert_token", "double_seq_bn", None, DoubleSeqBnConfig(reduction_factor=4), "", "token head"),
    ("bert_mlm", "seq_bn", None, SeqBnConfig(reduction_factor=4, non_linearity="swish"), "", "masked LM"),
    ("bert_encoder", "double_seq_bn", None, DoubleSeqBnConfig(reduction_factor=4), "", "sentence embedding"),
    ("roberta", "seq_bn", None, SeqBnConfig(reduction_factor=4), "", "Pfeiffer"),
    ("roberta", "double_seq_bn", None, DoubleSeqBnConfig(reduction_factor=4), "", "Houlsby"),
    ("roberta", "par_bn", None, ParBnConfig(reduction_factor=4), "", "beside the feed-forward"),
    ("llama", "seq_bn", None, SeqBnConfig(reduction_factor=4), "", "Pfeiffer in a pre-norm decoder"),
    ("llama", "seq_bn", "left", SeqBnConfig(reduction_factor=4), "_left", "padding on the left"),
    ("llama", "double_seq_bn", None, DoubleSeqBnConfig(reduction_factor=4), "", "Houlsby in a pre-norm decoder"),
    ("llama", "par_bn", None, ParBnConfig(reduction_factor=4), "", "beside the feed-forward"),
    ("mistral", "seq_bn", None, SeqBnConfig(reduction_factor=4), "", "sliding window"),
    ("mistral", "double_seq_bn", None, DoubleSeqBnConfig(reduction_factor=4), "", "sliding window"),
    ("gpt2", "seq_bn", None, SeqBnConfig(reduction_factor=4), "", "Pfeiffer"),
    ("gpt2", "seq_bn", "left", SeqBnConfig(reduction_factor=4), "_left", "padding on the left"),
    ("gpt2", "double_seq_bn", None, DoubleSeqBnConfig(reduction_factor=4), "", "Houlsby"),
    ("gpt2", "par_bn", None, ParBnConfig(reduction_factor=4), "", "beside the feed-forward"),
    ("gpt2_cls", "seq_bn", None, SeqBnConfig(reduction_factor=4), "", "the last token that is not the padding id"),
    ("t5", "seq_bn", None, SeqBnConfig(reduction_factor=4), "", "Pfeiffer on both sides"),
    ("t5", "double_seq_bn", None, DoubleSeqBnConfig(reduction_factor=4), "", "Houlsby; cross-attention has none"),
    ("t5", "par_bn", None, ParBnConfig(reduction_factor=4), "", "beside the feed-forward"),
    ("t5_flan", "double_seq_bn", "left", DoubleSeqBnConfig(reduction_factor=4), "_left", "gated; the encoder's padding on the left"),
    ("t5_uneven", "seq_bn", None, SeqBnConfig(reduction_factor=4, leave_out=[1]), "", "layers are counted through both sides"),
    ("vit", "seq_bn", None, SeqBnConfig(reduction_factor=4), "", "Pfeiffer, no classifier trained"),
    ("vit", "double_seq_bn", None, DoubleSeqBnConfig(reduction_factor=4), "", "Houlsby"),
    ("vit", "par_bn", None, ParBnConfig(reduction_factor=4), "", "beside the feed-forward"),
    ("vit_grey", "double_seq_bn", None, DoubleSeqBnConfig(reduction_factor=8), "", "one channel"),
]


def task_of(model):
    cls = zoo.MODELS_TABLE[model]["cls"]
    return next((t for suffix, t in TASKS.items() if cls.endswith(suffix)), "FEATURE_EXTRACTION")


def load(name):
    cls = getattr(transformers, zoo.MODELS_TABLE[name]["cls"])
    model = cls.from_pretrained(zoo.MODELS / name, torch_dtype=torch.float32, attn_implementation="eager").eval()
    adapters.init(model)
    return model


def attach(base, config, case):
    """The model with an active, randomly filled adapter; only the adapter trains."""
    model = load(base)
    model.add_adapter(NAME, config=copy.deepcopy(config))
    model.train_adapter(NAME)
    for key, p in model.named_parameters():
        p.requires_grad = f".{NAME}." in key
        if not p.requires_grad:
            continue
        is_gain = p.ndim == 1 and not key.endswith("bias")
        width = 0.25 if p.ndim == 1 else (3.0 / p.shape[1]) ** 0.5
        value = torch.from_numpy(rng("adapter", case, key).uniform(-width, width, tuple(p.shape))).float()
        p.data = value + 1.0 if is_gain else value
    return model.eval()


def save(model, path, base):
    """AdapterHub's form, keys of the configuration in a fixed order.

    The library's own safetensors writer refuses tensors that two keys share (a norm before the bottleneck), so its
    pickle is rewritten: such a tensor is then in the file under both keys.
    """
    model.save_adapter(str(path), NAME, with_head=False, use_safetensors=False)
    pickled = path / "pytorch_adapter.bin"
    write_tensors(path / "adapter.safetensors", torch.load(pickled, weights_only=True))
    pickled.unlink()
    config = path / "adapter_config.json"
    c = json.loads(config.read_text())
    c["model_name"] = f"models/{base}"
    write_json(config, c)


def reloaded(base, path, inputs):
    model = load(base)
    model.load_adapter(str(path), with_head=False, use_safetensors=True)
    model.set_active_adapters(NAME)
    return forward(model, inputs)


def write_case(base, method, variant, config, side, checks):
    name = f"{base}__{method}" + (f"_{variant}" if variant else "")
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / base / f"inputs{side}.safetensors")
    before = tensors_of(INPUTS / base / f"base_logits{side}.safetensors")["logits"]
    keep = logits_mask(before, inputs).bool()
    base_rel = relative(forward(load(base), inputs)[keep], before[keep])
    model = attach(base, config, name)
    logits, rel = forward_both(model, inputs)
    save(model, out / "adapter", base)
    meta = {"case": name, "model": base, "method": method, "variant": variant, "checks": checks, "task_type": task_of(base),
            "merge": False, "tolerance": TOLERANCE, "num_virtual_tokens": 0, "format": "adapterhub",
            "inputs": f"../../inputs/{base}/inputs{side}.safetensors" if side else None,
            "effect_rel": relative(logits, before), "adapters": "1.3.0", "transformers": transformers.__version__,
            "self_check": {"f32_f64_rel": rel, "base_rel": base_rel,
                           "reload_rel": relative(reloaded(base, out / "adapter", inputs)[keep], logits[keep])}}
    assert max(rel, base_rel) < 1e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


TRAINED = {
    "bert__seq_bn": ("bert", SeqBnConfig(reduction_factor=4), "padded"),
    "bert__double_seq_bn": ("bert", DoubleSeqBnConfig(reduction_factor=4), "full"),
    "bert__par_bn": ("bert", ParBnConfig(reduction_factor=4), "full"),
    "llama__seq_bn": ("llama", SeqBnConfig(reduction_factor=4), "padded"),
    "gpt2__seq_bn": ("gpt2", SeqBnConfig(reduction_factor=4), "padded"),
    "vit__seq_bn": ("vit", SeqBnConfig(reduction_factor=4), "images"),
}


def attempt(name, out, salt):
    base, config, kind = TRAINED[name]
    data = batches(name + salt, base, kind, 16)
    model = attach(base, config, "trajectory/" + name)
    save(copy.deepcopy(model), out / "init_adapter", base)
    expected = trajectory(model, data, zoo.is_causal(base))
    if not well_posed(expected):
        return False
    save(model, out / "final_adapter", base)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": base, "method": name.split("__")[1], "format": "adapterhub",
                                       "notes": "the head stays frozen", "adapters": "1.3.0", "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make():
    warnings.simplefilter("ignore")
    for row in TABLE:
        write_case(*row)
    for name in TRAINED:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
