"""Cases of image classifiers. `peft` has no task for them: no task type, and no default targets.

Names of modules are those of `transformers` 5. `OLDER` is made under `transformers` 4, whose names (`query`, `value`)
the adapters on the Hub have; `peft` under `transformers` 5 finds no module for these, and says so only where it finds
none at all.
"""

from rows import ia3, lora

SAVED = dict(modules_to_save=["classifier"])
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]

TABLE = [
    lora("vit", None, "queries and values, trained classifier", target_modules=["q_proj", "v_proj"], **SAVED),
    lora("vit", "all_linear", "without a task type the classifier is a linear like others", target_modules="all-linear"),
    lora("vit", "all_linear_saved", "the classifier is saved whole, though the list of targets names it", target_modules="all-linear", **SAVED),
    lora("vit", "rslora_patterns", "rank and alpha by module", use_rslora=True, target_modules=ALL, rank_pattern={"fc1": 7},
         alpha_pattern={r"layers\.1\.attention\.o_proj": 3}),
    lora("vit", "bias_all", "every bias, those of the patches and the classifier too", bias="all", target_modules=["q_proj"]),
    lora("vit", "bias_lora_only", "biases of adapted linears", bias="lora_only", target_modules=["v_proj", "fc2"], **SAVED),
    lora("vit", "patches", "the convolution that makes the patches", target_modules=["projection", "q_proj"], **SAVED),
    lora("vit", "save_norm", "norms trained whole", target_modules=["k_proj"], modules_to_save=["layernorm", "layernorm_before", "classifier"]),
    lora("vit_grey", None, "no biases on queries, keys, values", target_modules=ALL, **SAVED),
    lora("vit_oblong", None, "an oblong image", target_modules=ALL, **SAVED),
    lora("deit", None, "two tokens before the patches", target_modules=["q_proj", "v_proj"], **SAVED),
    lora("deit_teacher", None, "two heads trained", target_modules=["q_proj", "fc1"],
         modules_to_save=["cls_classifier", "distillation_classifier"]),
    lora("dinov2", None, "scaled layers", target_modules=ALL, **SAVED),
    lora("dinov2", "size", "stretched positions", side="_size", target_modules=["q_proj", "v_proj"], **SAVED),
    lora("dinov2_swiglu", None, "gate and up apart, although the file of the model joins them",
         target_modules=["gate_proj", "up_proj", "down_proj", "v_proj"], **SAVED),
    lora("post_vit", None, "post-norm, no class token", target_modules=["fc1", "fc2"], **SAVED),
    lora("post_vit", "bias_all", "every bias, that of the fused projection too", bias="all", target_modules=["fc2"]),
    lora("post_vit_grey", "saved", "a projection of flat kernels trained whole", target_modules=["fc1"], modules_to_save=["patch_embed.proj", "classifier"]),
    ia3("vit", None, "keys, values and the feed-forward", target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"], **SAVED),
    ia3("vit", "patches", "the convolution that makes the patches", target_modules=["projection", "k_proj"], feedforward_modules=[]),
    ia3("vit", "patches_input", "the channels that the convolution reads", target_modules=["projection", "v_proj"],
        feedforward_modules=["projection"], **SAVED),
    ia3("dinov2", None, "keys, values and the feed-forward", target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
]
OLDER = [
    lora("vit", "older", "names of transformers 4", target_modules=["query", "value"], **SAVED),
    lora("vit", "older_dense", "three modules end in `dense`", target_modules=["key", "dense"], rank_pattern={"attention.output.dense": 3},
         **SAVED),
    lora("deit", "older", "names of transformers 4", target_modules=["query", "value", "intermediate.dense"], **SAVED),
    lora("dinov2", "older", "names of transformers 4", target_modules=["query", "value", "fc1"], **SAVED),
    lora("dinov2_swiglu", "older", "one pair for gate and up", target_modules=["weights_in", "weights_out", "value"], **SAVED),
    ia3("vit", "older", "names of transformers 4", target_modules=["key", "value", "output.dense"],
        feedforward_modules=["output.dense"], **SAVED),
]


def make():
    from cases import write_case
    for c in OLDER:
        write_case(c)
