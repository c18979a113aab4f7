"""The training loop of the trajectories: AdamW as in torch, a schedule of `transformers`, clipping, accumulation.

The loss of an optimizer step is the mean over all label tokens of its micro-batches (over rows for sequence
classification). The run is repeated in f64, and once more without updates, to show what rounding and training do.
"""

import copy

import torch
import transformers as tf

from common import doubled

DEFAULTS = dict(steps=8, batch_size=2, learning_rate=1e-3, weight_decay=0.0, schedule="constant", warmup_ratio=0.0,
                max_grad_norm=0.0, gradient_accumulation=1)


def trainable(model):
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


def label_count(model, batch, causal):
    """Labels that the loss counts: a causal model does not predict the first token, unless a soft prompt precedes it."""
    if causal and not getattr(model, "predicts_first", False):
        return int((batch["labels"][:, 1:] != -100).sum())
    return int((batch["labels"] != -100).sum())


def schedule_of(optimizer, o):
    warmup = round(o["warmup_ratio"] * o["steps"])
    if o["schedule"] == "constant":
        return tf.get_constant_schedule_with_warmup(optimizer, warmup)
    make = {"linear": tf.get_linear_schedule_with_warmup, "cosine": tf.get_cosine_schedule_with_warmup}[o["schedule"]]
    return make(optimizer, warmup, o["steps"])


def optimizer_of(model, o):
    """AdamW; with `lr_ratio` that of LoRA+, whose rate of B is so many times that of A."""
    kind = dict(lr=o["learning_rate"], betas=(0.9, 0.999), eps=1e-8)
    if "lr_ratio" in o:
        from peft.optimizers import create_loraplus_optimizer  # the other libraries' environment has no peft
        return create_loraplus_optimizer(
            model, torch.optim.AdamW, loraplus_lr_ratio=o["lr_ratio"], loraplus_weight_decay=o["weight_decay"], **kind)
    return torch.optim.AdamW(list(trainable(model).values()), weight_decay=o["weight_decay"], **kind)


def run(model, batches, o, causal, update=True):
    """Trains `model` in place; losses, learning rates and gradient norms (before clipping), one a step."""
    params = list(trainable(model).values())
    optimizer = optimizer_of(model, o)
    schedule = schedule_of(optimizer, o)
    losses, rates, norms = [], [], []
    size, parts = o["batch_size"], o["gradient_accumulation"]
    for step in range(o["steps"]):
        micro = [{k: v[i * size:(i + 1) * size] for k, v in batches.items()} for i in range(step * parts, (step + 1) * parts)]
        counts = [label_count(model, b, causal) for b in micro]
        total = 0.0
        for b, n in zip(micro, counts):
            loss = model(**b).loss * (n / sum(counts))
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        # What a method does to the gradients of a step; steps count from 1.
        before = getattr(model, "before_update", None)
        if before is not None:
            before(model, step + 1, optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
        limit = o["max_grad_norm"] or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, limit)))
        if update:
            optimizer.step()
            # What a method does after an update; steps count from 1.
            after = getattr(model, "after_update", None)
            if after is not None:
                after(model, step + 1, optimizer)
        schedule.step()
        optimizer.zero_grad()
    return losses, rates, norms


def well_posed(expected):
    """Whether rounding stays small: by chance a gradient may be so near zero that Adam makes its noise a full step.

    The one tensor with a gradient of exactly zero is the bias of keys under absolute positions: softmax ignores it.
    """
    check = expected["self_check"]
    return (check["loss_f32_f64_rel"] < 2e-6 and check["final_adapter_f32_f64_rel_to_movement"] < 2e-4
            and all(k.endswith(("key.bias", "k_proj.bias")) for k in expected["rounding_only_tensors"]))


def trajectory(model, batches, causal, **options):
    """Trains `model` in place and returns what expected.json says about the run."""
    o = {**DEFAULTS, **options}
    torch.manual_seed(0)
    start = {k: p.detach().clone() for k, p in trainable(model).items()}
    wide, still = doubled(model), copy.deepcopy(model)
    losses, rates, norms = run(model, batches, o, causal)
    losses64, _, _ = run(wide, batches, o, causal)
    fixed, _, _ = run(still, batches, o, causal, update=False)
    final, final64 = trainable(model), trainable(wide)
    unmoved, noise, worst, worst_moved = [], [], 0.0, 0.0
    for k, p in final.items():
        err = float((p.detach().double() - final64[k].detach()).abs().max())
        moved = float((p.detach() - start[k]).abs().max())
        size = float(p.detach().abs().max())
        if moved == 0.0:
            unmoved.append(k)
        elif err > 1e-3 * moved:
            noise.append(k)
        else:
            # What training brought to zero has no size.
            worst, worst_moved = max(worst, err / size if size else err), max(worst_moved, err / moved)
    loss_rel = max(abs(a - b) / abs(b) for a, b in zip(losses, losses64))
    effect = max(abs(a - b) / abs(b) for a, b in zip(losses, fixed))
    assert effect > 1e-4, effect
    return {
        **o, "losses": losses, "losses_f64_run": losses64, "losses_without_updates": fixed, "learning_rates": rates,
        "grad_norms": norms, "loss_rel_tolerance": 1e-4, "adapter_rel_tolerance": 1e-3, "movement_rel_tolerance": 5e-3,
        "trainable_parameters": sum(p.numel() for p in final.values()), "trainable_tensors": len(final),
        "unmoved_tensors": unmoved, "rounding_only_tensors": noise,
        "self_check": {"loss_f32_f64_rel": loss_rel, "effect_of_training_on_loss_rel": effect,
                       "final_adapter_f32_f64_rel": worst, "final_adapter_f32_f64_rel_to_movement": worst_moved},
    }
