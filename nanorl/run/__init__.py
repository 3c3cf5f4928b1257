"""What every script needs around its algorithm: flags, device, optimizer, checkpoints, the directory and loop of a run, and the
stages before it. The only algorithm in here is the optimizer's.

    flags.py        a dataclass of flags, and the command line that it makes
    device.py       seeds, devices, precision, compiling
    optimizer.py    AdamW and Muon stepped as one, the schedule
    checkpoint.py   writing and reading ckpt.pt, and the models in it
    directory.py    runs/<name>/{config.json, *.jsonl, ckpt.pt} and the loop over its steps
    start.py        the prologue that scripts share, and the stages that come before a run
    ranks.py        several GPUs

A script is a dataclass of flags and a main(cfg). A run that was killed at any moment continues with --resume as if nothing
had happened: every random stream is derived from (seed, purpose, step), so the step is all the random state there is to save.
"""

from nanorl.errors import UserError, printable, user_errors_as_sentences
from nanorl.run import ranks
from nanorl.run.checkpoint import (check_finite, load_checkpoint, load_frozen, model_from, tokenizer_from, trained_state,
                                   write_atomically)
from nanorl.run.device import (autocast, compile_for_training, compile_models, derive, find_device, generator, in_float32,
                               peak_flops, pick_device, uses_bfloat16, wants_compile)
from nanorl.run.directory import Run, read_lines, script
from nanorl.run.flags import (Bound, Count, DeviceConfig, Natural, NonNegative, PolicyConfig, Positive, RolloutConfig,
                              RunConfig, Share, VerifierName, check_judge, flag_of, parse, read_config)
from nanorl.run.optimizer import Optimizers, schedule
from nanorl.run.start import (begin, check_fits_context, choose_task, cut_answers, ensure_stage, policy_from, stage_dir,
                              trainable_copy, warn)
