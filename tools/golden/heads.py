"""Adapters of `peft` whose classifier has another number of labels than the base, or stands on a base without one."""

import peft
import torch
import transformers as tf

from adapters_io import fill_adapter, save_adapter
from common import GOLDEN, INPUTS, MODELS, TOLERANCE, forward, fresh, tensors_of, write_json, write_logits, write_tensors

HEADS = GOLDEN / "heads"
# name -> (base, class, labels, adapter, modules trained whole)
LORA = dict(r=2, lora_alpha=8)
TABLE = {
    "gpt2_cls__lora": ("gpt2_cls", "GPT2ForSequenceClassification", 7, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], **LORA)),
    "gpt2__lora": ("gpt2", "GPT2ForSequenceClassification", 3, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], **LORA)),
    "gpt2__prefix": ("gpt2", "GPT2ForSequenceClassification", 3, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "gpt2__prompt": ("gpt2", "GPT2ForTokenClassification", 4, peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=2)),
    "vit__lora": ("vit", "ViTForImageClassification", 2, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"], **LORA)),
    "bert__lora": ("bert", "BertForTokenClassification", 6, peft.LoraConfig(task_type="TOKEN_CLS", target_modules=["query"], **LORA)),
}


def make():
    for name, (base, cls, labels, config) in TABLE.items():
        torch.manual_seed(0)  # the start of the new head, around which it is filled
        model = getattr(tf, cls).from_pretrained(MODELS / base, num_labels=labels, ignore_mismatched_sizes=True,
                                                 attn_implementation="eager")
        if "GPT2" in cls:
            model.config.pad_token_id = 0
        model = peft.get_peft_model(model, config).eval()
        fill_adapter(model, "heads/" + name)
        inputs = {k: v for k, v in tensors_of(INPUTS / base / "inputs.safetensors").items() if k != "labels"}
        out = fresh(HEADS / name)
        save_adapter(model, out / "adapter", base)
        logits = forward(model, inputs)
        write_tensors(out / "inputs.safetensors", inputs)
        write_logits(out / "logits.safetensors", logits, inputs)
        write_json(out / "case.json", {"model": base, "class": cls, "labels": labels, "tolerance": TOLERANCE, "merge": isinstance(
            config, peft.LoraConfig), "peft": peft.__version__, "transformers": tf.__version__})
        print(name, tuple(logits.shape), flush=True)


if __name__ == "__main__":
    make()
