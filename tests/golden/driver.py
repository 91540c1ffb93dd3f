"""Train several runs in one process: `python driver.py COMMANDS.json`, a list of command lines; under torchrun on all ranks.

The code that trains is the one that Python finds first: PYTHONPATH chooses the tree.
"""

import json
import os
import sys
from pathlib import Path

from torch import set_num_threads
from torch.distributed import TCPStore


def new_meeting_place(agent: TCPStore, number: int) -> TCPStore | None:
    """Point the environment at an empty store, which rank 0 hosts, for the next process group to meet at: torchrun's own
    still holds the addresses of the group before, and ranks would try to connect to those."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if os.environ["RANK"] == "0" else None
    if store:
        agent.set(f"port of run {number}", str(store.port))
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", agent.get(f"port of run {number}").decode()
    return store


def main(commands: list[list[str]]) -> None:
    """Train one command line after another, on one thread."""
    import train_gpt
    from configs.cli import parse

    set_num_threads(1)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    agent = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if several else None
    stores = []  # a store lives as long as it is referred to
    for number, command in enumerate(commands):
        if agent:
            stores.append(new_meeting_place(agent, number))
        train_gpt.main(parse(command))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
