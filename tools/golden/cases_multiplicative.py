"""Cases and trajectories of norms, of weights that are multiplied or turned, and of the small methods around them.

`peft` makes its butterflies of BOFT from more than one factor only where its CUDA kernel is: here the kernel's only
product, block-diagonal matrices, is made by `torch.block_diag` instead. OSF projects gradients by hooks, which a copy of a
model loses: the run in f64 is given them again.
"""

import peft
import torch
from peft.tuners.boft import layer as boft_layer
from peft.tuners.osf.layer import OSFLayer

import adapters_io
import cases
import training
import trajectories
from common import TRAJECTORIES as PLACE
from common import fresh
from rows import case

CONFIGS = {
    "ln_tuning": peft.LNTuningConfig, "hira": peft.HiraConfig, "hra": peft.HRAConfig, "road": peft.RoadConfig,
    "oft": peft.OFTConfig, "boft": peft.BOFTConfig, "delora": peft.DeloraConfig, "gralora": peft.GraloraConfig,
    "beft": peft.BeftConfig, "deft": peft.DeftConfig, "glora": peft.GloraConfig, "peanut": peft.PeanutConfig,
    "lily": peft.LilyConfig, "osf": peft.OSFConfig,
}
# None: around one; True: around where it starts, which is the base's.
BOUNDS = {
    "ln_tuning_layers": (True, 0.3), "hira_embedding_A": (False, 0.5), "hira_embedding_B": (False, 0.5),
    "hira_A": (False, 0.8), "hira_B": (False, 0.8), "hra_u": (False, 1.0), "road_theta": (False, 1.0),
    "road_alpha": (None, 0.4), "oft_R": (False, 0.3), "oft_embedding_R": (False, 0.3), "boft_R": (False, 0.8),
    "boft_s": (None, 0.4), "delora_A": (False, 0.4), "delora_B": (False, 0.4), "delora_lambda": (True, 0.5),
    "gralora_A_general": (False, 0.3), "gralora_B_general": (False, 0.3), "gralora_A": (False, 0.4),
    "gralora_B": (False, 0.3), "beft_bias": (False, 0.4), "deft_P": (False, 0.4), "deft_R": (False, 0.3),
    "glora_": (False, 0.3), "peanut_": (False, 0.4), "lily_": (False, 0.5), "osf_svd_params": (True, 0.1),
}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

TABLE = [
    case("llama", "ln_tuning", None, "every gain"),
    case("qwen3", "ln_tuning", None, "norms of queries and keys too", target_modules=NORMS + ["q_norm", "k_norm"]),
    case("bert", "ln_tuning", None, "gains and biases, trained classifier (peft's merging leaves it wrapped)", merge=False,
         target_modules=["LayerNorm"]),
    case("gpt2", "ln_tuning", "regex", "a pattern, without the last norm", target_modules=r".*\.ln_[12]", exclude_modules=r".*\.1\.ln_2"),
    case("t5", "ln_tuning", None, "encoder and decoder"),
    case("vit", "ln_tuning", None, "no task type", target_modules=["layernorm_before", "layernorm_after", "layernorm"]),
    case("llama", "hira", None, "default targets"),
    case("llama", "hira", "embed", "a table", target_modules=["embed_tokens", "q_proj"], r=4),
    case("llama", "hira", "layers", "one layer, left padding", side="_left", r=3, target_modules=ATTENTION, layers_to_transform=[1]),
    case("bert", "hira", None, "trained classifier", r=4),
    case("gpt2", "hira", None, "transposed matrices", r=4, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"]),
    case("t5", "hira", None, "default targets", r=4),
    case("vit", "hira", None, "the convolution of the patches too", r=3, target_modules=["projection", "q_proj"]),
    case("llama", "hra", None, "default targets"),
    case("llama", "hra", "gram_schmidt", "orthonormal vectors", r=5, apply_GS=True, target_modules=ATTENTION),
    case("qwen2", "hra", "bias_all", "every bias trained", r=4, bias="all"),
    case("bert", "hra", None, "an odd number, biases of targets trained", r=3, bias="hra_only"),
    case("t5", "hra", None, "default targets", r=4),
    case("vit", "hra", None, "the convolution of the patches too", r=4, target_modules=["projection", "q_proj"]),
    case("llama", "road", None, "one angle a pair", group_size=8),
    case("qwen2", "road", "2", "one angle an output; biases turn too", variant="road_2", group_size=16, target_modules=ATTENTION),
    case("bert", "road", "4", "one angle an entry; biases turn too", variant="road_4", group_size=4),
    case("t5", "road", "4", "one angle an entry", variant="road_4", group_size=2),
    case("llama", "oft", None, "the defaults: five terms, 24 inputs a block where 32 do not divide 48"),
    case("llama", "oft", "exact", "the exact transform", oft_block_size=8, use_cayley_neumann=False, target_modules=ATTENTION),
    case("qwen2", "oft", "share", "one block for all, biases of targets trained", oft_block_size=8, block_share=True, bias="oft_only"),
    case("bert", "oft", None, "the number of blocks given", r=4, oft_block_size=0, use_cayley_neumann=False),
    case("llama", "oft", "coft", "held near the identity", oft_block_size=6, coft=True, eps=0.9, use_cayley_neumann=False),
    case("t5", "oft", "terms", "three terms", oft_block_size=4, num_cayley_neumann_terms=3),
    case("llama", "oft", "embed", "a table and a matrix", oft_block_size=6, target_modules=["embed_tokens", "q_proj"]),
    case("llama", "boft", None, "one factor"),
    case("bert", "boft", None, "the number of blocks given, biases of targets trained", boft_block_size=0, boft_block_num=4, bias="boft_only"),
    case("llama_bias", "boft", "butterfly", "three factors", boft_n_butterfly_factor=3, target_modules=ATTENTION),
    case("t5", "boft", "butterfly", "two factors", boft_n_butterfly_factor=2, boft_block_size=8),
    case("llama", "delora", None, "default targets"),
    case("qwen2", "delora", "patterns", "rank and bound by module", r=4, delora_lambda=6, target_modules=ATTENTION,
         rank_pattern={"k_proj": 2}, lambda_pattern={r"layers\.0\.self_attn\.q_proj": 2}),
    case("bert", "delora", None, "every bias trained", r=3, delora_lambda=4, bias="all"),
    case("llama", "gralora", None, "two strips", r=8, alpha=4),
    case("gpt2", "gralora", "hybrid", "four strips and a LoRA beside them, transposed matrices", r=8, hybrid_r=2, gralora_k=4, alpha=4,
         fan_in_fan_out=True, target_modules=["c_attn", "c_proj"]),
    case("bert", "gralora", None, "biases of targets trained", r=4, alpha=4, bias="gralora_only"),
    case("llama", "beft", None, "layers without a bias", merge=False),
    case("bert", "beft", None, "added to the bias"),
    case("llama_bias", "beft", None, "other targets", target_modules=["q_proj", "down_proj"]),
    case("llama", "deft", None, "the defaults"),
    case("bert", "deft", "qr", "orthogonal, scaled", r=4, decomposition_method="qr", alpha=6),
    case("gpt2", "deft", "para", "taken out only, transposed matrices", r=3, decomposition_method="qr", para=True,
         fan_in_fan_out=True, target_modules=["c_attn", "c_proj"]),
    case("qwen2", "deft", "bias_all", "every bias trained", r=4, bias="all"),
    case("llama_bias", "glora", None, "low-rank, constant", r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    case("llama", "glora", None, "layers without biases", r=3),
    case("bert", "glora", "vector", "vectors, biases of targets trained", config_A_B="vector", config_C="vector", config_D_E="vector", bias="glora_only"),
    case("qwen2", "glora", "constant", "numbers", config_A_B="constant", config_C="none", config_D_E="constant"),
    case("bert", "glora", "bias", "the bias alone", config_A_B="none", config_C="lora", config_D_E="none", r=2),
    case("llama", "osf", None, "half of the directions, one matrix otherwise", target_modules=ATTENTION, rank_pattern={r"1\.self_attn\.k": 5}),
    case("bert", "osf", None, "a number of directions, trained classifier", effective_rank=28, target_modules=["query", "intermediate.dense"]),
    case("qwen2", "osf", None, "a share of the directions", effective_rank=0.8, target_modules=["q_proj", "down_proj"]),
    # Lily's mean is over padding too, so its cases have none.
    case("vit", "lily", None, "neighbours share A, all layers B", merge=False, r=4, num_B=3, stride_A=2, target_modules=["q_proj", "v_proj"]),
    case("dinov2", "lily", "regex", "a pattern is one kind", merge=False, r=3, scaling=0.5, target_modules=r".*\.(q|v)_proj"),
    case("vit_oblong", "lily", None, "two shapes of one target", merge=False, r=3, num_B=4, target_modules=["fc1", "fc2", "k_proj"]),
    case("llama", "peanut", None, "no hidden layers", r=6),
    case("bert", "peanut", "deep", "two hidden layers a side", r=4, depth=2, act_fn="gelu", scaling=0.5),
    case("t5", "peanut", None, "one hidden layer a side", r=4, depth=1, act_fn="tanh"),
]

# name -> (model, kind of batches, options of training, method and its settings), as in trajectories.py
TRAJECTORIES = {
    "llama__ln_tuning": ("llama", "full", {}, "ln_tuning", {}),
    "llama__hira": ("llama", "full", {}, "hira", dict(r=4)),
    "llama__hra": ("llama", "full", {}, "hra", dict(r=4)),
    "bert__hra_gram_schmidt": ("bert", "padded", {}, "hra", dict(r=3, apply_GS=True)),
    "qwen2__road": ("qwen2", "padded", {}, "road", dict(variant="road_4", group_size=8)),
    "llama__oft": ("llama", "full", {}, "oft", dict(oft_block_size=8)),
    "bert__oft_coft": ("bert", "padded", {}, "oft", dict(oft_block_size=8, coft=True, eps=0.9, use_cayley_neumann=False)),
    "llama__boft": ("llama", "full", {}, "boft", {}),
    "qwen2__delora": ("qwen2", "padded", {}, "delora", dict(r=4, delora_lambda=2)),
    "llama__gralora": ("llama", "full", {}, "gralora", dict(r=4, alpha=4, hybrid_r=2)),
    "bert__beft": ("bert", "padded", {}, "beft", {}),
    "llama__deft": ("llama", "full", {}, "deft", dict(r=3, decomposition_method="qr")),
    "bert__glora": ("bert", "padded", {}, "glora", dict(r=2, config_D_E="vector")),
    "llama__osf": ("llama", "full", {}, "osf", dict(effective_rank=0.9, target_modules=["q_proj", "down_proj"])),
    "llama__lily": ("llama", "full", {}, "lily", dict(r=4, num_B=3, stride_A=2)),
    "llama__peanut": ("llama", "full", {}, "peanut", dict(r=4, depth=1, act_fn="gelu")),
}


class BlockDiagonal:
    """Stands for the CUDA kernel: [factors, blocks, b, b] -> [factors, in, in]."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


def hooked(double):
    def copy(model):
        model = double(model)
        for m in model.modules():
            if isinstance(m, OSFLayer):
                m.hook_handles = []
                m._attach_hooks("default")
        return model
    return copy


def register():
    training.doubled = hooked(training.doubled)
    cases.CONFIGS.update(CONFIGS)
    trajectories.TABLE.update(TRAJECTORIES)
    adapters_io.BOUNDS.update(BOUNDS)
    boft_layer.get_fbd_cuda = lambda: True
    boft_layer.FastBlockDiag = BlockDiagonal


def make(only=None):
    register()
    for c in TABLE:
        if not only or c["method"] in only:
            cases.write_case(c)
    for name, row in TRAJECTORIES.items():
        if only and row[3] not in only:
            continue
        if not any(trajectories.attempt(name, fresh(PLACE / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
