"""How a row of the tables of cases is written down."""


def case(model, method, variant, checks, /, merge=True, side="", **config):
    return dict(model=model, method=method, variant=variant, checks=checks, merge=merge, side=side, config=config)


def lora(model, variant, checks, merge=True, side="", **config):
    config = {"r": 4, "lora_alpha": 8, **config}
    return case(model, "lora", variant, checks, merge, side, **config)


def ia3(model, variant, checks, merge=True, side="", **config):
    return case(model, "ia3", variant, checks, merge, side, **config)


def virtual(model, method, variant, checks, side="", tokens=4, **config):
    return case(model, method, variant, checks, False, side, num_virtual_tokens=tokens, **config)
