"""Logits of a model with a random adapter of `peft`, and of the merged model where the method merges."""

import copy
import tempfile
import warnings
from pathlib import Path

import peft
import transformers

import cases_gpt2
import cases_t5
import cases_vit
import zoo
from adapters_io import fill_adapter, save_adapter
from common import CASES, INPUTS, TOLERANCE, forward, forward_both, fresh, logits_mask, relative, tensors_of, write_json, write_logits
from rows import ia3, lora, virtual

TASKS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
         "ForMaskedLM": None, "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
         "ForImageClassification": None, "WithTeacher": None, "Model": "FEATURE_EXTRACTION"}


def task_of(model):
    cls = zoo.MODELS_TABLE[model]["cls"]
    return next(t for suffix, t in TASKS.items() if cls.endswith(suffix))


BERT_ALL = ["query", "key", "value", "dense"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

TABLE = [
    lora("llama", None, "default targets (q_proj, v_proj), alpha / r"),
    lora("llama", "left", "the same with padding on the left", side="_left"),
    lora("llama", "rank_1", "rank one, fractional alpha", r=1, lora_alpha=3),
    lora("llama", "all_linear", "every linear but the head", target_modules="all-linear"),
    lora("llama", "rslora", "alpha / sqrt(r)", use_rslora=True, r=5, lora_alpha=6),
    lora("llama", "patterns", "rank and alpha by module; the longest suffix or regular expression decides",
         target_modules=LINEARS, rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.up_proj": 7, "^model.layers.2.self_attn.v_proj": 3},
         alpha_pattern={"k_proj": 5, r"layers\.0\.self_attn\.q_proj": 1, "down_proj": 20}),
    lora("llama", "rslora_patterns", "sqrt of each module's own rank", use_rslora=True, rank_pattern={"q_proj": 9},
         alpha_pattern={"v_proj": 3}),
    lora("llama", "layers", "only layers 0 and 2", target_modules=LINEARS, layers_to_transform=[0, 2]),
    lora("llama", "layers_pattern", "one layer, named by pattern", layers_to_transform=1, layers_pattern="layers",
         target_modules=["q_proj", "up_proj"]),
    lora("llama", "exclude", "a list of excluded suffixes", target_modules=LINEARS, exclude_modules=["k_proj", "layers.1.mlp.gate_proj"]),
    lora("llama", "exclude_regex", "an excluding regular expression", target_modules="all-linear",
         exclude_modules=r".*layers\.[02]\.mlp.*"),
    lora("llama", "regex", "targets by regular expression", target_modules=r".*\.(0|2)\.self_attn\.(q|o)_proj"),
    lora("llama", "suffix_path", "targets by longer suffixes", target_modules=["self_attn.q_proj", "1.mlp.down_proj"]),
    lora("llama", "embed", "the embedding table", target_modules=["embed_tokens", "q_proj"]),
    lora("llama", "head", "the output head", target_modules=["lm_head", "v_proj"]),
    lora("llama", "save_embed", "whole copies of embedding and head", modules_to_save=["embed_tokens", "lm_head"]),
    lora("llama", "save_norm", "whole copies of every norm gain", modules_to_save=["input_layernorm", "norm"]),
    lora("llama", "lora_bias", "B with a bias on linears without one", merge=False, lora_bias=True),
    lora("llama_bias", None, "linears with biases", target_modules=LINEARS),
    lora("llama_bias", "bias_all", "every bias of the model trained", bias="all"),
    lora("llama_bias", "bias_lora_only", "biases of adapted linears trained", bias="lora_only", target_modules=["q_proj", "down_proj"]),
    lora("llama_bias", "lora_bias", "B with a bias, merged into the linear's bias", lora_bias=True, target_modules=["q_proj", "down_proj"]),
    lora("llama_tied", None, "tied head", target_modules="all-linear"),
    lora("llama_tied", "embed", "tied table adapted at the input only", merge=False, target_modules=["embed_tokens", "v_proj"]),
    lora("llama_tied", "embed_tying", "one pair of factors at the table and, transposed, at the tied head (peft merges them twice)",
         merge=False, ensure_weight_tying=True, target_modules=["embed_tokens", "v_proj"]),
    lora("llama_tied", "save_tying", "one whole copy of the table for the tied head too", ensure_weight_tying=True,
         modules_to_save=["embed_tokens"]),
    lora("llama_mha", None, "head_dim * heads differs from the width", target_modules=LINEARS),
    lora("llama_rope_yarn", None, "yarn"),
    lora("llama_rope_dynamic", None, "dynamic rope"),
    lora("llama_bf16", None, "a checkpoint stored in bf16, computed in f32", merge=False),
    lora("llama_sharded", None, "a sharded checkpoint", target_modules=LINEARS),
    lora("mistral", None, "sliding window", target_modules=LINEARS),
    lora("qwen2", None, "biases on q, k, v; tied head", target_modules=LINEARS),
    lora("qwen2", "bias_all", "every bias of the model trained", bias="all", target_modules=["q_proj", "o_proj"]),
    lora("qwen2_sliding", "left", "sliding layers, padding on the left", side="_left"),
    lora("qwen3", None, "norms on queries and keys", target_modules=LINEARS),
    lora("bert", None, "default targets (query, value), trained classifier"),
    lora("bert", "left", "the same with padding on the left and no token types", side="_left"),
    lora("bert", "all_linear", "every linear but the classifier, the pooler too", target_modules="all-linear"),
    lora("bert", "bias_all", "biases of linears and norms", bias="all"),
    lora("bert", "bias_lora_only", "biases of adapted linears", bias="lora_only", target_modules=BERT_ALL),
    lora("bert", "embed", "word and position tables", target_modules=["word_embeddings", "position_embeddings", "query"]),
    lora("bert", "save_norm", "pooler and norms trained whole", modules_to_save=["pooler", "LayerNorm", "classifier"]),
    lora("bert_gelu_new", None, "tanh GELU", target_modules=["intermediate.dense", "output.dense"]),
    lora("bert_token", None, "token head trained"),
    lora("bert_mlm", None, "masked LM, no task type", target_modules=["query", "value", "transform.dense"]),
    lora("bert_mlm", "save_head", "the head trained whole: its decoder is a copy that is no longer tied", merge=False,
         modules_to_save=["cls"]),
    lora("bert_mlm", "save_decoder", "the decoder alone, with the bias that lies beside it", merge=False, modules_to_save=["decoder"]),
    lora("bert_encoder", None, "sentence embedding", target_modules=BERT_ALL),
    lora("roberta", None, "classifier of two layers trained"),
    lora("roberta_token", None, "token head trained", target_modules=BERT_ALL, layers_to_transform=[1]),
    lora("roberta_mlm", None, "masked LM, no task type", target_modules=["key", "lm_head.dense"]),
    ia3("llama", None, "default k_proj, v_proj, down_proj"),
    ia3("llama", "attention", "no feed-forward: scales of outputs only", target_modules=["k_proj", "v_proj", "o_proj"], feedforward_modules=[]),
    ia3("llama", "feedforward", "feed-forward only: scales of inputs", target_modules=["down_proj", "up_proj"],
        feedforward_modules=["down_proj", "up_proj"]),
    ia3("llama_bias", None, "an output scale comes before the bias is scaled too", target_modules=["q_proj", "down_proj"],
        feedforward_modules=["down_proj"]),
    ia3("mistral", None, "default targets"),
    ia3("qwen2", None, "default targets with biases"),
    ia3("bert", None, "default key, value, output.dense"),
    ia3("bert", "attention", "key and value only", target_modules=["key", "value"], feedforward_modules=[]),
    ia3("roberta", None, "default key, value, output.dense (peft cannot merge beside a classifier of two layers)", merge=False),
    virtual("llama", "prompt", None, "soft prompt before the input embeddings", tokens=5),
    virtual("llama", "prompt", "left", "prompt before the padding", side="_left"),
    virtual("llama_tied", "prompt", None, "tied head", tokens=1),
    virtual("qwen2", "prompt", None, "tied head"),
    virtual("mistral", "prompt", None, "the window slides past the prompt"),
    virtual("llama_rope_dynamic", "prompt", None, "the prompt counts as length"),
    virtual("bert", "prompt", None, "the pooler reads the first virtual token"),
    virtual("bert_token", "prompt", None, "virtual positions cut off"),
    virtual("roberta", "prompt", None, "positions of given embeddings", tokens=3),
    virtual("llama", "prefix", None, "keys and values under grouped-query attention"),
    virtual("llama", "prefix", "left", "prefix before the padding", side="_left"),
    virtual("llama_mha", "prefix", None, "explicit head size", tokens=3, token_dim=48, num_attention_heads=4),
    virtual("qwen2", "prefix", None, "grouped-query attention with biases"),
    virtual("qwen3", "prefix", None, "prefix keys are not normalised", token_dim=32, num_attention_heads=2),
    virtual("mistral", "prefix", None, "sliding window and one key head", tokens=3),
    virtual("bert", "prefix", None, "bidirectional, absolute positions"),
    virtual("bert_token", "prefix", None, "token head"),
    virtual("roberta", "prefix", None, "bidirectional, absolute positions"),
    *cases_gpt2.TABLE, *cases_t5.TABLE, *cases_vit.TABLE,
]

CONFIGS = {"lora": peft.LoraConfig, "ia3": peft.IA3Config, "prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}


def label(c):
    return f"{c['model']}__{c['method']}" + (f"_{c['variant']}" if c["variant"] else "")


def attach(c, base):
    config = CONFIGS[c["method"]](task_type=task_of(c["model"]), **copy.deepcopy(c["config"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    fill_adapter(model, label(c))
    return tied(model).eval()


def tied(model):
    """Filled tensor by tensor, the factors of a tied head are no longer those of the table, transposed: they are again."""
    table = model.get_input_embeddings()
    for m in model.modules():
        # Besides, `peft` keeps what it tied as tensors that cannot be copied.
        if getattr(m, "kwargs", {}).pop("tied_adapter", None):
            m.lora_A["default"].weight.data = table.lora_embedding_B["default"].data.t().contiguous()
            m.lora_B["default"].weight.data = table.lora_embedding_A["default"].data.t().contiguous()
    return model


def positions(model, inputs):
    """The positions that the pass gives to the last row, virtual tokens included where they have any."""
    seen = []

    def hook(module, args, kwargs):
        at = kwargs.get("position_ids", args[-1] if args else None)
        if at is not None and not at.is_floating_point():
            seen.append([int(v) for v in at[-1]])

    model = copy.deepcopy(model)
    for name, m in model.named_modules():
        if name.endswith(("rotary_emb", "position_embeddings", "wpe")):
            m.register_forward_pre_hook(hook, with_kwargs=True)
    forward(model, inputs)
    return seen[0]


def merged(model, c, want, inputs, meta):
    """Logits after merging, from the model in memory and from its saved form."""
    plain = copy.deepcopy(model).merge_and_unload()
    logits = forward(plain, inputs)
    keep = logits_mask(logits, inputs).bool()
    with tempfile.TemporaryDirectory() as d:
        plain.save_pretrained(d)
        again = forward(type(plain).from_pretrained(d, attn_implementation="eager"), inputs)
    meta["self_check"]["merge_rel"] = relative(logits[keep], want[keep])
    meta["self_check"]["merge_reload_rel"] = relative(again[keep], logits[keep])
    meta["merge_tolerance"] = TOLERANCE
    assert meta["self_check"]["merge_rel"] < 1e-5 and meta["self_check"]["merge_reload_rel"] < 1e-6, meta
    logits[~keep] = 0.0
    return logits


def write_case(c):
    name, side = label(c), c["side"]
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / c["model"] / f"inputs{side}.safetensors")
    base = tensors_of(INPUTS / c["model"] / f"base_logits{side}.safetensors")["logits"]
    model = attach(c, zoo.load(c["model"]))
    logits, rel = forward_both(model, inputs)
    save_adapter(model, out / "adapter", c["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = forward(tied(peft.PeftModel.from_pretrained(zoo.load(c["model"]), out / "adapter")), inputs)
    keep = logits_mask(logits, inputs).bool()
    meta = {
        "case": name, "model": c["model"], "method": c["method"], "variant": c["variant"], "checks": c["checks"],
        "task_type": task_of(c["model"]), "merge": c["merge"], "tolerance": TOLERANCE,
        "num_virtual_tokens": c["config"].get("num_virtual_tokens", 0),
        "inputs": f"../../inputs/{c['model']}/inputs{side}.safetensors" if side else None,
        "effect_rel": relative(logits, base), "peft": peft.__version__, "transformers": transformers.__version__,
        "self_check": {"f32_f64_rel": rel, "reload_rel": relative(again[keep], logits[keep])},
    }
    assert rel < 1e-5 and meta["self_check"]["reload_rel"] < 1e-6, meta
    assert 0.01 < meta["effect_rel"], meta
    if task_of(c["model"]) == "SEQ_2_SEQ_LM" and meta["num_virtual_tokens"]:
        meta.update(cases_t5.places(model, c["method"]))
    elif meta["num_virtual_tokens"]:
        meta["positions_of_last_row"] = positions(model, inputs)
    if c["merge"]:
        write_logits(out / "merged_logits.safetensors", merged(model, c, logits, inputs, meta), inputs)
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def make():
    for c in TABLE:
        write_case(c)
