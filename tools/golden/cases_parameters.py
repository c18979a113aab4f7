"""Cases of LoRA whose targets are parameters by their own names: the matrices of linear layers."""

import cases
from rows import lora

TABLE = [
    lora("llama", "parameters", "matrices by their own names", target_modules=[],
         target_parameters=["q_proj.weight", "layers.1.mlp.down_proj.weight"]),
    lora("bert", "parameters", "beside targets, every bias trained, a classifier", target_modules=["value"], bias="all", use_rslora=True,
         target_parameters=["intermediate.dense.weight"]),
    lora("t5", "parameters", "encoder and decoder", target_modules=[], target_parameters=["SelfAttention.v.weight", "wo.weight"]),
]


def make():
    for c in TABLE:
        cases.write_case(c)
