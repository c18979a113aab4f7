"""A post-norm ViT without class token, as plain PyTorch code builds it: written from `torch.nn` parts alone.

One of the two is saved as such models are found: `config.json` names neither class nor `model_type`.
"""

import json

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

import zoo_vit
from common import write_json
from spec import spec

SETTINGS = dict(image_size=12, patch_size=4, num_channels=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=52, hidden_act="gelu", layer_norm_eps=1e-5, num_labels=5, norm="post", pooling="mean")


class PostNormViTConfig(PretrainedConfig):
    model_type = "post-norm-vit"


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn = nn.MultiheadAttention(c.hidden_size, c.num_attention_heads, batch_first=True)
        self.ffn = nn.ModuleDict({"fc1": nn.Linear(c.hidden_size, c.intermediate_size),
                                  "fc2": nn.Linear(c.intermediate_size, c.hidden_size)})
        self.norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.act = {"gelu": F.gelu, "relu": F.relu}[c.hidden_act]

    def forward(self, h):
        h = self.norm1(h + self.attn(h, h, h, need_weights=False)[0])
        return self.norm2(h + self.ffn["fc2"](self.act(self.ffn["fc1"](h))))


class PostNormViTForImageClassification(PreTrainedModel):
    config_class = PostNormViTConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        c, patch = config, config.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(c.num_channels * patch * patch, c.hidden_size)})
        self.pos_embed = nn.Parameter(torch.zeros(1, (c.image_size // patch) ** 2, c.hidden_size))
        self.encoder = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.classifier = nn.Linear(c.hidden_size, c.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None):
        p = self.config.patch_size
        # F.unfold orders a window's numbers by channel, row, column.
        windows = F.unfold(pixel_values.to(self.pos_embed.dtype), p, stride=p).transpose(1, 2)
        h = self.patch_embed["proj"](windows) + self.pos_embed
        for block in self.encoder:
            h = block(h)
        logits = self.classifier(self.norm(h).mean(1))
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def draw(key, shape, unit):
    return 0.3 * unit if key == "pos_embed" else None


def unnamed(folder):
    """config.json as of a model outside `transformers`."""
    keys = set(SETTINGS) - {"num_labels"} | {"id2label"}
    c = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k in keys}
    write_json(folder / "config.json", {**c, "num_labels": len(c.pop("id2label")), "image_mean": [0.13], "image_std": [0.31]})


def post_vit(settings, **family):
    return spec("PostNormViTForImageClassification", settings, draw=draw, batch=zoo_vit.batch, rows=zoo_vit.rows, sides=("",),
                transcription=PostNormViTForImageClassification, **family)


TABLE = {
    "post_vit": post_vit(SETTINGS),
    "post_vit_grey": post_vit(dict(SETTINGS, num_channels=1, image_size=9, patch_size=3, hidden_size=24, num_hidden_layers=1,
                                   num_attention_heads=1, num_labels=3, hidden_act="relu", layer_norm_eps=1e-3), files=unnamed),
}
