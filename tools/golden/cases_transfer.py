"""A prompt that a trained projection makes of one of a model of another width (TPT): a PyTorch transcription.

Su et al. 2022, arXiv:2111.06719, section 5: the rows of the source, flattened, pass a linear layer, LeakyReLU and a second linear layer,
which the task trains; the source stays. What is saved is an ordinary prompt of `peft`.
"""

import json
import warnings

import peft
import torch
import transformers
from torch import nn

import cases
import zoo
from batches import batches
from common import CASES, TRAJECTORIES, fresh, rng, tensors_of, write_json, write_tensors
from training import trajectory, well_posed


class Projected(nn.Module):
    """A model under a prompt of another one."""

    def __init__(self, base, source, tokens, inside, halves):
        super().__init__()
        self.model = zoo.load(base).requires_grad_(False)
        self.causal, self.tokens, self.halves = zoo.is_causal(base), tokens, halves
        self.predicts_first = self.causal
        width = self.model.get_input_embeddings().weight.shape[1]
        # The rows in use: in a file of an encoder-decoder model, the first half of them.
        self.source = source[torch.arange(tokens) % len(source)].flatten()
        self.encoder, self.decoder = nn.Linear(len(self.source), inside), nn.Linear(inside, tokens * width)
        self.activation = nn.LeakyReLU()

    def rows(self):
        source = self.source.to(self.encoder.weight.dtype)
        return self.decoder(self.activation(self.encoder(source))).unflatten(0, (self.tokens, -1))

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **more):
        count = len(input_ids)
        embedded = torch.cat([self.rows().expand(count, -1, -1), self.model.get_input_embeddings()(input_ids)], 1)
        first = torch.ones(count, self.tokens, dtype=torch.long)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if token_type_ids is not None:
            more["token_type_ids"] = torch.cat([0 * first, token_type_ids], 1)
        if labels is not None and self.causal:
            labels = torch.cat([-100 * first, labels], 1)
        return self.model(inputs_embeds=embedded, attention_mask=torch.cat([first, mask], 1), labels=labels, **more)

    def save(self, path, base):
        """The prompt as `peft` writes it."""
        config = self.model.config
        path.mkdir(parents=True, exist_ok=True)
        write_tensors(path / "adapter_model.safetensors", {"prompt_embeddings": self.rows().detach().repeat(self.halves, 1)})
        write_json(path / "adapter_config.json", {
            "peft_type": "PROMPT_TUNING", "task_type": cases.task_of(base), "base_model_name_or_path": f"models/{base}",
            "num_virtual_tokens": self.tokens, "num_transformer_submodules": self.halves, "token_dim": config.hidden_size,
            "num_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
            "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None,
            "tokenizer_kwargs": None, "modules_to_save": None, "inference_mode": True, "peft_version": peft.__version__})


# name -> (model, kind of batches, options of training, case of the source, rows, width inside, halves of the model)
FAST = dict(learning_rate=1e-2)
TRAINED = {
    "llama__prompt_projector": ("llama", "full", FAST, "bert__prompt", 5, 12, 1),
    "t5__prompt_projector": ("t5", "ragged", dict(FAST, weight_decay=0.1), "llama__prompt", 4, 7, 2),
    "gpt2__prompt_projector": ("gpt2", "padded", FAST, "llama__prompt", 7, 10, 1),
}


def attempt(name, out, salt):
    """Writes one trajectory; false where its batches, drawn with `salt`, make rounding visible."""
    base, kind, options, source, tokens, inside, halves = TRAINED[name]
    adapter = CASES / source / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    rows = tensors_of(adapter / "adapter_model.safetensors")["prompt_embeddings"][:config["num_virtual_tokens"]]
    model = Projected(base, rows, tokens, inside, halves).eval()
    own = {k: p for k, p in model.named_parameters() if p.requires_grad}
    for key, p in own.items():
        p.data = torch.from_numpy(rng("adapter", "trajectory/" + name, key).uniform(-0.4, 0.4, tuple(p.shape))).float()
    data = batches(name + salt, base, kind, 16)
    out.mkdir(parents=True, exist_ok=True)
    start = {f"base_model.model.prompt_projector.{k}": p.detach().clone() for k, p in own.items()}
    model.save(out / "init_adapter", base)
    write_tensors(out / "init_adapter/adapter_model.safetensors", start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = trajectory(model, data, zoo.is_causal(base), **options)
    if not well_posed(expected):
        return False
    model.save(out / "final_adapter", base)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {
        "name": name, "model": base, "method": "prompt", "notes": None, "transformers": transformers.__version__,
        "settings": {"tokens": tokens, "projector": inside, "from_prompts": [f"../../cases/{source}/adapter"]}, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make(only=None):
    for name in TRAINED:
        if only and only not in name:
            continue
        if not any(attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
