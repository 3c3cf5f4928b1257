"""Write the policy of a run as a directory that transformers, and whatever reads its format, loads:

    python -m nanorl.export runs/grpo exported
    python -m nanorl.export runs/grpo exported --dtype bfloat16
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanorl import run
from nanorl.errors import UserError
from nanorl.interop import write_pretrained


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint: str             # run, checkpoint file or pretrained directory
    directory: str              # to write: a new one, or an empty one
    dtype: Literal["float32", "bfloat16"] = "float32"    # of the weights in the file


@run.user_errors_as_sentences
def main(cfg: Config) -> None:
    try:
        checkpoint = run.load_checkpoint(cfg.checkpoint, "policy")
        model, tokenizer = run.model_from(checkpoint, torch.device("cpu")), run.tokenizer_from(checkpoint)
        write_pretrained(model, tokenizer, Path(cfg.directory), getattr(torch, cfg.dtype))
    except OSError as e:
        raise UserError(f"{cfg.directory}: cannot be written ({e.strerror})") from None
    print(f"Wrote {cfg.checkpoint} to {cfg.directory}: config.json, generation_config.json, model.safetensors and the "
          f"tokenizer's files, in {cfg.dtype}.")


if __name__ == "__main__":
    main(run.parse(Config))
