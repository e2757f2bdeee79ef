"""Processes of their own: programs that tests start, and groups that work together over gloo.

They are forked, where that can be, from a process that has imported torch: on a slow machine a new
one needs nine seconds for that.
"""

import os
import signal
import socket
import sys
import traceback
import warnings
from multiprocessing import connection

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 600  # for one job, or one program: slow and busy machines are no failure


class Program:
    """`function(*args)` in a process of its own, what it prints in two files of `folder`."""

    def __init__(self, folder, function, *args):
        self._streams = [folder / "stdout", folder / "stderr"]
        self.process = _context().Process(
            target=_captured, args=(self._streams, function, args), daemon=True
        )
        self.process.start()

    @property
    def is_running(self):
        return self.process.is_alive()

    def send(self, number):
        os.kill(self.process.pid, number)

    def finished(self):
        """Wait; return the exit code and what was printed on both streams."""
        self.process.join(SECONDS)
        assert not self.is_running, "it hung"
        return self.process.exitcode, *(path.read_text() for path in self._streams)


def _captured(streams, function, args):
    if hasattr(signal, "SIGXFSZ"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as the interpreter has it
    # A shell has what it starts in the background ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
    sys.exit(function(*args))


class Processes:
    """A group of processes, kept from job to job: starting one takes seconds."""

    def __init__(self, number):
        context = _context()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pipes = [context.Pipe() for _ in range(number)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_work, args=(rank, number, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def run(self, job, *args):
        """Run `job(rank, *args)` in all of them; return what each returns."""
        found = {}
        for rank, error, result in self._answers(job, args):
            if error:
                self.close()  # the others may wait for this one for ever
                raise AssertionError(f"in process {rank} of {len(self.pipes)}:\n{error}")
            found[rank] = result
        return [found[rank] for rank in range(len(self.pipes))]

    def run_to_the_end(self, job, *args):
        """Run `job(rank, *args)`, which fails in all of them; return the errors."""
        errors = {rank: error for rank, error, _ in self._answers(job, args)}
        return [errors[rank] for rank in range(len(self.pipes))]

    def _answers(self, job, args):
        for pipe in self.pipes:
            pipe.send((job, args))
        waiting = dict(enumerate(self.pipes))
        while waiting:
            ready = connection.wait(list(waiting.values()), SECONDS)
            if not ready:
                self.close()
                raise AssertionError(f"{job.__name__} hung in processes {list(waiting)}")
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    yield rank, *waiting.pop(rank).recv()
                except EOFError:
                    yield rank, "the process died", None

    @property
    def alive(self):
        return all(process.is_alive() for process in self.processes)

    def close(self):
        for pipe in self.pipes:
            pipe.close()  # whoever waits for a job ends by itself, so that coverage is written
        for process in self.processes:
            process.join(5)
            process.kill()
            process.join()


def _context():
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch._dynamo",
            "torch.distributed.tensor.parallel",
            "parasparse.cli.main",
            "tests.distributed.training",
        ]
    )
    return context


def _work(rank, number, port, pipe):
    warnings.simplefilter("ignore")  # torch's own, about gloo and CPU meshes
    torch.set_num_threads(1)
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""}  # gloo on CPUs is what is tested
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number)}
    dist.init_process_group("gloo", rank=rank, world_size=number)
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            # Threads of gloo that DDP's cycles keep alive may abort a process that shuts down
            # ("terminate called without an active exception").
            os._exit(0)
        try:
            result = job(rank, *args)
            torch._dynamo.reset()
            pipe.send((None, result))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
