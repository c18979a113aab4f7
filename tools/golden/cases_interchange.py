"""Files of `peft` at the edges of its format, saved as `save_pretrained` saves by default: with the copies of tables that are
adapted, and with what belongs to the model in the model's own type.

`peft` merges wrongly where an adapted table shares its tensor: it adds to the tensor in place, so that all that share it
change. Cases of T5's tables and of tied heads therefore have no merged logits; Engraft gives each its own tensor.

Models in half precision are adapted and saved in it; the logits are those of the saved adapter on the same weights in f32.
"""

import copy
import warnings

import peft
import torch
import transformers

import adapters_io
import cases
import trajectories
import zoo
from adapters_io import fill_adapter, save_adapter
from common import TRAJECTORIES as PLACE
from common import CASES, INPUTS, MODELS, TOLERANCE, forward, forward_both, fresh, logits_mask, relative, rng, tensors_of, write_json, write_logits
from rows import case, lora

NO_TASK = dict(task_type=None)

TABLE = [
    # Tables and heads, and which of them are copied.
    lora("t5", "encoder_table", "one table of three that share a tensor", merge=False, target_modules=["encoder.embed_tokens"]),
    lora("t5", "shared", "the module that nothing reads, kept in the file", merge=False, target_modules=["q", "shared"]),
    lora("t5", "shared_head", "its copy beside the head's", merge=False, target_modules=["shared", "lm_head"]),
    case("t5", "hira", "shared", "the module that nothing reads", False, target_modules=["q", "k", "v", "o", "wi", "wo", "shared"], r=4),
    case("t5", "oft", "shared", "the module that nothing reads", False, target_modules=["q", "shared"], r=4, oft_block_size=0),
    lora("t5", "shared_alone", "nothing but the module that nothing reads", merge=False, target_modules=["shared"]),
    lora("t5", "parameters_shared_alone", "nothing but its matrix", merge=False, target_modules=[], target_parameters=["shared.weight"]),
    lora("t5", "parameters_shared", "its matrix beside a module", merge=False, target_modules=["q"], target_parameters=["shared.weight"]),
    lora("t5", "whole_shared", "trained as a whole beside a module", merge=False, target_modules=["v"], modules_to_save=["shared"]),
    lora("t5", "tokens_shared", "rows of the table by its name", merge=False, target_modules=["v"], trainable_token_indices={"shared": [5, 40]}),
    case("t5", "hira", "shared_alone", "nothing but the module that nothing reads", False, target_modules=["shared"], r=4),
    case("t5", "trainable_tokens", "shared", "rows of the table by its name", False, target_modules=["shared"], token_indices=[5, 40]),
    lora("gpt2", "table_head", "both are copied, since the head is called so", merge=False, target_modules=["wte", "lm_head"]),
    lora("llama", "pattern_of_tables", "a pattern that does not say the name it matches", target_modules=r".*(embed_\w+|q_proj)"),
    lora("llama", "excluded_table", "excluded, and yet no other is", target_modules=r".*(lm_\w+|embed_tokens)",
         exclude_modules=["embed_tokens"]),
    lora("llama", "whole_table", "a table that is trained whole is not copied", target_modules=["lm_head", "q_proj"],
         modules_to_save=["embed_tokens"]),
    lora("qwen2", "tied_copies", "copies of a table and of the head that follows it", merge=False, ensure_weight_tying=True,
         target_modules=["embed_tokens", "q_proj"]),
    # Numbers of the model's own type.
    lora("llama_bf16", "whole", "a head, a norm and the copy of a table in bf16", target_modules=["embed_tokens", "q_proj"],
         modules_to_save=["lm_head", "norm"]),
    lora("llama_f16", "whole", "a norm in f16", target_modules=["q_proj"], modules_to_save=["norm"]),
    lora("bert_bf16", "bias", "biases and classifier in bf16", bias="all", target_modules=["query"]),
    case("bert_bf16", "ln_tuning", None, "norms in bf16 (`peft` merges it without the classifier)", False, target_modules=["LayerNorm"]),
    case("bert_bf16", "oft", "bias", "the biases of the targets in bf16", bias="oft_only", r=4, oft_block_size=0, target_modules=["value"]),
    case("bert_bf16", "glora", None, "the zeros of paths that are off in bf16", r=2, config_D_E="none", target_modules=["query"]),
    case("bert_bf16", "prompt", None, "rows in f32 beside a classifier in bf16", False, num_virtual_tokens=2),
    # Keys of tensors and of the configuration.
    lora("roberta", "bias_all", "biases of a module with modules in it, trained whole", merge=False, bias="all", target_modules=["query"]),
    lora("bert", "no_task", "no task, and so no classifier", target_modules=["query"], **NO_TASK),
    lora("bert", "features", "a task that the model's class does not have", target_modules=["query"], task_type="FEATURE_EXTRACTION"),
    lora("qwen2", "look_around", "patterns that look ahead and back", target_modules=r"model\.layers\.(?!0)\d+\.self_attn\.(q|k)_proj",
         rank_pattern={r"(?<!x)\.q_proj|q_proj": 2}, exclude_modules=r".*(?=k_proj)k_\w+"),
    lora("qwen2", "empty", "lists and tables that are given and empty", target_modules=["q_proj"], exclude_modules=[], modules_to_save=[],
         layers_to_transform=[], layers_pattern=[], target_parameters=[], rank_pattern={}),
    case("llama", "osf", "empty", "lists and tables that are given and empty", effective_rank=10, target_modules=["k_proj"],
         modules_to_save=[], rank_pattern={}),
    lora("qwen2", "one_layer", "a number and a text in the place of lists", target_modules=["q_proj"], layers_to_transform=1,
         layers_pattern="layers"),
    lora("qwen2", "layer_list", "a list of one name; a module named in full in another layer", target_modules=["q_proj",
         "model.layers.0.self_attn.v_proj"], layers_to_transform=[1], layers_pattern=["layers"]),
    lora("llama", "negative_alpha", "factors of 0 and below", target_modules=["q_proj", "k_proj", "v_proj"],
         alpha_pattern={"q_proj": -2, "k_proj": 0}),
    lora("llama", "all_dropped", "a dropout of 1", target_modules=["q_proj"], lora_dropout=1.0),
    # Rows of tables beside the factors.
    lora("llama", "tokens", "rows of the table beside factors", target_modules=["q_proj"], trainable_token_indices=[3, 70, 11]),
    lora("llama_tied", "tokens", "a tied head follows", merge=False, target_modules=["q_proj"], trainable_token_indices=[9, 4]),
    lora("qwen2", "tokens_apart", "table and head with rows of their own", merge=False, target_modules=["v_proj"],
         trainable_token_indices={"embed_tokens": [9, 4], "lm_head": [30]}),
    lora("t5", "tokens", "all that share the tensor follow", merge=False, target_modules=["v"], trainable_token_indices=[5, 40]),
    lora("bert", "tokens", "a table named, under a classifier", target_modules=["query"], trainable_token_indices={"word_embeddings": [60, 7]}),
    case("llama", "trainable_tokens", "twice", "of a row that is named twice the last counts", token_indices=[30, 9, 30]),
    # Other methods.
    case("llama", "oft", "ones", "blocks of one input turn nothing and have no numbers", r=0, oft_block_size=4, target_modules=["q_proj", "down_proj"]),
    case("llama", "oft", "ones_shared", "blocks of one input that share what they do not have", r=0, oft_block_size=1, block_share=True,
         use_cayley_neumann=False, target_modules=["k_proj"], modules_to_save=["lm_head"]),
    case("vit", "boft", "convolution", "the windows of a convolution are turned", target_modules=["projection", "q_proj"],
         boft_block_size=4, modules_to_save=["classifier"], **NO_TASK),
    case("llama", "boft", "one_of_two", "two factors asked for, one made", boft_n_butterfly_factor=2, boft_block_size=4,
         target_modules=["q_proj"]),
    case("llama", "osf", "unused", "a key that is kept and not looked at", effective_rank=10, target_modules=["k_proj"],
         target_svd_config={"k_proj": 3}),
    case("llama", "osf", "nothing_left", "every direction is kept in one module", effective_rank=30, target_modules=["q_proj", "k_proj"],
         rank_pattern={"k_proj": 1000}),
    *(case("llama", "peanut", name, "an activation", act_fn=name, r=4, depth=1, target_modules=["v_proj"])
      for name in ("leaky_relu", "relu6", "mish", "hardswish", "laplace", "xielu", "sqrtsoftplus")),
    # Methods that came with the last versions.
    case("llama", "tinylora", None, "a vector for each target", u=8),
    case("llama", "tinylora", "tied", "P from its seed, vectors shared", u=5, r=3, weight_tying=0.6, save_projection=False,
         projection_seed=7, target_modules=["q_proj", "k_proj", "down_proj"]),
    case("llama", "tinylora", "table", "a table and a head", u=8, r=4, target_modules=["embed_tokens", "lm_head"]),
    case("gpt2", "tinylora", None, "a matrix that the file stores transposed", u=16, r=8, target_modules=["c_attn", "c_fc"]),
    case("bert", "tinylora", "bias", "biases of the targets and a classifier", u=8, bias="tinylora_only"),
    case("t5", "tinylora", "odd", "fewer numbers in P than PyTorch draws together", u=3, r=2, save_projection=False),
    case("bert_bf16", "tinylora", None, "all of it in f32 over a model in bf16", u=8),
    case("llama", "supertuning", None, "the largest entries", sparsity=0.8, target_modules=["q_proj", "v_proj", "down_proj"]),
    case("qwen2", "supertuning", "supra", "a LoRA beside them", sparsity=0.9, r=4, lora_alpha=6, lora_dropout=0.1),
    case("bert", "supertuning", "bottom", "the smallest entries, found again in the base", sparsity=0.5, select_top=False,
         save_precomputed_indices=False, target_modules=["query", "key", "value"]),
    case("vit", "supertuning", None, "a classifier trained whole", sparsity=0.7, modules_to_save=["classifier"], target_modules=["q_proj", "fc1"]),
    case("t5", "supertuning", "supra", "encoder and decoder", sparsity=0.9, r=2),
]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Starts that change the base, which `peft` rounds to the base's type: logits of `peft` computing in bf16.
HALF = [
    lora("llama_bf16", "pissa_half", "a base without its largest directions", False, r=8, lora_alpha=8, init_lora_weights="pissa", target_modules=ALL),
    lora("llama_bf16", "olora_half", "a base without a share of itself", False, r=8, lora_alpha=16, init_lora_weights="olora", target_modules=ALL),
    lora("llama_bf16", "kasa_half", "a base without its smallest directions", False, r=8, lora_alpha=8, kasa_config=peft.KasaConfig(), target_modules=ALL),
    case("llama_bf16", "osf", "half", "a base in two parts", False, effective_rank=16, target_modules=ALL),
]
# name -> (model, kind of batches, options of training, method and its settings), as in trajectories.py
TRAJECTORIES = {
    "llama__tinylora": ("llama", "full", {}, "tinylora", dict(u=8, r=4, weight_tying=0.5, target_modules=["q_proj", "k_proj", "down_proj"])),
    "llama__supertuning": ("llama", "full", {}, "supertuning", dict(sparsity=0.9)),
    "bert__supertuning_supra": ("bert", "padded", {}, "supertuning", dict(sparsity=0.95, r=2)),
    "llama__lora_tokens": ("llama", "full", {}, "lora", dict(r=4, target_modules=["q_proj"], trainable_token_indices=[30, 9, 52, 71])),
}
BOUNDS = {"tinylora_v": (False, 0.6), "supertuning_values": (False, 0.2)}

CONFIGS = {"lora": peft.LoraConfig, "hira": peft.HiraConfig, "oft": peft.OFTConfig, "boft": peft.BOFTConfig, "osf": peft.OSFConfig,
           "ln_tuning": peft.LNTuningConfig, "glora": peft.GloraConfig, "prompt": peft.PromptTuningConfig, "peanut": peft.PeanutConfig,
           "trainable_tokens": peft.TrainableTokensConfig, "tinylora": peft.TinyLoraConfig, "supertuning": peft.SupertuningConfig}


def base_of(name, own_type):
    """The model, in f32 or in the type of its files."""
    model = zoo.load(name)
    return type(model).from_pretrained(MODELS / name, attn_implementation="eager").eval() if own_type else model


def attach(c):
    config = {"task_type": cases.task_of(c["model"]), **copy.deepcopy(c["config"])}
    base = base_of(c["model"], own_type=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, CONFIGS[c["method"]](**config))
    tensors = lambda: [*model.named_parameters(), *model.named_buffers()]  # noqa: E731
    types = {key: p.dtype for key, p in tensors()}
    model.float()  # drawn in f32, as elsewhere
    fill_adapter(model, cases.label(c))
    for key, p in tensors():
        p.data = p.data.to(types[key])
    return cases.tied(model).eval()


def write_case(c):
    name, side = cases.label(c), c["side"]
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / c["model"] / f"inputs{side}.safetensors")
    base = tensors_of(INPUTS / c["model"] / f"base_logits{side}.safetensors")["logits"]
    model = attach(c)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(model, out / "adapter", c["model"], save_embedding_layers="auto")
        read = cases.tied(peft.PeftModel.from_pretrained(zoo.load(c["model"]), out / "adapter")).float().eval()
    logits, rel = forward_both(read, inputs)
    keep = logits_mask(logits, inputs).bool()
    half = next(model.parameters()).dtype != torch.float32
    meta = {
        "case": name, "model": c["model"], "method": c["method"], "variant": c["variant"], "checks": c["checks"], "merge": c["merge"],
        "tolerance": TOLERANCE, "num_virtual_tokens": c["config"].get("num_virtual_tokens", 0), "inputs": None, "copies_of_tables": True,
        "effect_rel": relative(logits, base), "peft": peft.__version__, "transformers": transformers.__version__,
        "self_check": {"f32_f64_rel": rel},
    }
    if not half:
        meta["self_check"]["reload_rel"] = relative(forward(model, inputs)[keep], logits[keep])
        assert meta["self_check"]["reload_rel"] < 1e-6, meta
    assert rel < 1e-5, meta
    assert (0.01 < meta["effect_rel"]) != name.endswith("shared_alone"), meta
    if c["merge"]:
        write_logits(out / "merged_logits.safetensors", cases.merged(read, c, logits, inputs, meta), inputs)
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def write_half(c):
    """Logits of `peft` in the base's own type. They may be off by 1.5 times what the same changed base gives in f32."""
    name, out = cases.label(c), fresh(CASES / cases.label(c))
    inputs = tensors_of(INPUTS / c["model"] / "inputs.safetensors")
    base = tensors_of(INPUTS / c["model"] / "base_logits.safetensors")["logits"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(base_of(c["model"], True), CONFIGS[c["method"]](task_type="CAUSAL_LM", **copy.deepcopy(c["config"])))
        for key, p in model.named_parameters():
            if p.requires_grad:  # near the start, as after training
                off = torch.from_numpy(rng("adapter", name, key).uniform(-1, 1, tuple(p.shape))).float()
                p.data = (p.data.float() + 0.15 * max(float(p.data.float().std()), 0.02) * off).to(p.dtype)
        save_adapter(model, out / "adapter", c["model"])
        read = lambda own: peft.PeftModel.from_pretrained(base_of(c["model"], own), out / "adapter").eval()  # noqa: E731
        half, rounded, exact = (forward(m, inputs).float() for m in (read(True), read(True).float(), read(False)))
    keep = logits_mask(half, inputs).bool()
    for t in (half, rounded, exact):
        t[~keep] = 0.0
    noise = relative(rounded, half)
    meta = {"case": name, "model": c["model"], "method": c["method"], "variant": c["variant"], "checks": c["checks"], "merge": False,
            "tolerance": 1.5 * noise, "num_virtual_tokens": 0, "inputs": None, "effect_rel": relative(exact, base),
            "peft": peft.__version__, "transformers": transformers.__version__,
            "self_check": {"bf16_f32_rel": noise, "base_not_rounded_rel": relative(exact, half), "rounding_rel": relative(exact, rounded)}}
    assert meta["effect_rel"] > 0.01, meta
    write_logits(out / "logits.safetensors", half, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def make(only=""):
    adapters_io.BOUNDS.update(BOUNDS)
    cases.CONFIGS.update({name: CONFIGS[name] for name in ("tinylora", "supertuning")})
    trajectories.TABLE.update(TRAJECTORIES)
    for c in TABLE:
        if only in cases.label(c):
            write_case(c)
    for c in HALF:
        if only in cases.label(c):
            write_half(c)
    for name in TRAJECTORIES:
        if only in name and not any(trajectories.attempt(name, fresh(PLACE / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")


if __name__ == "__main__":
    import sys
    make(*sys.argv[1:])
