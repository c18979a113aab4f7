"""Learning rates by step of the schedules of `transformers`, and AdamW of torch on given gradients."""

import torch
import transformers as tf

from common import GOLDEN, fresh, rng, write_json

KINDS = {"constant": tf.get_constant_schedule_with_warmup, "linear": tf.get_linear_schedule_with_warmup,
         "cosine": tf.get_cosine_schedule_with_warmup}


def rates(kind, steps, warmup, peak):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    extra = [] if kind == "constant" else [steps]
    schedule = KINDS[kind](optimizer, warmup, *extra)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return {"schedule": kind, "steps": steps, "warmup_steps": warmup, "learning_rate": peak, "learning_rates": out}


def adamw(name, decay, clip, steps=12, size=7, rate=0.02):
    """f64 throughout; `clip` 0 is off; the second tensor gets no gradient in odd steps (zeros, not none)."""
    params = [torch.nn.Parameter(torch.from_numpy(rng("adamw", name, i).standard_normal(size))) for i in range(2)]
    start = [p.tolist() for p in params]
    optimizer = torch.optim.AdamW(params, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    gradients, norms, values = [], [], []
    for step in range(steps):
        g = rng("adamw", name, "gradient", step)
        for i, p in enumerate(params):
            p.grad = torch.from_numpy(g.standard_normal(size) * (0.0 if i == 1 and step % 2 else 10.0 ** g.integers(-4, 2)))
        gradients.append([p.grad.tolist() for p in params])
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, clip or float("inf"))))
        optimizer.step()
        values.append([p.tolist() for p in params])
    return {"name": name, "learning_rate": rate, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": decay,
            "max_grad_norm": clip, "start": start, "gradients": gradients, "grad_norms": norms, "values": values}


def make():
    out = fresh(GOLDEN / "optim")
    write_json(out / "schedules.json", [rates(k, n, w, lr) for k in KINDS for n, w, lr in
                                        [(10, 0, 1e-3), (10, 3, 2e-4), (25, 5, 1e-3), (8, 8, 1.0), (1, 0, 1e-3)]])
    write_json(out / "adamw.json", [adamw("plain", 0.0, 0.0), adamw("decay", 0.1, 0.0), adamw("decay_clip", 0.01, 0.5)])
