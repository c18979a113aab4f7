"""The peer of `engraft-bench matmul`: PyTorch's F.linear.

Reads one JSON object a line from standard input, {"rows", "out", "in", "precision": "f32" | "bf16", "threads", "runs"}, and
answers each with one line, {"seconds": [...]}. The first line it writes names the version.
"""

import json
import sys
import time

import torch


def main():
    torch.manual_seed(0)
    print(json.dumps({"version": torch.__version__}), flush=True)
    kept = {}
    for line in sys.stdin:
        job = json.loads(line)
        torch.set_num_threads(job["threads"])
        key = (job["rows"], job["out"], job["in"], job["precision"])
        if key not in kept:
            dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
            kept[key] = (torch.randn(key[0], key[2]).to(dtype), torch.randn(key[1], key[2]).to(dtype))
        x, w = kept[key]
        seconds = []
        with torch.inference_mode():
            torch.nn.functional.linear(x, w)
            for _ in range(job["runs"]):
                start = time.perf_counter()
                torch.nn.functional.linear(x, w)
                seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
