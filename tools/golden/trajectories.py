"""Eight optimizer steps from a given adapter on given batches: losses, and the adapter at the end."""

import copy
import warnings

import peft
import transformers

import cases
import selective
import zoo
from adapters_io import save_adapter
from batches import batches
from common import TRAJECTORIES, fresh, write_json, write_tensors
from rows import case
from training import DEFAULTS, trajectory, well_posed

# name -> (model, kind of batches, options of training, method and its settings)
LORA = dict(r=4, lora_alpha=8)
TABLE = {
    "llama__lora": ("llama", "full", {}, "lora", LORA),
    "llama__lora_all_linear": ("llama", "padded", {}, "lora", dict(LORA, target_modules="all-linear")),
    "llama__lora_rslora_patterns": ("llama", "full", {}, "lora", dict(
        LORA, use_rslora=True, target_modules=cases.LINEARS, rank_pattern={"q_proj": 7, "layers.1.mlp.up_proj": 2},
        alpha_pattern={"v_proj": 3})),
    "llama__ia3": ("llama", "full", dict(learning_rate=5e-3), "ia3", {}),
    "llama__prompt": ("llama", "full", dict(learning_rate=1e-2), "prompt", dict(num_virtual_tokens=5)),
    "llama__prefix": ("llama", "full", dict(learning_rate=1e-2), "prefix", dict(num_virtual_tokens=4)),
    "llama_bias__lora_bias_all": ("llama_bias", "padded", {}, "lora", dict(LORA, bias="all", target_modules=["q_proj", "up_proj"])),
    "qwen2__lora": ("qwen2", "padded", {}, "lora", dict(LORA, target_modules=cases.LINEARS)),
    "mistral__lora": ("mistral", "full", {}, "lora", LORA),
    "bert__lora": ("bert", "padded", {}, "lora", LORA),
    "bert__prompt": ("bert", "padded", dict(learning_rate=1e-2), "prompt", dict(num_virtual_tokens=4)),
    "bert__bitfit": ("bert", "padded", {}, "bitfit", {}),
    "bert_mlm__lora": ("bert_mlm", "uneven", {}, "lora", dict(LORA, target_modules=["query", "value"])),
    "roberta__lora": ("roberta", "padded", {}, "lora", LORA),
    "roberta_token__lora": ("roberta_token", "uneven", {}, "lora", LORA),
    "llama__lora_accumulation": ("llama", "uneven", dict(gradient_accumulation=2), "lora", LORA),
    "llama__lora_linear_decay_clip": ("llama", "full", dict(
        weight_decay=0.1, schedule="linear", warmup_ratio=0.25, max_grad_norm=0.5, learning_rate=5e-3), "lora", LORA),
    "llama__lora_cosine": ("llama", "full", dict(schedule="cosine", warmup_ratio=0.25, learning_rate=5e-3), "lora", LORA),
    "bert__lora_linear": ("bert", "full", dict(schedule="linear", learning_rate=5e-3, weight_decay=0.01, max_grad_norm=1.0), "lora", LORA),
    "gpt2__lora": ("gpt2", "full", {}, "lora", LORA),
    "gpt2__lora_bias_lora_only": ("gpt2", "padded", {}, "lora", dict(LORA, bias="lora_only", target_modules=["c_proj", "c_fc"])),
    "gpt2__prompt": ("gpt2", "padded", dict(learning_rate=1e-2), "prompt", dict(num_virtual_tokens=4)),
    "gpt2_cls__lora": ("gpt2_cls", "padded", {}, "lora", LORA),
    "t5__lora": ("t5", "ragged", {}, "lora", LORA),
    "t5__lora_accumulation": ("t5", "ragged", dict(gradient_accumulation=2), "lora", dict(LORA, target_modules="all-linear")),
    "t5__prefix": ("t5", "ragged", dict(learning_rate=1e-2), "prefix", dict(num_virtual_tokens=4)),
    "t5__prompt": ("t5", "ragged", dict(learning_rate=1e-2), "prompt", dict(num_virtual_tokens=4)),
    "t5_flan__ia3": ("t5_flan", "ragged", dict(learning_rate=5e-3), "ia3", {}),
    "vit__lora": ("vit", "images", {}, "lora", dict(LORA, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])),
    "vit__bitfit": ("vit", "images", {}, "bitfit", {}),
    "vit__head": ("vit", "images", {}, "head", {}),
    "dinov2__lora": ("dinov2", "images", {}, "lora", dict(LORA, target_modules=["fc1", "k_proj"], modules_to_save=["classifier"])),
    "post_vit__lora": ("post_vit", "images", {}, "lora", dict(LORA, target_modules=["fc1", "fc2"], modules_to_save=["classifier"])),
    "post_vit__head": ("post_vit", "images", {}, "head", {}),
}


def prepared(name, model, method, settings):
    """The model with its start adapter, and the way to save it."""
    if method in ("bitfit", "head"):
        biases = [] if method == "head" else None
        m = selective.attach(zoo.load(model), biases, ["classifier"], "trajectory/" + name)
        return m, lambda m, path: selective.save(m, path, model, method, cases.task_of(model), biases, ["classifier"])
    c = case(model, method, "trajectory_" + name, "", **settings)
    m = cases.attach(c, zoo.load(model))
    if method == "prompt" and zoo.is_causal(model):
        m.predicts_first = True
    return m, lambda m, path: save_adapter(m, path, model)


def attempt(name, out, salt):
    """Writes one trajectory; false where its batches, drawn with `salt`, make rounding visible."""
    model, kind, options, method, settings = TABLE[name]
    o = {**DEFAULTS, **options}
    data = batches(name + salt, model, kind, o["steps"] * o["batch_size"] * o["gradient_accumulation"])
    m, save = prepared(name, model, method, settings)
    save(copy.deepcopy(m), out / "init_adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = trajectory(m, data, zoo.is_causal(model), **options)
    if not well_posed(expected):
        return False
    save(m, out / "final_adapter")
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": model, "method": method, "notes": None,
                                       "peft": peft.__version__, "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}, "
          f"unmoved {expected['unmoved_tensors']}, rounding only {expected['rounding_only_tensors']}", flush=True)
    return True


def make():
    for name in TABLE:
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
