"""Adapters of `peft` whose files leave things out that depend on an order: modules counted through a model, ties of equal sizes.

`modules.json` beside the cases' folder holds the order itself: the modules of a model that have a matrix or a table, as
`named_modules` gives them.
"""

import peft
import torch
import transformers

import adapters_io
import cases
import cases_interchange
import zoo
from common import GOLDEN, write_json
from rows import case

TABLE = [
    # P and the groups of v go by the number of the target.
    case("bert", "tinylora", "tables", "positions are counted before types", u=8, r=3, weight_tying=0.5, save_projection=False,
         target_modules=["word_embeddings", "position_embeddings", "token_type_embeddings", "query"]),
    case("roberta", "tinylora", "tables", "and here types before positions (peft merges no head of two layers)", False, u=8, r=3, save_projection=False,
         target_modules=["position_embeddings", "token_type_embeddings", "value"]),
    case("t5", "tinylora", "positions", "relative positions are counted after the first attention", False, u=8, r=3, weight_tying=0.4,
         save_projection=False, target_modules=["q", "o", "relative_attention_bias"]),
    case("t5", "tinylora", "shared", "a table that nothing reads is counted", False, u=8, r=3, weight_tying=0.3, save_projection=False,
         target_modules=["shared", "q", "v"]),
    case("t5", "tinylora", "shared_apart", "and has numbers of its own", False, u=8, r=3, target_modules=["shared", "k"]),
    # Rows of a table that shares its tensor with others.
    case("t5", "trainable_tokens", "encoder", "the encoder's table alone", False, token_indices=[40, 5, 9],
         target_modules=["encoder.embed_tokens"]),
    case("t5", "trainable_tokens", "decoder", "the decoder's table alone", False, token_indices=[0, 5, 9, 12],
         target_modules=["decoder.embed_tokens"]),
    case("t5", "trainable_tokens", "apart", "two tables with rows of their own", False, token_indices=[0, 40, 5, 9],
         target_modules=["embed_tokens"]),
    case("llama_tied", "trainable_tokens", "head", "a tied head alone", False, token_indices=[30, 9], target_modules=["lm_head"]),
    # Entries of equal size in half precision, found again in the base.
    case("llama_bf16", "supertuning", "ties", "many are wanted", False, sparsity=0.7, save_precomputed_indices=False,
         target_modules=["q_proj", "v_proj", "down_proj"]),
    case("llama_bf16", "supertuning", "few_ties", "few are wanted", False, sparsity=0.99, save_precomputed_indices=False,
         target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]),
    case("bert_bf16", "supertuning", "bottom_ties", "the smallest", False, sparsity=0.6, select_top=False,
         save_precomputed_indices=False, target_modules=["query", "value", "intermediate.dense"]),
]
BOUNDS = {"trainable_tokens_delta": (True, 0.8)}

# One model a wiring.
ORDERS = ["bert", "bert_mlm", "bert_token", "gpt2", "gpt2_cls", "llama", "mistral", "qwen2", "qwen3", "roberta", "roberta_mlm", "t5",
          "t5_flan", "t5_encoder", "vit", "deit", "dinov2", "dinov2_swiglu"]
MATRICES = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d, transformers.pytorch_utils.Conv1D)


def order(model):
    return [name for name, m in zoo.load(model).named_modules() if isinstance(m, MATRICES)]


def make(only=""):
    adapters_io.BOUNDS.update({**cases_interchange.BOUNDS, **BOUNDS})
    cases.CONFIGS.update({name: cases_interchange.CONFIGS[name] for name in ("tinylora", "supertuning", "trainable_tokens")})
    for c in TABLE:
        if only in cases.label(c):
            cases_interchange.write_case(c)
    if not only:
        write_json(GOLDEN / "modules.json", {"peft": peft.__version__, "transformers": transformers.__version__,
                                             "models": {model: order(model) for model in ORDERS}})


if __name__ == "__main__":
    import sys
    make(*sys.argv[1:])
