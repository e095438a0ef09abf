"""The process behind ``scene.Server``: one job per line on stdin, forked from a process that has everything loaded.

Answers each job with two lines: the process id when it starts, its status when it has ended.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

from tests.faults import seam

#: A run of so many seconds is ended, which is no way in which one may end.
HANG = 300


def serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what the first run prints is no answer
    lines = map(json.loads, sys.stdin)
    _first(next(lines))
    print(f"{os.getpid()}\n0", file=answers, flush=True)
    for job in lines:
        pids = [_forked(job) for _ in range(job.get("copies", 1))]
        print(pids[0], file=answers, flush=True)
        print(*(os.waitpid(pid, 0)[1] for pid in pids), file=answers, flush=True)


def _forked(job: dict[str, Any]) -> int:
    pid = os.fork()
    if not pid:
        os._exit(_run(job))
    return pid


def _first(job: dict[str, Any]) -> None:
    """In this process: what a run loads and compiles is there for all that are forked."""
    from smelt.cli import main

    assert main(["--quiet", *job["arguments"]]) == 0


def _run(job: dict[str, Any]) -> int:
    """In the forked process."""
    from smelt.cli import main
    from smelt.engine import journal

    signal.alarm(job.get("patience", HANG))
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if job.get("closed"):
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)  # whoever was to read the results has gone
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    journal.INTERVAL = job.get("interval", 1)
    os.umask(job.get("umask", 0o022))
    os.environ.update(job.get("environment", {}))
    if job.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    if job.get("space"):
        resource.setrlimit(resource.RLIMIT_AS, (job["space"], job["space"]))
    armed = seam.arm(job)
    code = main(job["arguments"])
    if armed is not None and "result" in job:
        armed.save(job["result"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
