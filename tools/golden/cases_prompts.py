"""Cases and trajectories of prompts, of several tasks too, prefixes and prompts in attention, from `peft`.

P-tuning and a projected prefix train a network and save what it makes: their trajectories say in `settings` what the recipe
says, `init_adapter` holds the network by the names of its tensors, and `final_adapter` is `peft`'s file. No tokenizer lies
beside the tiny models: where a prompt starts as a text, the letters' numbers stand for its tokens.
"""

import copy
import json
import warnings

import peft
import torch
import transformers

import adapters_io
import cases
import zoo
from adapters_io import save_adapter, trainable
from batches import batches
from common import CASES, INPUTS, TRAJECTORIES, fresh, rng, write_json, write_tensors
from rows import case, virtual
from training import DEFAULTS, trajectory, well_posed

CONFIGS = {"p_tuning": peft.PromptEncoderConfig, "llama_adapter": peft.AdaptionPromptConfig, "mpt": peft.MultitaskPromptTuningConfig}
BOUNDS = {
    "mlp_head": (False, 0.4), "lstm_head": (False, 0.6), "prompt_encoder.default.transform": (False, 0.4),
    "adaption_prompt": (False, 1.5), "adaption_gate": (False, 0.9), "prefix_task_": (False, 1.2),
}
LSTM = dict(encoder_reparameterization_type="LSTM")
TEXT = dict(prompt_tuning_init="TEXT", prompt_tuning_init_text="good or bad")


def adapter(model, variant, checks, side="", **config):
    return case(model, "llama_adapter", variant, checks, False, side, **{"adapter_len": 4, "adapter_layers": 2, **config})


TABLE = [
    virtual("llama", "p_tuning", None, "a perceptron as wide as the model"),
    virtual("llama", "p_tuning", "left", "the same with padding on the left", side="_left", encoder_hidden_size=10),
    virtual("llama", "p_tuning", "lstm", "two recurrent layers", encoder_hidden_size=10, **LSTM),
    virtual("qwen2", "p_tuning", "lstm", "one recurrent layer with dropout", encoder_num_layers=1, encoder_dropout=0.1, **LSTM),
    virtual("qwen3", "p_tuning", None, "norms on queries and keys", tokens=1),
    virtual("gpt2", "p_tuning", None, "learned positions"),
    virtual("gpt2", "p_tuning", "left", "the same with padding on the left", side="_left", **LSTM),
    virtual("bert", "p_tuning", None, "trained classifier"),
    virtual("roberta", "p_tuning", "lstm", "a classifier of two layers", encoder_hidden_size=7, **LSTM),
    virtual("bert_token", "p_tuning", None, "virtual positions cut off", encoder_hidden_size=12),
    virtual("t5", "p_tuning", None, "twice the rows, half of them read"),
    virtual("t5", "p_tuning", "lstm", "the recurrent layers read all of them", side="_left", encoder_hidden_size=6, **LSTM),
    virtual("llama", "prompt", "text", "started as a text", tokenizer_name_or_path="models/llama", **TEXT),
    virtual("bert", "prompt", "text", "started as a text, with words for its tokenizer", tokens=7,
            tokenizer_name_or_path="models/bert", tokenizer_kwargs={"use_fast": True}, **TEXT),
    virtual("gpt2", "prompt", "vocabulary", "started as drawn tokens", prompt_tuning_init="SAMPLE_VOCAB"),
    virtual("t5", "prompt", "text", "twice the rows", tokenizer_name_or_path="models/t5", **TEXT),
    virtual("llama", "prefix", "projection", "projected, under grouped-query attention", prefix_projection=True, encoder_hidden_size=9),
    virtual("qwen2", "prefix", "left", "before the padding", side="_left"),
    virtual("bert", "prefix", "projection", "projected, trained classifier", prefix_projection=True),
    virtual("roberta", "prefix", "zero", "said to start as zeros", init_weights="zero", prefix_projection=True),
    adapter("llama", None, "two layers of three, grouped-query attention"),
    adapter("llama", "left", "padding on the left", side="_left", adapter_layers=3),
    adapter("llama_tied", "one", "one row in one layer", adapter_len=1, adapter_layers=1),
    adapter("mistral", None, "one key head; the prompt is seen past the window"),
    adapter("gpt2", None, "past the output projection"),
    adapter("gpt2", "left", "padding on the left", side="_left", adapter_layers=1),
    adapter("gpt2_inverse_layer", None, "attention scaled by layer, prompts not"),
]
MULTITASK = [
    virtual("llama", "mpt", None, "three tasks", num_tasks=3, num_ranks=2),
    virtual("qwen2", "mpt", "left", "two tasks, padding on the left", side="_left", num_tasks=2),
    virtual("gpt2", "mpt", "text", "said to start as a text", num_tasks=4, tokenizer_name_or_path="models/gpt2", **TEXT),
    virtual("bert", "mpt", None, "trained classifier", num_tasks=3, num_ranks=3),
    virtual("roberta", "mpt", "one", "one task", num_tasks=1, num_ranks=2),
    virtual("t5", "mpt", None, "rows before the decoder's input too", num_tasks=3, num_ranks=2),
]

# name -> (model, kind of batches, options of training, method, settings of peft, settings of the recipe or None)
FAST = dict(learning_rate=1e-2)
TRAINED = {
    "llama__p_tuning": ("llama", "full", FAST, "p_tuning", dict(num_virtual_tokens=4, encoder_hidden_size=10),
                        dict(tokens=4, encoder_hidden_size=10)),
    "llama__p_tuning_lstm": ("llama", "full", FAST, "p_tuning", dict(num_virtual_tokens=5, encoder_hidden_size=6, **LSTM),
                             dict(tokens=5, encoder="LSTM", encoder_hidden_size=6)),
    "gpt2__p_tuning": ("gpt2", "padded", dict(FAST, max_grad_norm=0.5), "p_tuning", dict(num_virtual_tokens=3), dict(tokens=3)),
    "bert__p_tuning_lstm": ("bert", "padded", FAST, "p_tuning",
                            dict(num_virtual_tokens=3, encoder_hidden_size=5, encoder_num_layers=1, **LSTM),
                            dict(tokens=3, encoder="LSTM", encoder_hidden_size=5, encoder_layers=1, train_also=["classifier"])),
    "t5__p_tuning_lstm": ("t5", "ragged", FAST, "p_tuning", dict(num_virtual_tokens=3, encoder_hidden_size=5, **LSTM),
                          dict(tokens=3, encoder="LSTM", encoder_hidden_size=5)),
    "llama__prefix_projection": ("llama", "full", FAST, "prefix",
                                 dict(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=7), dict(tokens=4, projection=7)),
    "gpt2__prefix_projection": ("gpt2", "padded", FAST, "prefix",
                                dict(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5), dict(tokens=3, projection=5)),
    "bert__prefix_projection": ("bert", "padded", FAST, "prefix",
                                dict(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6),
                                dict(tokens=3, projection=6, train_also=["classifier"])),
    "t5__prefix_projection": ("t5", "ragged", FAST, "prefix",
                              dict(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5), dict(tokens=3, projection=5)),
    "llama__mpt": ("llama", "full", FAST, "mpt", dict(num_virtual_tokens=4, num_tasks=3, num_ranks=2), None),
    "bert__mpt": ("bert", "padded", FAST, "mpt", dict(num_virtual_tokens=3, num_tasks=2, num_ranks=2), None),
    "t5__mpt": ("t5", "ragged", FAST, "mpt", dict(num_virtual_tokens=3, num_tasks=2), None),
    "llama__llama_adapter": ("llama", "full", FAST, "llama_adapter", dict(adapter_len=4, adapter_layers=2), None),
    "gpt2__llama_adapter": ("gpt2", "padded", FAST, "llama_adapter", dict(adapter_len=3, adapter_layers=2), None),
}


class Letters:
    """Stands for a tokenizer: a letter's number in the alphabet."""

    @staticmethod
    def from_pretrained(name, **kwargs):
        return lambda text: {"input_ids": [3 + ord(c) % 32 for c in text]}


plain_forward = peft.PeftModelForSeq2SeqLM.forward


def embedded(self, *args, decoder_input_ids=None, **kwargs):
    """With several tasks `peft` takes what the decoder reads embedded, or not at all."""
    if self.active_peft_config.peft_type == peft.PeftType.MULTITASK_PROMPT_TUNING and decoder_input_ids is not None:
        return plain_forward(self, *args, decoder_inputs_embeds=self.word_embeddings(decoder_input_ids), **kwargs)
    return plain_forward(self, *args, decoder_input_ids=decoder_input_ids, **kwargs)


def tasks(name, rows, count):
    return torch.from_numpy(rng("tasks", name).integers(0, count, rows))


def write_multitask(c):
    """A case whose inputs name a task for each row."""
    read = cases.tensors_of
    out, count = CASES / cases.label(c), c["config"]["num_tasks"]

    def with_tasks(path):
        tensors = read(path)
        if path.parent.parent == INPUTS and path.name.startswith("inputs"):
            tensors["task_ids"] = tasks(cases.label(c), len(tensors["input_ids"]), count)
            write_tensors(out / "inputs.safetensors", tensors)
        return tensors

    cases.tensors_of = with_tasks
    try:
        cases.write_case(c)
    finally:
        cases.tensors_of = read
    meta = json.loads((out / "case.json").read_text())
    write_json(out / "case.json", {**meta, "inputs": "./inputs.safetensors"})


def register():
    peft.PeftModelForSeq2SeqLM.forward = embedded
    cases.CONFIGS.update(CONFIGS)
    adapters_io.BOUNDS.update(BOUNDS)
    transformers.AutoTokenizer = Letters


def network(model):
    """The trained tensors by their names in the method, which keeps the last layer of a projection by parts."""
    plain = lambda key: key.replace(".default", "").replace(".modules_to_save", "").removeprefix("base_model.")
    tensors = {"base_model.model." + plain(k): p for k, p in trainable(model).items()}
    for key in [k for k in tensors if ".transform.2." in k]:
        width = tensors["base_model.model.prompt_encoder.embedding.weight"].shape[1]
        for i, part in enumerate(tensors.pop(key).split(width)):
            tensors[key.replace(".transform.2.", f".transform.2.{i}.")] = part
    return tensors


def attempt(name, out, salt):
    model, kind, options, method, config, settings = TRAINED[name]
    o = {**DEFAULTS, **options}
    data = batches(name + salt, model, kind, o["steps"] * o["batch_size"])
    m = cases.attach(case(model, method, "trajectory_" + name, "", **config), zoo.load(model))
    m.predicts_first = method in ("p_tuning", "mpt") and zoo.is_causal(model)
    if method == "mpt":
        data["task_ids"] = tasks(name, len(data["labels"]), config["num_tasks"])
    if settings is None:
        save_adapter(copy.deepcopy(m), out / "init_adapter", model)
    else:
        (out / "init_adapter").mkdir()
        write_tensors(out / "init_adapter/adapter_model.safetensors", network(m))
        write_json(out / "init_adapter/adapter_config.json", {"peft_type": cases.CONFIGS[method]().peft_type.value})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = trajectory(m, data, zoo.is_causal(model), **options)
    if not well_posed(expected):
        return False
    save_adapter(m, out / "final_adapter", model)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": model, "method": method, "settings": settings, "notes": None,
                                       "peft": peft.__version__, "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}, "
          f"rounding only {expected['rounding_only_tensors']}", flush=True)
    return True


def make(only=None):
    register()
    for c in TABLE:
        if not only or only in cases.label(c):
            cases.write_case(c)
    for c in MULTITASK:
        if not only or only in cases.label(c):
            write_multitask(c)
    for name in TRAINED:
        if only and only not in name:
            continue
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
