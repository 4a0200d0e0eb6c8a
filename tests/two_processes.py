"""Run a piece of Python in two processes that form a gloo group."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_two(code: str, *arguments: object) -> None:
    """``code`` joins the group by ``torch.distributed.init_process_group("gloo")``; both must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    shared = {
        **os.environ,
        "PYTHONPATH": paths,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    workers = [subprocess.Popen(command, env={**shared, "RANK": str(rank)}) for rank in range(2)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
