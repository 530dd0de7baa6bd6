"""What the benchmarks measure: shapes [N, K] of linears and the numbers of rows of x."""

# A 135M and a 7B model's linears: attention, down, up and gate projections; a square one.
WEIGHTS = [(576, 576), (576, 1536), (1536, 576), (4096, 4096)]
# Decoding, small batches, a prompt, a batch of prompts.
ROWS = [1, 4, 16, 64, 512]
GROUP_SIZE = 64
# [tokens, channels] of one calibration batch.
ACTIVATIONS = [(16384, 576), (16384, 4096)]
# Weights are rotated through this many bytes, so that one row of x meets weights in memory as decoding does, not in a cache.
ROTATED_BYTES = 160_000_000
