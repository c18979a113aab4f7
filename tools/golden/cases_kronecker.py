"""Cases and trajectories of `peft`'s Kronecker and Hadamard products and of those methods that share random bases."""

import peft
import peft.tuners.c3a.layer
import torch

import cases
import trajectories
from common import TRAJECTORIES, fresh, rng
from rows import case

CONFIGS = {
    "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig, "vera": peft.VeraConfig, "fourierft": peft.FourierFTConfig, "miss": peft.MissConfig,
    "c3a": peft.C3AConfig, "randlora": peft.RandLoraConfig, "vblora": peft.VBLoRAConfig, "pvera": peft.PveraConfig, "unilora": peft.UniLoraConfig, "waveft": peft.WaveFTConfig,
}
LINEARS = cases.LINEARS
BERT_ALL = cases.BERT_ALL
SAVED = dict(modules_to_save=["classifier"])
QV = dict(target_modules=["q_proj", "v_proj"])

TABLE = [
    case("llama", "loha", None, "default targets", r=3, alpha=6),
    case("llama", "loha", "patterns", "rank and alpha by module", r=4, alpha=8, target_modules=LINEARS,
         rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.up_proj": 9}, alpha_pattern={"down_proj": 20}),
    case("qwen2", "loha", None, "biases, rank above the rank where the product of thin factors is cheaper", r=8, alpha=4, target_modules=LINEARS),
    case("bert", "loha", None, "default targets, trained classifier", r=2),
    case("vit", "loha", "patches", "the convolution that makes the patches", r=3, target_modules=["projection", "v_proj"]),
    case("vit", "loha", "effective", "cores of the convolution's windows", r=3, target_modules=["projection", "q_proj"],
         use_effective_conv2d=True, **SAVED),
    case("t5", "loha", None, "both sides and cross-attention", r=3, target_modules=["q", "v", "wo"]),
    case("llama", "lokr", None, "default targets, second factor of low rank", r=2, alpha=4),
    case("llama", "lokr", "whole", "both factors whole", r=16, alpha=32, target_modules=LINEARS),
    case("llama", "lokr", "both", "both factors of low rank", r=1, alpha=2, decompose_both=True, target_modules=LINEARS),
    case("llama", "lokr", "factor", "a factor that divides some sizes, and ranks by module", r=2, alpha=4, decompose_factor=8, target_modules=LINEARS,
         rank_pattern={"o_proj": 7}, alpha_pattern={"q_proj": 3}),
    case("qwen3", "lokr", "lycoris", "started as in LyCORIS", r=3, init_weights="lycoris", rank_dropout=0.1, rank_dropout_scale=True, module_dropout=0.2,
         target_modules=LINEARS),
    case("roberta", "lokr", None, "classifier of two layers trained", r=2, merge=False),
    case("vit", "lokr", "patches", "the convolution that makes the patches", r=3, decompose_factor=4, target_modules=["projection", "v_proj"]),
    case("vit", "lokr", "patches_whole", "a whole second factor of the convolution", r=16, target_modules=["projection"], **SAVED),
    case("vit", "lokr", "effective", "a core of the convolution's windows", r=2, target_modules=["projection", "fc1"],
         use_effective_conv2d=True, **SAVED),
    case("llama", "vera", None, "shared matrices in the file", r=6, d_initial=0.3),
    case("llama", "vera", "seed", "shared matrices from their seed, cut for smaller modules", r=7, projection_prng_key=11, save_projection=False,
         target_modules=LINEARS),
    case("llama_bias", "vera", "bias_all", "every bias trained", r=5, bias="all"),
    case("llama_bias", "vera", "bias_only", "biases of targets trained", r=5, bias="vera_only", save_projection=False, target_modules=["q_proj", "down_proj"]),
    case("gpt2", "vera", None, "weights stored as [inputs, outputs]", r=6, target_modules=["c_attn", "mlp.c_proj"]),
    case("bert", "vera", None, "default targets, trained classifier", r=6),
    case("t5_flan", "vera", None, "both sides", r=6, save_projection=False, target_modules=["q", "wi_1"]),
    case("llama", "fourierft", None, "default targets", n_frequency=60, scaling=150.0),
    case("llama", "fourierft", "pattern", "frequencies by module, another seed, odd sizes", n_frequency=80, scaling=90.5, random_loc_seed=5,
         target_modules=LINEARS, n_frequency_pattern={"k_proj": 20, r"mlp\.up_proj": 150}),
    case("qwen2", "fourierft", "bias", "biases of targets trained", n_frequency=50, bias="fourier_only", init_weights=True),
    case("gpt2", "fourierft", None, "weights stored as [inputs, outputs]", n_frequency=100, target_modules=["c_attn"]),
    case("bert", "fourierft", None, "default targets, trained classifier", n_frequency=70),
    case("llama", "miss", None, "default targets", r=6),
    case("llama", "miss", "odd", "a rank that does not divide the inputs", r=10, target_modules=LINEARS),
    case("llama", "miss", "bat", "blocks times the weight", r=12, init_weights="bat", target_modules=["q_proj", "k_proj", "o_proj"]),
    case("llama", "miss", "mini", "a block repeated along the outputs", r=7, mini_r=4, init_weights="mini", target_modules=["q_proj", "v_proj", "k_proj"]),
    case("qwen2", "miss", "bias", "biases of targets trained", r=4, bias="MiSS_only"),
    case("bert", "miss", None, "trained classifier", r=5, target_modules=BERT_ALL),
    case("vit", "miss", None, "linears of pictures", r=8, target_modules=["q_proj", "fc2"], **SAVED),
    case("llama", "c3a", None, "default targets", block_size=12, **QV),
    case("llama", "c3a", "pattern", "short and odd blocks by module", block_size=4, target_modules=["q_proj", "k_proj", "o_proj"],
         block_size_pattern={"o_proj": 24, "k_proj": 3}, init_weights=True),
    case("llama_bias", "c3a", "bias_all", "every bias trained", block_size=8, bias="all", init_weights="gaussian", **QV),
    case("bert", "c3a", None, "trained classifier", block_size=8, target_modules=BERT_ALL),
    case("t5", "c3a", None, "both sides", block_size=16, target_modules=["q", "o"]),
    case("llama", "randlora", None, "shared matrices in the file, once more for every target", r=10, randlora_alpha=40),
    case("llama", "randlora", "seed", "shared matrices from their seed in bf16", r=7, randlora_alpha=14, projection_prng_key=3, save_projection=False,
         target_modules=LINEARS),
    case("qwen3", "randlora", "sparse", "ternary matrices from their seed", r=5, randlora_alpha=10, sparse=True, save_projection=False, target_modules=LINEARS),
    case("qwen2", "randlora", "very_sparse", "very sparse ones, biases of targets", r=4, randlora_alpha=8, very_sparse=True, bias="randlora_only"),
    case("gpt2", "randlora", None, "weights stored as [inputs, outputs]", r=12, randlora_alpha=24, target_modules=["c_attn", "c_fc"]),
    case("bert", "randlora", None, "trained classifier", r=6, randlora_alpha=12, save_projection=False),
]
PVERA = [
    case("llama", "pvera", None, "shared matrices in the file", r=5, d_initial=0.3),
    case("llama", "pvera", "seed", "shared matrices from their seed", r=4, projection_prng_key=9, save_projection=False, generator_seed=3,
         target_modules=LINEARS),
    case("bert", "pvera", None, "trained classifier", r=6),
]
UNILORA = [
    case("llama", "unilora", None, "places from their seed", r=3, theta_d_length=50),
    case("llama", "unilora", "saved", "places in the file, more numbers than are read", r=1, theta_d_length=3000, save_indices=True, proj_seed=7,
         target_modules=["q_proj", "v_proj", "down_proj"]),
    case("gpt2", "unilora", "bias", "weights stored as [inputs, outputs], biases of targets", r=2, theta_d_length=64, bias="unilora_only",
         target_modules=["c_attn", "c_fc"]),
    case("bert", "unilora", None, "trained classifier", r=4, theta_d_length=100, target_modules=BERT_ALL),
    case("t5", "unilora", None, "both sides and cross-attention", r=2, theta_d_length=80, target_modules=["q", "k", "v", "o", "wi", "wo"]),
]
WAVEFT = [
    case("llama", "waveft", None, "Haar's wavelets", n_frequency=60),
    case("llama", "waveft", "pattern", "longer filters, odd sizes, numbers by module", n_frequency=80, scaling=12.5, wavelet_family="db4",
         random_loc_seed=5, target_modules=LINEARS, n_frequency_pattern={"k_proj": 20, r"mlp\.up_proj": 150}),
    case("qwen2", "waveft", "shared_out", "symlets, numbers by size, biases of targets trained", n_frequency=50, wavelet_family="sym5",
         proportional_parameters=True, bias="waveft_only", init_weights=False, target_modules=["q_proj", "k_proj", "up_proj"]),
    case("llama", "waveft", "plain", "no transform", n_frequency=90, use_idwt=False, **QV),
    case("gpt2", "waveft", None, "weights stored as [inputs, outputs], coiflets", n_frequency=100, wavelet_family="coif2", target_modules=["c_attn"]),
    case("bert", "waveft", None, "trained classifier", n_frequency=70, wavelet_family="db2", target_modules=["query", "intermediate.dense"]),
]
VBLORA = [
    case("llama", "vblora", None, "default targets", r=3, num_vectors=12, vector_length=6),
    case("llama", "vblora", "top", "the three largest logits alone in the file", r=2, num_vectors=9, vector_length=12, topk=3,
         save_only_topk_weights=True, target_modules=["q_proj", "k_proj", "o_proj"]),
    case("llama_bias", "vblora", "bias", "biases of targets trained", r=2, num_vectors=7, vector_length=8, topk=1, bias="vblora_only"),
    case("gpt2", "vblora", None, "weights stored as [inputs, outputs]", r=3, num_vectors=300, vector_length=16, target_modules=["c_attn"],
         save_only_topk_weights=True),
    case("bert", "vblora", None, "trained classifier", r=4, num_vectors=10, vector_length=8, target_modules=BERT_ALL),
]

# Half widths of what a tensor is filled with, by the end of its name; they make the adapters change the logits visibly.
WIDTHS = {
    "hada_w1_a": 0.7, "hada_w1_b": 0.5, "hada_w2_a": 0.7, "hada_w2_b": 0.5, "hada_t1": 0.6, "hada_t2": 0.6,
    "lokr_w1": 0.4, "lokr_w1_a": 0.6, "lokr_w1_b": 0.6, "lokr_w2": 0.4, "lokr_w2_a": 0.5, "lokr_w2_b": 0.5, "lokr_t2": 0.6,
    "vera_lambda_b": 0.8, "vera_lambda_d": 0.8,
    "pvera_lambda_b": 0.8, "pvera_lambda_d": 0.8, "fourierft_spectrum": 1.5, "waveft_spectrum": 0.04, "unilora_theta_d": 1.0, "miss_block": 0.12, "c3a_kernel": 8.0,
    "vblora_vector_bank": 0.7, "vblora_logits_A": 1.2, "vblora_logits_B": 1.2, "randlora_lambda": 0.25, "randlora_gamma": 0.25,
}


def fill(model, name):
    """Every trainable parameter, uniform, from a generator seeded by the case and the parameter; copies of the base are moved."""
    for key, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # Where few read the same number, it is scaled down by little.
        few = name == "llama__unilora_saved"
        end = key.removesuffix(".default").rpartition(".")[2]
        value = torch.from_numpy(rng("adapter", name, key).uniform(-1, 1, tuple(p.shape))).float()
        p.data = value * WIDTHS[end] * (0.3 if few else 1.0) if end in WIDTHS else p.data + 0.2 * value


RUNS = {
    "llama__waveft": ("llama", "full", {}, "waveft", dict(n_frequency=60, wavelet_family="db3")),
    "llama__unilora": ("llama", "full", dict(learning_rate=1e-2), "unilora", dict(r=3, theta_d_length=50)),
    "llama__vblora": ("llama", "full", {}, "vblora", dict(r=3, num_vectors=12, vector_length=6)),
    "llama__loha": ("llama", "full", {}, "loha", dict(r=3, alpha=6)),
    "llama__lokr": ("llama", "full", dict(learning_rate=5e-3), "lokr", dict(r=2, alpha=4, target_modules=LINEARS)),
    "vit__lokr_effective": ("vit", "images", {}, "lokr", dict(r=2, use_effective_conv2d=True, target_modules=["projection", "q_proj"], **SAVED)),
    "llama__vera": ("llama", "padded", dict(learning_rate=1e-2), "vera", dict(r=6, save_projection=False)),
    "bert__fourierft": ("bert", "padded", dict(learning_rate=1e-2), "fourierft", dict(n_frequency=40)),
    "llama__miss": ("llama", "full", {}, "miss", dict(r=10, target_modules=LINEARS)),
    "qwen2__miss_bat": ("qwen2", "padded", {}, "miss", dict(r=4, init_weights="bat", **QV)),
    "llama__c3a": ("llama", "full", dict(learning_rate=1e-1), "c3a", dict(block_size=12, **QV)),
    "qwen3__randlora": ("qwen3", "padded", dict(learning_rate=5e-3), "randlora", dict(r=8, randlora_alpha=16)),
}


class Circulant:
    """The forward of `peft`'s C3A, differentiated by `torch`: its own backward gives the input the gradient of another matrix."""

    @staticmethod
    def apply(x, w):
        _, n, b = w.shape
        x = torch.einsum("...nb,mnb->...mb", torch.fft.ifft(x.reshape(*x.shape[:-1], n, b)), torch.fft.fft(w))
        return torch.fft.fft(x).real.reshape(*x.shape[:-2], -1)


def make():
    peft.tuners.c3a.layer.BlockCircularConvolution = Circulant
    # The tables of these methods take the place of the ones that `cases` and `trajectories` hold.
    cases.CONFIGS.update(CONFIGS)
    cases.fill_adapter = fill
    for c in TABLE + PVERA + UNILORA + WAVEFT + VBLORA:
        cases.write_case(c)
    trajectories.TABLE.update(RUNS)
    for name in RUNS:
        if not any(trajectories.attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
