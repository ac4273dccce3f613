"""Runs of training on several processes each, as torchrun would start them, but forked from one program that has torch imported.

stdin: a JSON list of {"processes": number, "recipe": file, "overrides": [...]}, done one after the other.
"""

import json
import os
import socket
import sys
import traceback

from omnimamba.train.run import train


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run(job: dict) -> None:
    num, port = job["processes"], free_port()
    children = []
    for rank in range(num):
        if (child := os.fork()) == 0:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in world.items()})
            try:
                train(job["recipe"], job["overrides"], device="cpu")
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit(f"failed: {job}")


for job in json.load(sys.stdin):
    run(job)
