"""Cases of LoRA whose targets are parameters by their own names: the matrices of linear layers, of GPT-2's `Conv1D`, which `peft`
takes as they are stored, and tables, which it takes for matrices there. Patterns of ranks are held against these names, and a choice
of layers says nothing of them."""

import cases
import trajectories
from rows import lora

TABLE = [
    lora("llama", "parameters", "matrices by their own names", target_modules=[],
         target_parameters=["q_proj.weight", "layers.1.mlp.down_proj.weight"]),
    lora("bert", "parameters", "beside targets, every bias trained, a classifier", target_modules=["value"], bias="all", use_rslora=True,
         target_parameters=["intermediate.dense.weight"]),
    lora("t5", "parameters", "encoder and decoder", target_modules=[], target_parameters=["SelfAttention.v.weight", "wo.weight"]),
    lora("llama", "parameters_ranks", "ranks and scales by the names of matrices, layers of the modules alone", target_modules=["v_proj"],
         layers_to_transform=[1], exclude_modules=["down_proj"], target_parameters=["q_proj.weight", "down_proj.weight"],
         rank_pattern={"1.self_attn.q_proj.weight": 2, "q_proj": 7, "v_proj": 3}, alpha_pattern={"down_proj.weight": 3}),
    lora("llama", "parameters_embed", "a table beside a head, layers that nothing heeds", target_modules=["lm_head"], layers_to_transform=1,
         target_parameters=["embed_tokens.weight"]),
    lora("llama", "parameters_pissa", "the largest singular values taken off", target_modules=[], init_lora_weights="pissa",
         target_parameters=["o_proj.weight", "up_proj.weight"]),
    lora("qwen2", "parameters_bias", "the biases of these layers trained", target_modules=["o_proj"], bias="lora_only",
         target_parameters=["q_proj.weight"]),
    lora("gpt2", "parameters", "matrices as the file stores them", target_modules=[], rank_pattern={r"h\.1\..*c_attn\.weight": 2},
         alpha_pattern={"mlp.c_proj.weight": 5}, target_parameters=["c_attn.weight", "mlp.c_proj.weight"]),
    lora("gpt2", "parameters_embed", "tables of words and positions beside the head", merge=False, target_modules=["lm_head"],
         target_parameters=["wte.weight", "wpe.weight", "c_fc.weight"]),
    lora("gpt2", "parameters_pissa", "singular values of matrices as they are stored, taken off", target_modules=[], use_rslora=True,
         init_lora_weights="pissa", target_parameters=["c_attn.weight", "wpe.weight"]),
    lora("gpt2", "parameters_olora", "a basis of matrices as they are stored, taken off", target_modules=[], init_lora_weights="olora",
         target_parameters=["c_fc.weight"]),
    lora("bert", "parameters_embed", "tables", target_modules=["query"],
         target_parameters=["word_embeddings.weight", "token_type_embeddings.weight"]),
    lora("t5", "parameters_embed", "tables of both sides and of distances", merge=False, target_modules=[],
         target_parameters=["embed_tokens.weight", "relative_attention_bias.weight"]),
]
# name -> (model, kind of batches, options of training, method, settings)
LORA = dict(r=4, lora_alpha=8)
TRAINED = {
    "gpt2__lora_parameters": ("gpt2", "padded", {}, "lora", dict(
        LORA, target_modules=[], target_parameters=["wte.weight", "c_attn.weight"], rank_pattern={"c_attn.weight": 3})),
    "llama__lora_parameters": ("llama", "full", {}, "lora", dict(
        LORA, target_modules=["v_proj"], layers_to_transform=[0], target_parameters=["up_proj.weight", "embed_tokens.weight"])),
}


def make():
    for c in TABLE:
        cases.write_case(c)
    trajectories.TABLE.update(TRAINED)
    for name in TRAINED:
        if not any(trajectories.attempt(name, trajectories.fresh(trajectories.TRAJECTORIES / name), salt) for salt in ("", "#1", "#2")):
            raise SystemExit(f"{name}: no well-posed batches found")
