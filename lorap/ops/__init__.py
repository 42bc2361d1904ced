"""The math of LoRAP on torch tensors: pure functions, named as in the reference."""
