"""LoRA's variants in `peft`: DoRA everywhere, the starts that take the base apart, and how `peft` makes a plain LoRA of these.

A file of `pissa` or `olora` fits the base without its start, W - s·B0·A0: `peft` takes the start off again when it reads
such a file. `CONVERTED` are the same adapters as `peft` converts them (`path_initial_model_for_weight_conversion`): a
plain LoRA of twice the rank, [A; A0] and [B, -B0].

Trajectories that `peft` has no file for (LoRA+, a frozen A, MoSLoRA's mixer) say in `settings` what the recipe says, and
their `init_adapter` holds the parameters by name. The mixer is a transcription of Wu et al. 2024, equation 4: B·M·A.

`starts/` holds what data-driven starts make of a model and batches: EVA and CorDA by `peft`, LoRA-GA by a transcription of
its paper (`peft` multiplies B by singular values; the paper and its authors' program do not).
"""

import copy
import json
import tempfile
import warnings
from pathlib import Path

import peft
import torch

import cases
import zoo
from adapters_io import save_adapter
from batches import batches
from common import CASES, GOLDEN, TRAJECTORIES, fresh, rng, write_json, write_tensors
from rows import lora
from training import DEFAULTS, trajectory, well_posed

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAVED = dict(modules_to_save=["classifier"])
KASA, BLOCKS = peft.tuners.lora.config.KasaConfig, peft.tuners.lora.config.BdLoraConfig
PISSA, OLORA = dict(init_lora_weights="pissa"), dict(init_lora_weights="olora")

TABLE = [
    lora("llama", "dora", "magnitudes beside directions", use_dora=True, target_modules=LINEARS),
    lora("llama", "dora_embed", "magnitudes of a table's columns", use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    lora("llama_bias", "dora", "a bias is outside the magnitude", use_dora=True, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    lora("qwen2", "dora", "biases on q, k, v; ranks by module", use_dora=True, target_modules=LINEARS, rank_pattern={"up_proj": 2}),
    lora("bert", "dora", "query and value, trained classifier", use_dora=True),
    lora("bert", "dora_embed", "word and position tables", use_dora=True, target_modules=["word_embeddings", "position_embeddings", "query"]),
    lora("gpt2", "dora", "a matrix that the file stores transposed", use_dora=True, target_modules=["c_attn", "c_fc"]),
    lora("t5", "dora", "encoder and decoder", use_dora=True),
    lora("vit", "dora_patches", "the convolution that makes the patches", use_dora=True, target_modules=["projection", "q_proj"], **SAVED),
    lora("llama", "pissa", "the largest singular values taken off the base", target_modules=LINEARS, **PISSA),
    lora("qwen3", "pissa", "with rslora", use_rslora=True, target_modules=["q_proj", "v_proj"], **PISSA),
    lora("bert", "pissa", "trained classifier", **PISSA),
    lora("gpt2", "pissa", "a matrix that the file stores transposed", target_modules=["c_attn", "c_proj"], **PISSA),
    lora("t5", "pissa", "encoder and decoder", target_modules=["q", "wi"], **PISSA),
    lora("llama", "pissa_embed", "a table that starts as usual", target_modules=["embed_tokens", "q_proj"], **PISSA),
    lora("vit", "pissa", "trained classifier", target_modules=["q_proj", "fc1"], **SAVED, **PISSA),
    lora("llama", "pissa_patterns", "rank and alpha by module", target_modules=["q_proj", "k_proj", "down_proj"],
         rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.down_proj": 6}, alpha_pattern={"q_proj": 3}, **PISSA),
    lora("llama", "olora", "the first columns of Q taken off the base", target_modules=LINEARS, **OLORA),
    lora("roberta", "olora", "trained classifier of two layers", **OLORA),
    lora("qwen2", "olora", "with rslora", use_rslora=True, target_modules=["o_proj", "up_proj"], **OLORA),
    lora("llama", "orthogonal", "both factors drawn, their product zero", target_modules=LINEARS, init_lora_weights="orthogonal"),
    lora("llama", "mica", "B from the smallest singular values and not trained", target_modules=["q_proj", "v_proj"], init_lora_weights="mica"),
    lora("bert", "mica", "trained classifier", init_lora_weights="mica"),
    lora("llama", "eva", "as redistributed ranks are written", target_modules=["q_proj", "v_proj"], init_lora_weights="eva",
         eva_config=peft.EvaConfig(rho=1.5), rank_pattern={"model.layers.0.self_attn.q_proj": 6, "model.layers.1.self_attn.v_proj": 2},
         alpha_pattern={"model.layers.0.self_attn.q_proj": 12, "model.layers.1.self_attn.v_proj": 4}),
    lora("llama", "kasa", "the smallest singular values taken off, values of its own", target_modules=LINEARS, kasa_config=KASA()),
    lora("bert", "kasa", "trained classifier, other weights of its penalty", kasa_config=KASA(beta=1e-3, gamma=0.5)),
    lora("qwen2", "kasa", "with rslora", use_rslora=True, target_modules=["q_proj", "down_proj"], kasa_config=KASA()),
    lora("llama", "bdlora", "blocks of B in attention, of A behind it", target_modules=["q_proj", "v_proj", "o_proj"],
         use_bdlora=BLOCKS(target_modules_bd_b=["q_proj", "v_proj"], target_modules_bd_a=["o_proj"], nblocks=2)),
    lora("bert", "bdlora", "some whole, four blocks of the others", use_bdlora=BLOCKS(
        target_modules_bd_b=["query"], nblocks=4, match_strict=False)),
]
# Cases whose adapters are converted too.
CONVERTED = ["llama__lora_pissa", "llama__lora_pissa_patterns", "qwen3__lora_pissa", "llama__lora_olora", "gpt2__lora_pissa"]
# (`peft` loses modules that are trained whole when it converts, so no case has any.)


def started(c):
    """The model with the adapter as it starts."""
    config = peft.LoraConfig(task_type=cases.task_of(c["model"]), **copy.deepcopy(c["config"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return peft.get_peft_model(zoo.load(c["model"]), config).eval()


def converted(c):
    """The adapter of a case, as `peft` writes it without the start that was taken off the base."""
    name = cases.label(c)
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = started(c)
        start.peft_config["default"].init_lora_weights = True
        start.save_pretrained(f"{d}/start")
        model = cases.attach(c, zoo.load(c["model"]))
        model.save_pretrained(f"{d}/plain", path_initial_model_for_weight_conversion=f"{d}/start", save_embedding_layers=False)
        plain = peft.PeftModel.from_pretrained(zoo.load(c["model"]), f"{d}/plain")
        out = CASES / f"{name}_converted"
        written = cases.fresh(out)
        save_adapter(plain, written / "adapter", c["model"])
    meta = json.loads((CASES / name / "case.json").read_text())
    write_json(written / "case.json", {**meta, "case": out.name, "variant": f"{meta['variant']}_converted", "merge": False,
                                       "checks": "the same, converted to a plain LoRA of twice the rank"})
    (written / "logits.safetensors").write_bytes((CASES / name / "logits.safetensors").read_bytes())
    inputs = cases.tensors_of(cases.INPUTS / c["model"] / "inputs.safetensors")
    logits = cases.forward(plain, inputs)
    want = cases.tensors_of(CASES / name / "logits.safetensors")
    keep = want["mask"].bool()
    print(out.name, "off by", cases.relative(logits[keep], want["logits"][keep]), flush=True)


# name -> (model, kind of batches, options of training, settings of peft, settings of the recipe or None)
LORA = dict(r=4, lora_alpha=8)
PLAIN = dict(rank=4, alpha=8)
TRAINED = {
    "llama__lora_dora": ("llama", "full", {}, dict(LORA, use_dora=True, target_modules=LINEARS), None),
    "bert__lora_dora": ("bert", "padded", {}, dict(LORA, use_dora=True), None),
    "llama__lora_pissa": ("llama", "full", {}, dict(LORA, **PISSA), None),
    "qwen2__lora_olora": ("qwen2", "padded", {}, dict(LORA, target_modules=["q_proj", "o_proj"], **OLORA), None),
    "bert__lora_mica": ("bert", "padded", {}, dict(LORA, init_lora_weights="mica"), None),
    "llama__lora_kasa": ("llama", "full", {}, dict(LORA, kasa_config=KASA(beta=1e-2, gamma=1e-2)), None),
    "llama__lora_bdlora": ("llama", "full", {}, dict(LORA, use_bdlora=BLOCKS(
        target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)), None),
    "llama__lora_plus": ("llama", "full", dict(lr_ratio=16.0), LORA, dict(PLAIN, lr_ratio=16.0)),
    "llama__lora_plus_dora": ("llama", "padded", dict(lr_ratio=4.0, weight_decay=0.1), dict(LORA, use_dora=True),
                             dict(PLAIN, lr_ratio=4.0, dora=True)),
    "llama__lora_fa": ("llama", "full", {}, LORA, dict(PLAIN, freeze_a=True)),
    "llama__lora_mixer": ("llama", "full", {}, LORA, dict(PLAIN, mixer="kaiming")),
}


class Mixed(torch.nn.Module):
    """A, and M behind it."""

    def __init__(self, a, key):
        super().__init__()
        self.a, rank = a, a.weight.shape[0]
        bound = rank ** -0.5
        self.mixer = torch.nn.Parameter(torch.from_numpy(rng("mixer", key).uniform(-bound, bound, (rank, rank))).float())

    @property
    def weight(self):
        return self.mixer @ self.a.weight

    def forward(self, x):
        return self.a(x) @ self.mixer.t()


class Penalised(torch.nn.Module):
    """KaSA's loss: `peft` leaves its two terms to the caller."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        out = self.model(**batch)
        out.loss = out.loss + self.model.base_model._get_kasa_loss()
        return out

    def save_pretrained(self, *args, **kwargs):
        self.model.save_pretrained(*args, **kwargs)


def mixed(model, name):
    for key, m in model.named_modules():
        if hasattr(m, "lora_A"):
            m.lora_A["default"] = Mixed(m.lora_A["default"], f"{name}/{key}")
    return model


def parameters(model):
    """Every tensor of the adapter by its name in the file, the mixer and what is not trained too."""
    named = {}
    for key, p in model.named_parameters():
        if "lora_" in key or p.requires_grad:
            key = key.replace(".default.a.weight", ".default.weight").replace("lora_A.default.mixer", "lora_mixer")
            named[key.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = p
    return {k.replace(".modules_to_save", ""): p for k, p in named.items()}


def folded(model):
    """As it is saved: M·A in the place of A."""
    tensors = parameters(model)
    for key in [k for k in tensors if k.endswith("lora_mixer")]:
        a = key.replace("lora_mixer", "lora_A.weight")
        tensors[a] = tensors.pop(key) @ tensors[a]
    return tensors


def trained(name, out, salt):
    model, kind, options, config, settings = TRAINED[name]
    o = {**DEFAULTS, **options}
    data = batches(name + salt, model, kind, o["steps"] * o["batch_size"])
    torch.manual_seed(0)
    m = cases.attach(lora(model, "trajectory_" + name, "", **config), zoo.load(model))
    if name.endswith("_fa"):
        for key, p in m.named_parameters():
            p.requires_grad &= "lora_A" not in key
    if name.endswith("_mixer"):
        mixed(m, name)
    if name.endswith("_kasa"):
        m = Penalised(m)
    if settings is None:
        save_adapter(copy.deepcopy(m), out / "init_adapter", model)
    else:
        (out / "init_adapter").mkdir()
        write_tensors(out / "init_adapter/adapter_model.safetensors", parameters(m))
        write_json(out / "init_adapter/adapter_config.json", {"peft_type": "LORA"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = trajectory(m, data, zoo.is_causal(model), **options)
    if not well_posed(expected):
        return False
    if name.endswith("_mixer"):
        (out / "final_adapter").mkdir()
        write_tensors(out / "final_adapter/adapter_model.safetensors", folded(m))
        write_json(out / "final_adapter/adapter_config.json", {"peft_type": "LORA"})
    else:
        save_adapter(m, out / "final_adapter", model)
    write_tensors(out / "batches.safetensors", data)
    write_json(out / "expected.json", {"name": name, "model": model, "method": "lora", "settings": settings, "notes": None,
                                       "peft": peft.__version__, **expected})
    print(f"{name}: {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, {expected['self_check']}", flush=True)
    return True


STARTS = GOLDEN / "starts"


def signed(a, b=None):
    """Each component turned so that the largest number of its row of A is positive."""
    sign = torch.sign(a.gather(1, a.abs().argmax(1, keepdim=True)))
    return (a * sign, None if b is None else b * sign.t())


def batch_list(data, size):
    rows = len(data["input_ids"])
    return [{k: v[i:i + size] for k, v in data.items()} for i in range(0, rows, size)]


def write_start(name, model, data, size, settings, tensors, ranks=None):
    out = fresh(STARTS / name)
    write_tensors(out / "batches.safetensors", data)
    write_tensors(out / "expected.safetensors", {k: v.float().contiguous() for k, v in tensors.items()})
    write_json(out / "start.json", {"model": model, "batch_size": size, "settings": settings, "ranks": ranks,
                                    "peft": peft.__version__})
    print(name, len(tensors), "tensors", flush=True)


def eva(name, model, kind, r, rho, targets):
    data = batches("starts/" + name, model, kind, 16)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, init_lora_weights="eva",
                             eva_config=peft.EvaConfig(rho=rho, tau=0.9, use_label_mask=False))
    state = peft.get_eva_state_dict(zoo.load(model), batch_list(data, 4), config, show_progress_bar=False)
    tensors = {f"{k}.lora_A.weight": signed(v)[0] for k, v in state.items() if len(v)}
    settings = dict(rank=r, alpha=2 * r, init="eva", eva_rho=rho, eva_tau=0.9, init_batches=512)
    write_start(name, model, data, 4, dict(settings, targets=targets), tensors, {k: len(v) for k, v in state.items()})


def corda(name, model, kind, r, method, targets):
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda
    data = batches("starts/" + name, model, kind, 8)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, init_lora_weights="corda",
                             corda_config=CordaConfig(corda_method=method))
    base = zoo.load(model)

    def run():
        with torch.no_grad():
            for batch in batch_list(data, 1):
                base(**{k: v for k, v in batch.items() if k != "labels"})

    preprocess_corda(base, config, run_model=run)
    m = peft.get_peft_model(base, config)
    tensors = {}
    for key, layer in m.named_modules():
        if hasattr(layer, "lora_A"):
            path = key.removeprefix("base_model.model.")
            a, b = signed(layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data)
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a, b
    settings = dict(rank=r, alpha=2 * r, init="corda", corda_method=method, init_batches=4, targets=targets)
    write_start(name, model, data, 2, settings, tensors)


def lora_ga(name, model, kind, r, targets):
    """Wang, Yu and Li 2024, arXiv:2407.05000, section 3: A0 from the first r right singular vectors of the gradient, B0 from
    the next r left ones, both times out^(1/4)/sqrt(gamma)."""
    data = batches("starts/" + name, model, kind, 8)
    base = zoo.load(model)
    chosen = {k: m for k, m in base.named_modules() if any(k.endswith("." + t) for t in targets)}
    for p in base.parameters():
        p.requires_grad = False
    for m in chosen.values():
        m.weight.requires_grad = True
    parts = batch_list(data, 2)
    for part in parts:
        (base(**part).loss / len(parts)).backward()
    tensors = {}
    for key, m in chosen.items():
        u, _, vh = torch.linalg.svd(m.weight.grad.double(), full_matrices=False)
        size = m.weight.shape[0] ** 0.25 / 16 ** 0.5
        sign = torch.sign(vh.gather(1, vh.abs().argmax(1, keepdim=True)))
        u, vh = u * sign.t(), vh * sign
        tensors[f"{key}.lora_A.weight"] = (size * vh[:r]).float()
        tensors[f"{key}.lora_B.weight"] = (size * u[:, r:2 * r]).float().contiguous()
    settings = dict(rank=r, alpha=2 * r, init="lora-ga", init_batches=4, targets=targets)
    write_start(name, model, data, 2, settings, tensors)


def starts():
    # Twice the ranks looked for are all directions of an input, so that the random projections of `peft` are exact.
    eva("llama_eva", "llama", "full", 8, 2.0, ["q_proj", "v_proj", "o_proj"])
    eva("bert_eva", "bert", "padded", 16, 1.0, ["query", "value"])
    corda("llama_corda_ipm", "llama", "full", 4, "ipm", ["q_proj", "down_proj"])
    corda("llama_corda_kpm", "llama", "full", 4, "kpm", ["q_proj", "down_proj"])
    lora_ga("llama_lora_ga", "llama", "full", 8, ["q_proj", "v_proj", "up_proj"])
    lora_ga("bert_lora_ga", "bert", "padded", 3, ["query", "output.dense"])


def make():
    for c in TABLE:
        torch.manual_seed(0)  # KaSA's diagonal, around which it is filled
        cases.write_case(c)
    for c in TABLE:
        if cases.label(c) in CONVERTED:
            converted(c)
    for name in TRAINED:
        if not any(trained(name, fresh(TRAJECTORIES / name), salt) for salt in ("", "#1", "#2", "#3", "#4")):
            raise SystemExit(f"{name}: no well-posed batches found")
    starts()
