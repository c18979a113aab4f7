"""The buckets of T5's relative positions, whose borders hang on rounding in f32."""

import torch
from transformers.models.t5.modeling_t5 import T5Attention

from common import GOLDEN, fresh, write_json

FARTHEST = 160
# bidirectional, buckets, greatest distance
TABLE = [(True, 32, 128), (False, 32, 128), (True, 8, 13), (False, 8, 13), (True, 64, 150), (False, 20, 50)]


def make():
    relative = torch.arange(-FARTHEST, FARTHEST + 1)
    rows = [{"bidirectional": both, "num_buckets": count, "max_distance": far, "first_relative_position": -FARTHEST,
             "buckets": T5Attention._relative_position_bucket(relative, both, count, far).tolist()} for both, count, far in TABLE]
    write_json(fresh(GOLDEN / "positions") / "t5_buckets.json", rows)
