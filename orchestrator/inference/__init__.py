"""The trained model: predict, evaluate, chat, merge, and benchmarks of others."""
