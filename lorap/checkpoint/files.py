"""Names of the files of a checkpoint."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REPORT = "lorap_report.json"
CARD = "README.md"

# What goes from the original to the compressed checkpoint unchanged.
SIDE_FILES = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
