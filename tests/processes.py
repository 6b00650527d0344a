"""Real processes for the tests: gloo over the loopback interface, started once and kept for many jobs.

    def job(rank, size, scale):                     # in a test file, on its top level
        return scale * rank

    def test_that_ranks_differ(processes):
        assert processes(2).run(job, 10) == [0, 10]

A job finds the default process group initialised. It may make groups and meshes of its own, as long as every rank does.
"""

import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from functools import reduce
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist

_PRELOADED = [
    "numpy",
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "torch.testing",
]
# Importing torch takes seconds, and longer where many start at once.
_START_SECONDS = 180
# How long other ranks may still answer after one of them failed.
_GRACE_SECONDS = 5


class Pool:
    """`size` processes that run one job at a time, the same on every rank.

    Arguments and results are pickled by value. A job that fails, or takes too long, ends the pool: what its ranks have
    sent each other is unknown then.
    """

    def __init__(self, size):
        self.size = size
        self.alive = True
        # The store lives here and picks its own port, so that no two pools want the same one.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # Forked from a server that has imported what takes seconds, once for all pools; it never ran anything.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._processes, self._pipes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)
        self._collect("the start", _START_SECONDS, errors=False)

    def run(self, function, *arguments, timeout=60, errors=False):
        """What ``function(rank, size, *arguments)`` returns on each rank, in the order of the ranks.

        With `errors` the result of a rank that raised is ``("error", name of the type, message)``; else it fails the
        test. A rank that ended in the job counts as one that raised a ``ProcessExited``.
        """
        job = pickle.dumps((function.__module__, function.__qualname__, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        return self._collect(function.__qualname__, timeout, errors)

    def close(self):
        """End the processes."""
        self.alive = False
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)

    def _collect(self, what, timeout, errors):
        """One answer from every rank, before the time is up."""
        answers = {}
        deadline = time.monotonic() + timeout
        try:
            while len(answers) < self.size:
                pending = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
                ready = wait(pending, max(deadline - time.monotonic(), 0))
                if not ready:
                    break
                for pipe in ready:
                    rank = self._pipes.index(pipe)
                    answers[rank] = _receive(pipe, self._processes[rank])
                    if answers[rank]["kind"] != "result" and not errors:
                        deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        except BaseException:
            self.close()
            raise
        silent = [rank for rank in range(self.size) if rank not in answers]
        failed = {rank: answer for rank, answer in sorted(answers.items()) if answer["kind"] != "result"}
        if silent or (failed and not errors) or any(answer["kind"] == "exit" for answer in failed.values()):
            self.close()
        if silent or (failed and not errors):
            texts = [f"rank {rank} of {self.size} failed in {what}: {_told(a, failed)}" for rank, a in failed.items()]
            texts += [f"{what}: no answer within the time from ranks {silent} of {self.size}"] if silent else []
            raise AssertionError("\n".join(texts))
        return [
            ("error", answers[rank]["type"], answers[rank]["message"]) if rank in failed else answers[rank]["value"]
            for rank in range(self.size)
        ]


def _told(answer, failed):
    """The traceback, where it is not that of a rank before, else the message alone."""
    alike = [
        other for other in failed.values() if (other["type"], other["message"]) == (answer["type"], answer["message"])
    ]
    return f"\n{answer['traceback']}" if alike[0] is answer else f"{answer['type']}: {answer['message']}"


def _receive(pipe, process):
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        process.join(10)
        text = f"the process ended with exit code {process.exitcode}"
        return {"kind": "exit", "type": "ProcessExited", "message": text, "traceback": text}


def _serve(rank, size, port, pipe):
    """A worker: jobs until the pipe is closed."""
    # An interrupt from the keyboard is the parent's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _answer(pipe, lambda: _join(rank, size, port))
    while True:
        try:
            job = pipe.recv_bytes()
        except (EOFError, OSError):
            # Not sys.exit(): threads of a collective that nobody will finish must not keep the process.
            os._exit(0)
        torch.manual_seed(0)
        _answer(pipe, lambda job=job: _run(job, rank, size))
        gc.collect()
        # What outlives a job are imported modules: nothing that looks through all objects need look there again.
        gc.freeze()


def _join(rank, size, port):
    # Sockets on the loopback interface, whatever the host's name stands for.
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))


def _run(job, rank, size):
    module, name, arguments = pickle.loads(job)
    function = reduce(getattr, name.split("."), importlib.import_module(module))
    return function(rank, size, *arguments)


def _answer(pipe, run):
    try:
        answer = pickle.dumps({"kind": "result", "value": run()})
    except BaseException as failure:
        text = "".join(traceback.format_exception(failure))
        answer = pickle.dumps(
            {"kind": "error", "type": type(failure).__name__, "message": str(failure), "traceback": text}
        )
    pipe.send_bytes(answer)


@pytest.fixture(scope="session")
def processes():
    """``processes(size)`` is a living pool of that many; see the head of this file."""
    if not dist.is_available() or sys.platform == "win32":
        pytest.skip("needs torch.distributed with gloo")
    pools = {}

    def of(size):
        if size not in pools or not pools[size].alive:
            pools[size] = Pool(size)
        return pools[size]

    yield of
    for pool in pools.values():
        pool.close()
