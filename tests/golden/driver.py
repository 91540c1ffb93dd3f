"""Train several runs in one process: `python driver.py COMMANDS.json`, which holds a list of command lines.

Under torchrun every rank trains them all. PYTHONPATH chooses the tree whose train_gpt is imported.
"""

import json
import os
import sys
from pathlib import Path

from torch import set_num_threads
from torch.distributed import TCPStore


def open_rendezvous(agent: TCPStore, number: int) -> TCPStore | None:
    """Point the environment at a new empty store for the next process group; return the store on rank 0, which hosts it.

    torchrun's own store still holds the addresses of the previous group, and ranks would try to connect to those.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if os.environ["RANK"] == "0" else None
    if store:
        agent.set(f"port of run {number}", str(store.port))
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", agent.get(f"port of run {number}").decode()
    return store


def main(commands: list[list[str]]) -> None:
    """Train the command lines one after another, on one thread."""
    import train_gpt
    from configs.cli import parse

    set_num_threads(1)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    agent = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if several else None
    stores = []  # keeps the stores alive: one without a reference is closed
    for number, command in enumerate(commands):
        if agent:
            stores.append(open_rendezvous(agent, number))
        train_gpt.main(parse(command))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
