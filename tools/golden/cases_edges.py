"""Masked-word heads, whose bias `transformers` has under two names (`X.bias` and `X.decoder.bias`), heads that are tied by
configuration and not by value, and settings of `peft`'s files that
few write: a negative alpha, negative seeds, a dropout of 1, ranks that would have to grow, two kinds of bases at once.

The files are saved as `save_pretrained` saves by default.
"""

import peft

import adapters_io
import cases
import cases_interchange
import cases_kronecker
import cases_multiplicative
from rows import case, lora

CONFIGS = {**cases_kronecker.CONFIGS, **cases_multiplicative.CONFIGS, "adalora": peft.AdaLoraConfig, "shira": peft.ShiraConfig}
HEADS = {"bert_mlm": "cls", "roberta_mlm": "lm_head"}

TABLE = [
    # The two names of a head's bias. `peft` merges a decoder into the table that it shares.
    *(lora(name, "decoder_bias_only", "the bias of a decoder that is a target", False, bias="lora_only", target_modules=["decoder", "query"])
      for name in HEADS),
    *(lora(name, "decoder_bias_all", "every bias, a decoder among the targets", False, bias="all", target_modules=["decoder"]) for name in HEADS),
    *(lora(name, "bias_all", "every bias: one vector under two names", bias="all", target_modules=["query"]) for name in HEADS),
    lora("bert_mlm", "bias_all_save_decoder", "a decoder with a bias of its own", False, bias="all", target_modules=["query"], modules_to_save=["decoder"]),
    *(lora(name, "bias_all_save_head", "both names within what is trained whole", False, bias="all", target_modules=["query"], modules_to_save=[head])
      for name, head in HEADS.items()),
    case("bert_mlm", "boft", "decoder_bias", "the bias of a decoder that is a target", False, bias="boft_only", boft_block_size=4, target_modules=["decoder"]),
    case("roberta_mlm", "oft", "decoder_bias", "the bias of a decoder that is a target", False, bias="oft_only", r=0, oft_block_size=4,
         target_modules=["decoder"]),
    case("roberta_mlm", "vera", "bias_all", "every bias", r=4, bias="all", target_modules=["query"]),
    case("bert_mlm", "fourierft", "bias_all", "every bias", n_frequency=40, bias="all", target_modules=["query"]),
    *(case(name, "ln_tuning", "decoder", "a decoder with a bias of its own", target_modules=["decoder"]) for name in HEADS),
    # A decoder adds no bias once rows of its table are trained; merged, `peft` has it again.
    *(case(name, "trainable_tokens", None, "rows of the decoder too, without its bias", False, token_indices=[5, 40, 11]) for name in HEADS),
    *(lora(name, "tokens", "rows beside factors, no bias", False, target_modules=["query"], trainable_token_indices=[5, 40, 11]) for name in HEADS),
    lora("bert_mlm", "bias_all_tokens", "a bias below rows, which nothing adds", False, bias="all", target_modules=["query"],
         trainable_token_indices=[5, 40, 11]),
    *(lora(name, "bias_only_tokens", "a bias below rows that is there as it was", False, bias="lora_only", target_modules=["query"],
           trainable_token_indices=[5, 40, 11]) for name in HEADS),
    # Heads that the configuration ties to the table and that have other values: `peft` puts the rows of the table into them.
    *(case(name, "trainable_tokens", None, "the rows of an untied head too", token_indices=[5, 40, 11]) for name in ("t5_flan", "t5_untied")),
    case("t5_flan", "trainable_tokens", "apart", "both tables, and not the head", False, token_indices=[5, 40, 11], target_modules=["embed_tokens"]),
    lora("t5_flan", "tokens", "the rows of an untied head too, beside factors", target_modules=["q"], trainable_token_indices=[5, 40, 11]),
    lora("t5_flan", "encoder_table", "one of several copies of a tensor", False, target_modules=["encoder.embed_tokens"]),
    # A scale below zero.
    case("llama", "deft", "negative_qr", "a negative alpha", r=4, decomposition_method="qr", alpha=-6),
    case("qwen2", "deft", "negative_relu", "a negative alpha", r=3, decomposition_method="relu", alpha=-4),
    # Seeds as PyTorch takes them.
    case("llama", "fourierft", "negative_seed", "a seed below zero", n_frequency=60, scaling=150.0, random_loc_seed=-3),
    case("llama", "vera", "negative_seed", "a seed below zero", r=5, projection_prng_key=-3, save_projection=False),
    case("qwen2", "shira", "large_seed", "a seed of 64 bits, in the file with its places", r=2, random_seed=2**64 - 3),
    # Everything is left out in training, nothing otherwise.
    case("llama", "loha", "all_dropped", "a dropout of 1", r=3, rank_dropout=1.0, module_dropout=1.0),
    case("llama", "oft", "all_dropped", "a dropout of 1", r=0, oft_block_size=4, module_dropout=1.0, target_modules=["q_proj"]),
    # Ranks that a run could not cut.
    case("llama", "adalora", "grows", "a first rank below the last", init_r=4, total_step=20),
    case("qwen3", "randlora", "both_sparse", "two kinds of bases, of which one is taken", r=5, randlora_alpha=10, sparse=True, very_sparse=True),
]
BOUNDS = {"trainable_tokens_delta": (True, 0.8), "lora_E": (False, 1.0), "shira_weight": (False, 0.3), **cases_multiplicative.BOUNDS,
          **{name: (False, width) for name, width in cases_kronecker.WIDTHS.items()}}


def make(only=""):
    cases_interchange.CONFIGS.update(CONFIGS)
    adapters_io.BOUNDS.update(cases_interchange.BOUNDS | BOUNDS)
    for c in TABLE:
        if only in cases.label(c):
            cases_interchange.write_case(c)


if __name__ == "__main__":
    import sys
    make(*sys.argv[1:])
