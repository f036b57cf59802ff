"The phases that run on several processes, with one process slower than the others and a note of what each does."
import atexit
import importlib
import time
from functools import partial
from pathlib import Path

from looper_math import heldout
from looper_math.shards import rank_and_world

SLOW, SECONDS = 3, 8.0  # rank, and how much later it starts
MODULES = {"SFTSettings": "sft", "RolloutSettings": "rollouts", "DPOSettings": "dpo", "EvalSettings": "evaluation",
           "OnlineSettings": "online_rl"}


def __getattr__(name: str):
    "The settings class of a phase; only this phase is imported."
    if name not in MODULES: raise AttributeError(name)
    return getattr(importlib.import_module(f"looper_math.{MODULES[name]}"), name)


def note(folder: Path, name: str, text: str): (folder / f"{name}{rank_and_world()[0]}").write_text(text)


def main(settings):
    "The phase's main; notes the held-out questions that this process answers, when it is done and when it leaves."
    noted, answers = partial(note, settings.folder.parent), heldout.answers
    settings.folder.parent.mkdir(parents=True, exist_ok=True)

    def answers_of(generate, questions, *rest):
        noted("asked", " ".join(q["question_id"] for q in questions))
        return answers(generate, questions, *rest)

    heldout.answers = answers_of
    atexit.register(lambda: noted("left", str(time.time())))
    if rank_and_world()[0] == SLOW: time.sleep(SECONDS)
    importlib.import_module(type(settings).__module__).main(settings)
    noted("done", str(time.time()))
