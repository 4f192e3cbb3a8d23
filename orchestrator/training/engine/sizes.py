"""Sizes of numbers, of the optimizer's state and of DeepSpeed's buffers, for engines, plans and searches. No torch."""

FP32, BF16 = 4, 2
MOMENTS = 2
"""Numbers that Adam keeps per trained parameter."""
# Numbers, not bytes ("ZeRO Optimizations" in DeepSpeed's documentation). A bucket is at most as large as all trained
# parameters.
BUCKET, LIVE, PREFETCHED = 500_000_000, 1_000_000_000, 50_000_000
BYTES_IN_CHECKPOINT = FP32 * (1 + MOMENTS)
"""Per trained parameter: the weight and Adam's moments."""
BYTES_IN_TRAINING = FP32 * (2 + MOMENTS)
"""Per trained parameter in fp32: the weight, the gradient and Adam's moments."""
BYTES_MOVED_BY_ADAM = FP32 * ((2 + MOMENTS) + (1 + MOMENTS))
"""Per trained parameter and step: weight, gradient and moments are read; weight and moments are written."""
