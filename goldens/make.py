"""Makes every fixture of the repository: `python goldens/make.py`."""

import tempfile
from pathlib import Path

import blocks
import families
import fields
import lora
import lora_settings
import pipelines
import prompts
import samplers
import single_file
import tokens
import torch_random


def main() -> None:
    torch_random.main()
    samplers.main()
    with tempfile.TemporaryDirectory() as scratch:
        tokens.make(Path(scratch))
        blocks.make()
        pipelines.make(Path(scratch))
        families.make(Path(scratch))
        fields.make()
        prompts.make(Path(scratch))
        single_file.make(Path(scratch))
        lora.make(Path(scratch) / "lora")
        lora_settings.make(Path(scratch) / "lora_settings")


if __name__ == "__main__":
    main()
