"""Use a trained model: predict, evaluate, chat, export, and benchmarks of other packages."""
