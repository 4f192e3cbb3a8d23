"""Bytes of numbers, of the optimizer's state and of DeepSpeed's buffers, for engines, plans and searches. No torch."""

FP32, BF16 = 4, 2
MOMENTS = 2
"""Adam's numbers for each trained one."""
# Numbers, not bytes ("ZeRO Optimizations" in DeepSpeed's documentation). The bucket is no larger than what is trained.
BUCKET, LIVE, PREFETCHED = 500_000_000, 1_000_000_000, 50_000_000
BYTES_IN_CHECKPOINT = FP32 * (1 + MOMENTS)
"""Of each trained number: the weight and Adam's moments."""
BYTES_IN_TRAINING = FP32 * (2 + MOMENTS)
"""Of each trained number in fp32: the weight, the gradient and Adam's moments."""
BYTES_MOVED_BY_ADAM = FP32 * ((2 + MOMENTS) + (1 + MOMENTS))
"""Of each trained number in a step: weight, gradient and moments are read; weight and moments are written."""
