"""Cases of T5.

A prompt of `peft` stands before the encoder's input and in no other place, and the second half of its rows is not read.
A prefix is given to the decoder's self-attention alone, at the columns before its input; the relative positions count
it. `peft` deals the layers of a prefix out by fours, keeping two: the decoder's layer i reads layer 2 i modulo their
number. The prefix has as many layers as the encoder unless `num_layers` says otherwise. Nothing reads the module
`shared` itself, so LoRA or a copy of it changes nothing.
"""

from rows import ia3, lora, virtual

ALL = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]

TABLE = [
    lora("t5", None, "default q, v: self-attention of both sides and cross-attention"),
    lora("t5", "left", "the encoder's padding on the left", side="_left"),
    lora("t5", "all_linear", "every linear but the head", target_modules="all-linear"),
    lora("t5", "rslora_patterns", "patterns by side and kind of attention", use_rslora=True, target_modules=["q", "k", "v", "o", "wi", "wo"],
         rank_pattern={"EncDecAttention.k": 6, r"encoder\..*\.wo": 2}, alpha_pattern={"SelfAttention.o": 3}),
    lora("t5", "embed", "the tables of both sides apart; the tied head keeps its own", merge=False, target_modules=["embed_tokens", "q"]),
    lora("t5", "bias_table", "the tables of relative positions", target_modules=["relative_attention_bias", "q"]),
    lora("t5", "save_norm", "whole copies of norms", modules_to_save=["final_layer_norm", "layer_norm"]),
    lora("t5_hub", None, "an old file", target_modules=["wi", "o"]),
    lora("t5_flan", None, "gated feed-forward", target_modules=ALL),
    lora("t5_flan", "head", "the untied head", target_modules=["lm_head", "q"]),
    lora("t5_untied", None, "a configuration as transformers 5 writes it", target_modules=["wi_1", "v"]),
    lora("t5_unscaled", None, "tied, not scaled", target_modules=["wi_0", "o"]),
    lora("t5_uneven", None, "more layers in the decoder", target_modules="all-linear"),
    lora("t5_buckets", None, "far positions", target_modules=["q", "k"]),
    lora("t5_encoder", None, "mean of the encoder's states"),
    ia3("t5", None, "default k, v, wo"),
    ia3("t5_flan", None, "default k, v, wo under a gate"),
    virtual("t5", "prompt", None, "before the encoder's input", tokens=5),
    virtual("t5", "prompt", "left", "before the encoder's padding", side="_left"),
    virtual("t5_flan", "prompt", None, "rows for one side only", num_transformer_submodules=1),
    virtual("t5", "prefix", None, "two layers: both read the first"),
    virtual("t5", "prefix", "left", "the encoder's padding on the left", side="_left"),
    virtual("t5_buckets", "prefix", None, "far positions count the prefix", tokens=7),
    virtual("t5_flan", "prefix", None, "d_kv * heads differs from the width", token_dim=24, num_attention_heads=4),
    virtual("t5_uneven", "prefix", None, "three layers read the first, the third, the second", num_layers=3, token_dim=30,
            num_attention_heads=3),
    virtual("t5", "prefix", "projection", "the file holds the projected prefix", prefix_projection=True, encoder_hidden_size=6),
]


def places(model, method):
    """Where `peft` puts the virtual tokens, read off what it makes of them."""
    if method in ("prompt", "p_tuning", "mpt"):
        return {"virtual_tokens_in": "encoder_input", "rows_read": list(range(model.active_peft_config.num_virtual_tokens))}
    config = model.active_peft_config
    layers = model.get_prompt(1).self_attention_cache.layers
    encoder = model.prompt_encoder[model.active_adapter]
    tokens = model.prompt_tokens[model.active_adapter][:config.num_virtual_tokens]
    rows = encoder(tokens[None]).detach().view(config.num_virtual_tokens, 2 * config.num_layers, -1).unbind(1)

    def row_of(part):  # [1, heads, tokens, width]
        flat = part[0].transpose(0, 1).flatten(1)
        return next(i for i, row in enumerate(rows) if row.equal(flat))

    return {"virtual_tokens_in": "decoder_self_attention", "rows_of_decoder_layers": [[row_of(x.keys), row_of(x.values)] for x in layers]}
