"""Cases of GPT-2: the same methods on weights stored as [inputs, outputs].

`peft` notes `fan_in_fan_out` of the module that it wraps last, so the flag says nothing where linears are mixed.
"""

from rows import ia3, lora, virtual

ALL = ["c_attn", "c_proj", "c_fc"]

TABLE = [
    lora("gpt2", None, "default target c_attn: one pair for queries, keys and values"),
    lora("gpt2", "left", "the same with padding on the left, positions being columns", side="_left"),
    lora("gpt2", "all_linear", "every linear but the head", target_modules="all-linear"),
    lora("gpt2", "rslora_patterns", "c_proj is in the attention and in the feed-forward", use_rslora=True, target_modules=ALL,
         rank_pattern={"mlp.c_proj": 3, "h.0.attn.c_attn": 6}, alpha_pattern={"attn.c_proj": 5}),
    lora("gpt2", "bias_all", "every bias of the model trained", bias="all"),
    lora("gpt2", "bias_lora_only", "biases of adapted linears trained", bias="lora_only", target_modules=["attn.c_proj", "c_fc"]),
    lora("gpt2", "lora_bias", "B with a bias, merged into the linear's bias", lora_bias=True, target_modules=["c_attn", "mlp.c_proj"]),
    lora("gpt2", "embed", "the tables of words and positions; the tied head keeps its own", merge=False,
         target_modules=["wte", "wpe", "c_attn"]),
    lora("gpt2", "save_norm", "whole copies of norms", modules_to_save=["ln_1", "ln_f"]),
    lora("gpt2", "save_square", "square matrices trained whole lie as the model's file has them", target_modules=["mlp.c_fc"],
         modules_to_save=["attn.c_proj"]),
    lora("gpt2", "save_mlp", "a feed-forward trained whole", target_modules=["c_attn"], modules_to_save=["h.0.mlp"]),
    lora("gpt2", "layers", "one layer", target_modules=ALL, layers_to_transform=[1], layers_pattern="h"),
    lora("gpt2_hub", None, "names without the model's prefix in the file of the model, with it in the adapter's",
         target_modules=["c_attn", "c_fc"]),
    lora("gpt2_untied", "head", "the head is stored as [outputs, inputs], the others are not", target_modules=["lm_head", "c_attn"]),
    lora("gpt2_inverse_layer", None, "attention scaled by layer", target_modules=ALL),
    lora("gpt2_cls", None, "default target, trained score"),
    lora("gpt2_cls", "left", "the last token that is not the padding id", side="_left", target_modules=ALL),
    lora("gpt2_token", None, "token head trained"),
    ia3("gpt2", None, "default c_attn and mlp.c_proj"),
    ia3("gpt2", "attention", "no feed-forward: scales of outputs only", target_modules=["attn.c_proj", "c_attn"], feedforward_modules=[]),
    ia3("gpt2", "save_square", "a square matrix trained whole", modules_to_save=["h.1.attn.c_proj"]),
    ia3("gpt2_cls", None, "default targets and the score"),
    virtual("gpt2", "prompt", None, "positions count the prompt", tokens=5),
    virtual("gpt2", "prompt", "left", "prompt before the padding", side="_left"),
    virtual("gpt2_cls", "prompt", "left", "the last column is read, whatever it holds; here it holds a token", side="_left"),
    virtual("gpt2_token", "prompt", None, "virtual positions cut off"),
    virtual("gpt2", "prefix", None, "positions begin after the prefix"),
    virtual("gpt2", "prefix", "left", "prefix before the padding", side="_left"),
    virtual("gpt2", "prefix", "projection", "the file holds the projected prefix", prefix_projection=True, encoder_hidden_size=6),
    virtual("gpt2_cls", "prefix", None, "ids are given, so the last token that is not the padding id is read"),
    virtual("gpt2_token", "prefix", None, "token head"),
]
