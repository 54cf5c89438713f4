"""LLaMA-Factory's own training, for train_step.py, which starts it in an environment that has it: the arguments are a folder
with settings and rows, and how many steps are a turn.

Each line on stdin is a turn, and is answered in JSON: seconds of its steps but the first, and losses of all.
"""

import ctypes
import gc
import json
import os
import sys
import time
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import transformers
from datasets import Dataset, DatasetDict

sys.modules["torchaudio"] = ModuleType("torchaudio")  # which is imported whatever is trained, and used for sounds alone
sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
sys.path.pop(0)  # this folder, in which a file has the name of the package

from llamafactory.hparams import get_train_args  # noqa: E402
from llamafactory.train.sft import workflow  # noqa: E402

home, steps = Path(sys.argv[1]), int(sys.argv[2])
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what else is printed goes to the log
losses: list[float] = []


class Watched(workflow.CustomSeq2SeqTrainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        losses.append(loss.item())
        return loss


class Turns(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % steps == 0:
            if not sys.stdin.readline():
                sys.exit()
            losses.clear()
            self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())
        if state.global_step % steps == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # others need the memory now
            seconds = [end - begin for begin, end in pairwise(self.ends)]
            print(json.dumps([seconds, losses]), file=answers, flush=True)


rows = Dataset.from_list(json.loads((home / "rows.json").read_text()))
DatasetDict({"train": rows}).save_to_disk(home / "rows")
workflow.CustomSeq2SeqTrainer = Watched
model, data, training, finetuning, generating = get_train_args(json.loads((home / "settings.json").read_text()))
if not training.bf16:
    load = workflow.load_model
    # Frozen weights are loaded in the type of their files, for which there is no setting.
    workflow.load_model = lambda *args: load(*args).float()
workflow.run_sft(model, data, training, finetuning, generating, callbacks=[Turns()])
