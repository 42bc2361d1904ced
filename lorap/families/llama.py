"""LLaMA 1 to 3, and what shares their model type."""

from lorap.families.base import Family

LLAMA = Family(model_type="llama", class_prefix="LorapLlama")
