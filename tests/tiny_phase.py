"A phase of a few lines, for the launcher's tests: two processes add up their ranks."
import atexit
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist


@dataclass
class Settings:
    folder: str  # where each rank leaves a file
    fail: bool = False  # whether rank 1 should break
    wait: float = 0.0  # seconds of work
    late: float = 0.0  # seconds of more work on rank 0, when the others are done


def main(settings):
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    (Path(settings.folder) / f"waiting{dist.get_rank()}").write_text("at work")
    time.sleep(settings.wait)
    if settings.fail and dist.get_rank() == 1:
        raise ValueError("rank 1 broke")
    folder, rank = Path(settings.folder), dist.get_rank()
    atexit.register(lambda: (folder / f"left{rank}").write_text(str(time.time())))
    if rank == 0: time.sleep(settings.late)
    (folder / f"done{rank}").write_text(str(time.time()))
    (folder / f"rank{rank}").write_text(str(total.item()))
    print(f"rank {rank} of {dist.get_world_size()} is done")
