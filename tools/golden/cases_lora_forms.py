"""LoRAs of `peft` that are another product in training or on some tokens: VeLoRA, MonteCLoRA, aLoRA; and `use_qalora`, which `peft`
heeds over GPTQ layers alone. Besides, rows of tables (`trainable_token_indices`) beside factors at the head that follows them, and
beside AdaLoRA's triplets.

`peft` leaves MonteCLoRA's term of the loss to the caller and draws from PyTorch's generator. In the trajectories the draws are those
of the engine (philox.py with seed 0, streams "PATH.STEP.MICRO.{samples,wishart,shares}"), handed to `peft` in the place of its
buffer; the term adds its gradient and not its value, since the engine's loss is that of the data.

The texts of aLoRA's cases are the model's, with the invocation put into some of them: twice, at the end, and in part.
"""

import copy
import itertools
import warnings

import peft
import torch
import transformers
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig

import cases
import cases_interchange
import cases_ranks
import philox
import zoo
from adapters_io import save_adapter
from batches import batches
from common import (CASES, INPUTS, TOLERANCE, TRAJECTORIES, forward, forward_both, fresh, logits_mask, relative, tensors_of,
                    write_json, write_logits, write_tensors)
from rows import lora
from training import DEFAULTS, trajectory, well_posed

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATION = [7, 5, 9]
ALORA = dict(merge=False, alora_invocation_tokens=INVOCATION)


def velora(**own):
    return dict(velora_config=VeloraConfig(**own))


def monteclora(**own):
    return dict(monteclora_config=MontecloraConfig(buffer_size=2, **own))


TABLE = [
    lora("llama", "velora", "all linears, more pieces than inputs", target_modules=LINEARS, **velora()),
    lora("llama", "velora_left", "padding on the left, a drawn direction", side="_left", **velora(num_groups=5, init_type="random")),
    lora("bert", "velora", "trained classifier", **velora(num_groups=8, scale=2, init_type="batch_average_once")),
    lora("gpt2", "velora", "a matrix that the file stores transposed", target_modules=["c_attn", "c_fc"],
         **velora(num_groups=8, init_type="random")),
    lora("t5", "velora", "encoder and decoder, with rslora", use_rslora=True, target_modules=["q", "wi"], **velora(num_groups=4, scale=0.5)),
    lora("llama", "velora_pissa", "the largest singular values taken off the base", init_lora_weights="pissa", **velora(num_groups=8)),
    lora("llama", "monteclora", "all linears", target_modules=LINEARS, **monteclora()),
    lora("llama", "monteclora_left", "padding on the left, other weights", side="_left", lora_bias=True, merge=False,
         **monteclora(num_samples=3, use_entropy=True, dirichlet_prior=1, kl_loss_weight=0.01)),
    lora("bert", "monteclora", "trained classifier, ranks by module", rank_pattern={"value": 2}, **monteclora(sample_scaler=3e-4)),
    lora("gpt2", "monteclora", "a matrix that the file stores transposed", target_modules=["c_attn"], **monteclora(num_samples=1)),
    lora("t5", "monteclora", "encoder and decoder", **monteclora(num_samples=2)),
    lora("llama_tied", "tokens_head", "a head that follows rows and has factors", merge=False, target_modules=["q_proj", "lm_head"],
         trainable_token_indices=[9, 4]),
    cases_ranks.adalora("llama", "tokens", "rows of the table, and keys that are not read", trainable_token_indices=[3, 70, 11],
                        use_rslora=True, alpha_pattern={"q_proj": 3}, qalora_group_size=4),
    cases_ranks.adalora("llama_tied", "tokens_head", "a head that follows rows and has triplets", merge=False,
                        target_modules=["q_proj", "lm_head"], trainable_token_indices=[9, 4]),
    lora("llama", "qalora", "over layers that are no GPTQ layers, where it is a plain LoRA", use_qalora=True, qalora_group_size=8),
]
# Over bases in half precision; what is no parameter may stay in it.
HALF = [
    lora("llama_bf16", "velora", "the direction over a base in bf16", target_modules=["q_proj"], **velora(num_groups=8, init_type="random")),
    lora("llama_bf16", "monteclora", "what was drawn last over a base in bf16", target_modules=["q_proj"], **monteclora(num_samples=2)),
]
ACTIVATED = [
    lora("llama", "alora", "from the last invocation on", target_modules=LINEARS, **ALORA),
    lora("llama", "alora_left", "padding on the left", side="_left", **ALORA),
    lora("qwen2", "alora", "with a bias of the product", lora_bias=True, use_rslora=True, target_modules=["q_proj", "down_proj"], **ALORA),
    lora("gpt2", "alora", "a matrix that the file stores transposed", target_modules=["c_attn", "c_proj"], **ALORA),
    lora("llama", "alora_head", "the head among the targets", target_modules=["q_proj", "lm_head"], **ALORA),
    lora("llama_tied", "alora_head", "a tied head alone, padding on the left", side="_left", target_modules=["lm_head"], use_rslora=True,
         **ALORA),
    lora("llama", "alora_one", "an invocation of one token", merge=False, alora_invocation_tokens=[7]),
]


def invoked(ids, mask):
    """`ids` with the invocation: twice in the first row, at the end of the second, in part in the third."""
    ids = ids.clone()
    for row, starts, length in ((0, (2, 6), 3), (1, (-3,), 3), (2, (1,), 2)):
        real = mask[row].nonzero().flatten()
        for start in starts:
            ids[row, real[start:][:length]] = torch.tensor(INVOCATION[:length])
    return ids


def activated(c):
    """A case with texts of its own. `peft` looks for the invocation in the tokens that its model is given."""
    name, side = cases.label(c), c["side"]
    out = fresh(CASES / name)
    inputs = tensors_of(INPUTS / c["model"] / f"inputs{side}.safetensors")
    inputs["input_ids"] = invoked(inputs["input_ids"], inputs["attention_mask"])
    base = forward(zoo.load(c["model"]), inputs)
    model = cases.attach(c, zoo.load(c["model"]))
    logits, rel = forward_both(model, inputs)
    save_adapter(model, out / "adapter", c["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = forward(peft.PeftModel.from_pretrained(zoo.load(c["model"]), out / "adapter"), inputs)
    keep = logits_mask(logits, inputs).bool()
    same = [bool(torch.allclose(logits[i][keep[i]], base[i][keep[i]], atol=1e-6)) for i in range(3)]
    assert same == [False, False, c["config"]["alora_invocation_tokens"] == INVOCATION], same
    meta = {
        "case": name, "model": c["model"], "method": "lora", "variant": c["variant"], "checks": c["checks"], "merge": False,
        "task_type": cases.task_of(c["model"]), "tolerance": TOLERANCE, "num_virtual_tokens": 0, "inputs": "./inputs.safetensors",
        "effect_rel": relative(logits, base), "peft": peft.__version__, "transformers": transformers.__version__,
        "self_check": {"f32_f64_rel": rel, "reload_rel": relative(again[keep], logits[keep])},
    }
    assert rel < 1e-5 and meta["self_check"]["reload_rel"] < 1e-6 and meta["effect_rel"] > 0.01, meta
    meta["generation"] = generation(model, inputs)
    write_tensors(out / "inputs.safetensors", inputs)
    write_logits(out / "logits.safetensors", logits, inputs)
    write_json(out / "case.json", meta)
    print(f"{name}: effect {meta['effect_rel']:.2f}, {meta['self_check']}", flush=True)


def generation(model, inputs, count=8):
    """How `peft` goes on with each text alone, greedily and past the end token."""
    out = []
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = None
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        ids = ids[mask.bool()]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = model.generate(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=count, do_sample=False,
                                   pad_token_id=0)
        assert found.shape[1] == len(ids) + count
        out.append({"prompt": ids.tolist(), "new_tokens": found[0, len(ids):].tolist()})
    return out


class Drawn:
    """The engine's draws of one matrix in the place of `peft`'s buffer; a forward a step."""

    def __init__(self, sampler, path):
        self.path, self.step = path, 0
        self.samples, self.inn, self.rank = sampler.num_samples, sampler.in_features, sampler.out_features

    def get(self):
        self.step += 1

        def normal(what, *shape):
            return torch.from_numpy(philox.normal(0, f"{self.path}.{self.step}.0.{what}", shape))

        return {"z_mvn": normal("samples", self.samples, self.rank, self.inn).transpose(1, 2).contiguous(),
                "z_wishart": torch.diag((normal("wishart", self.rank, self.rank) ** 2).sum(0)),
                "z_dirichlet": normal("shares", self.samples)}


class Variational(torch.nn.Module):
    """MonteCLoRA's term beside the loss of the data."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        out = self.model(**batch)
        term = self.model.base_model._get_monteclora_loss()
        out.loss = out.loss + (term - term.detach())
        return out

    def save_pretrained(self, *args, **kwargs):
        self.model.save_pretrained(*args, **kwargs)


# name -> (model, kind of batches, options of training, settings)
LORA = dict(r=4, lora_alpha=8)
TRAINED = {
    "llama__lora_velora": ("llama", "full", {}, dict(LORA, target_modules=LINEARS, **velora(num_groups=8))),
    "llama__lora_velora_once": ("llama", "full", dict(gradient_accumulation=2), dict(
        LORA, **velora(num_groups=5, scale=0.5, init_type="batch_average_once"))),
    "gpt2__lora_velora": ("gpt2", "padded", {}, dict(LORA, **velora(num_groups=16, init_type="random"))),
    "bert__lora_velora": ("bert", "full", {}, dict(LORA, **velora(num_groups=16))),
    "llama__lora_monteclora": ("llama", "full", {}, dict(LORA, target_modules=["q_proj", "v_proj", "down_proj"], **monteclora(
        num_samples=4, sample_scaler=0.05, kl_loss_weight=0.01, use_entropy=True))),
    "bert__lora_monteclora": ("bert", "padded", {}, dict(LORA, **monteclora(sample_scaler=0.02))),
    "llama__lora_alora": ("llama", "padded", {}, dict(LORA, alora_invocation_tokens=INVOCATION)),
    "llama__lora_alora_head": ("llama", "padded", {}, dict(LORA, target_modules=["v_proj", "lm_head"], alora_invocation_tokens=INVOCATION)),
    "qwen2__lora_alora": ("qwen2", "full", {}, dict(LORA, lora_bias=True, target_modules=["q_proj", "up_proj"],
                                                    alora_invocation_tokens=INVOCATION)),
}
# As in cases_ranks.py
TRIPLETS = {"llama_tied__adalora_tokens": ("llama_tied", "full", {}, dict(
    tinit=1, tfinal=2, target_modules=["q_proj", "lm_head"], trainable_token_indices=[30, 9, 52]))}


def started(name, model, config):
    """The model with its start adapter, whose own layers alone are in training mode: the base's dropout rests."""
    torch.manual_seed(0)
    m = cases.attach(lora(model, "trajectory_" + name, "", **config), zoo.load(model))
    for key, layer in m.named_modules():
        if hasattr(layer, "lora_A"):
            layer.train()
            for sampler in getattr(layer, "lora_monteclora_sampler", {}).values():
                sampler.sampler = Drawn(sampler, key.removeprefix("base_model.model."))
    return Variational(m) if "monteclora_config" in config else m


def trained(name, out, salt):
    model, kind, options, config = TRAINED[name]
    o = {**DEFAULTS, **options}
    data = batches(name + salt, model, kind, o["steps"] * o["batch_size"] * o["gradient_accumulation"])
    if "alora_invocation_tokens" in config:
        # In every row but each fifth, which the base alone answers.
        for row, at in zip(range(len(data["input_ids"])), itertools.cycle((0, 1, 0, 1, None))):
            if at is not None:
                data["input_ids"][row, at:at + 3] = torch.tensor(INVOCATION)
                data["labels"][row, at:at + 3] = torch.tensor(INVOCATION)
    m = started(name, model, config)
    save_adapter(copy.deepcopy(m), out / "init_adapter", model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = trajectory(m, data, zoo.is_causal(model), **options)
    if not well_posed(expected):
        print(name + salt, expected["self_check"], expected["rounding_only_tensors"], flush=True)
        return False
    save_adapter(m, out / "final_adapter", model)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": model, "method": "lora", "settings": None, "notes": None,
                                       "peft": peft.__version__, "transformers": transformers.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


def make(only=""):
    for c in TABLE:
        if only in cases.label(c):
            torch.manual_seed(0)  # directions and spreads
            cases.write_case(c)
    for c in HALF:
        if only in cases.label(c):
            torch.manual_seed(0)
            cases_interchange.write_case(c)
    for c in ACTIVATED:
        if only in cases.label(c):
            activated(c)
    cases_ranks.TRAJECTORIES_TABLE.update(TRIPLETS)
    for name in TRIPLETS:
        if only in name and not any(cases_ranks.attempt(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
    for name in TRAINED:
        if only in name and not any(trained(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")


if __name__ == "__main__":
    import sys
    make(*sys.argv[1:])
