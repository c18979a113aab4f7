#!/usr/bin/env python3
"""Makes the fixtures under tests/golden: `python tools/golden/make.py [--only GROUP]`; README.md beside this says how."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# group -> (module, environment); models come first, the others load them
GROUPS = {
    "models": ("zoo", "peft"),
    "cases": ("cases", "peft"),
    "lora": ("cases_lora", "peft"),
    "interchange": ("cases_interchange", "peft"),
    "numbers": ("cases_numbers", "peft"),
    "edges": ("cases_edges", "peft"),
    "bitfit": ("selective", "peft"),
    "heads": ("heads", "peft"),
    "combine": ("combine", "peft"),
    "compose": ("compose", "peft"),
    "trajectories": ("trajectories", "peft"),
    "kronecker": ("cases_kronecker", "peft"),
    "kronecker-own": ("kronecker_own", "peft"),
    "torch-random": ("torch_random", "peft"),
    "numpy-random": ("numpy_random", "peft"),
    "topk": ("topk", "peft"),
    "vpt": ("vpt", "peft"),
    "hyper": ("hyper", "peft"),
    "pha": ("pha", "peft"),
    "tasks": ("cases_tasks", "peft"),
    "coda": ("coda", "peft"),
    "side": ("side", "peft"),
    "adamix": ("adamix", "peft"),
    "prompts": ("cases_prompts", "peft"),
    "prompts-own": ("prompts_own", "peft"),
    "transfer": ("cases_transfer", "peft"),
    "tokens": ("cases_selective", "peft"),
    "masks": ("masks", "peft"),
    "multiplicative": ("cases_multiplicative", "peft"),
    "psoft": ("psoft", "peft"),
    "hiwi": ("hiwi", "peft"),
    "ranks": ("cases_ranks", "peft"),
    "low_rank": ("low_rank", "peft"),
    "lora-forms": ("cases_lora_forms", "peft"),
    "stages": ("stages", "peft"),
    "generation": ("generation", "peft"),
    "images": ("images", "peft"),
    "nf4": ("nf4", "peft"),
    "buckets": ("buckets", "peft"),
    "schedules": ("schedules", "peft"),
    "older": ("cases_vit", "adapters"),
    "bottleneck": ("bottleneck", "adapters"),
    "fusion": ("cases_fusion", "adapters"),
    "instance": ("cases_instance", "peft"),
    "adapters": ("cases_adapters", "adapters"),
    "activations": ("cases_activations", "peft"),
    "weights": ("cases_weights", "peft"),
    "parameters": ("cases_parameters", "peft"),
    "cartridge": ("cases_cartridge", "peft"),
    "decompositions": ("cases_decompositions", "peft"),
    "hybrid-own": ("cases_hybrid", "peft"),
    "s4": ("s4", "peft"),
    "hybrid": ("hybrid", "adapters"),
    "hub": ("cases_hub", "adapters"),
    "hub-heads": ("cases_hub_heads", "adapters"),
}


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--only", choices=GROUPS, help="one group")
    ap.add_argument("--adapters-python", default=os.environ.get("ADAPTERS_PYTHON", ""),
                    help="interpreter of the environment of requirements-adapters.txt; needed by the groups `older`, `bottleneck` and `hybrid`")
    a = ap.parse_args()
    for group in [a.only] if a.only else GROUPS:
        module, environment = GROUPS[group]
        print(f"== {group}", flush=True)
        if environment == "adapters":
            if not a.adapters_python:
                sys.exit(f"group {group} needs --adapters-python (see tools/golden/README.md)")
            code = f"import {module}; {module}.make()"
            subprocess.run([a.adapters_python, "-c", code], check=True, cwd=Path(__file__).resolve().parent)
        else:
            importlib.import_module(module).make()


if __name__ == "__main__":
    main()
