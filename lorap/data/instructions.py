"""Instructions, and the prompt that Stanford Alpaca puts them in."""

from __future__ import annotations

from dataclasses import dataclass

PROMPT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.

### Instruction:
{instruction}

### Response:
"""

PROMPT_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""
"""The format of github.com/tatsu-lab/stanford_alpaca, with a line break after "Response:" as in
github.com/tloen/alpaca-lora at commit 8d58d37, ``templates/alpaca.json``."""


@dataclass(frozen=True)
class Instruction:
    """An instruction and the response that is wanted.

    Attributes
    ----------
    instruction : str
    input : str
        What the instruction is about; may be empty.
    output : str
        The response.
    """

    instruction: str
    input: str
    output: str

    def prompt(self) -> str:
        """Return what stands before the response. SPEC: ``recovery.prompt``."""
        template = PROMPT_WITH_INPUT if self.input else PROMPT
        return template.format(instruction=self.instruction, input=self.input)

    def text(self) -> str:
        """Return prompt and response."""
        return self.prompt() + self.output
