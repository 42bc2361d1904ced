"""Knowledge recovery by LoRA: Section 3.4.

``training`` makes an adapter for a compressed model, ``merging`` puts an adapter into it. PEFT and
accelerate are needed for the first alone, and imported by ``layers`` and ``trainer`` only.
"""

from lorap.recovery.merging import merge_adapter
from lorap.recovery.settings import RecoveryConfig
from lorap.recovery.training import recover

__all__ = ["RecoveryConfig", "merge_adapter", "recover"]
