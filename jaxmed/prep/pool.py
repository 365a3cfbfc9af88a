"""Worker processes that may die: one task each, results in order, bounded look-ahead.

Decoders of medical images are C libraries fed with damaged files: they crash, or ask for more memory than there is.
`concurrent.futures` gives the whole pool up when one process dies; here the death costs the task that it had.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from typing import Any, NamedTuple


class Died(NamedTuple):
    """The result of a task whose process died; `how` is e.g. "SIGKILL" or "exit code 1"."""

    how: str


class Failed(NamedTuple):
    """The result of a task that raised: the exception itself."""

    error: BaseException


def _serve(pipe: connection.Connection) -> None:
    """A worker: takes (function, item), answers with the result, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    while True:
        try:
            function, item = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = function(item)
        except Exception as e:
            answer = Failed(e)
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionResetError):  # the parent was killed
            return
        except Exception:  # the result cannot be pickled
            pipe.send(Failed(RuntimeError(f"{type(answer).__name__} cannot be sent back")))


class Pool:
    """`workers` spawned processes (never forked: threads of the codecs would be lost); 0 works in this process."""

    def __init__(self, workers: int):
        self.workers = workers
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[tuple[Any, connection.Connection]] = []
        self._busy: dict[int, tuple[Any, connection.Connection]] = {}

    def run(self, function: Callable, items: Iterable, look_ahead: int | None = None) -> Iterator[tuple[Any, Any]]:
        """Yields (item, result) in the order of `items`; the result may be `Died` or `Failed`.

        Args:
          function: importable by the workers; called with one item.
          look_ahead: so many tasks may be started or done before the next one in order is taken; bounds the memory.
            Default 2 per worker.
        """
        if not self.workers:
            for item in items:
                try:
                    yield item, function(item)
                except Exception as e:
                    yield item, Failed(e)
            return
        limit = max(self.workers, look_ahead or 2 * self.workers)
        source = iter(items)
        waiting: deque[tuple[int, Any]] = deque()  # in order, not yet yielded
        results: dict[int, Any] = {}
        number, exhausted = 0, False
        while True:
            while not exhausted and len(waiting) < limit and len(self._busy) < self.workers:
                try:
                    item = next(source)
                except StopIteration:
                    exhausted = True
                    break
                waiting.append((number, item))
                self._start(number, function, item)
                number += 1
            while waiting and waiting[0][0] in results:
                at, item = waiting.popleft()
                yield item, results.pop(at)
                if len(self._busy) < self.workers and not exhausted:
                    break  # first give the idle worker something to do
            else:
                if waiting:
                    results.update(self._collect())
                elif exhausted:
                    return

    def _start(self, number: int, function: Callable, item: Any) -> None:
        while True:
            process, pipe = self._idle.pop() if self._idle else self._spawn()
            try:
                pipe.send((function, item))
            except (BrokenPipeError, ConnectionResetError):  # it died between two tasks
                self._end(process, pipe)
                continue
            self._busy[number] = process, pipe
            return

    def _spawn(self):
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that the worker's death shows as the end of the pipe
        return process, ours

    def _collect(self) -> dict[int, Any]:
        """Waits for at least one busy worker; {number: result}."""
        pipes = {pipe: number for number, (_, pipe) in self._busy.items()}
        done = {}
        for pipe in connection.wait(list(pipes)):
            number = pipes[pipe]
            process, _ = self._busy.pop(number)
            try:
                done[number] = pipe.recv()
                self._idle.append((process, pipe))
            except (EOFError, OSError):
                done[number] = Died(self._end(process, pipe))
            except Exception as e:  # the answer cannot be unpickled
                done[number] = Failed(e)
                self._idle.append((process, pipe))
        return done

    def _end(self, process, pipe) -> str:
        pipe.close()
        process.join(10)
        if process.exitcode is None:
            process.kill()
            process.join()
        code = process.exitcode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """Ends the workers; those that are at work are killed."""
        for _, pipe in self._idle:
            pipe.close()
        for process, pipe in self._busy.values():
            process.kill()
            pipe.close()
        for process, _ in [*self._idle, *self._busy.values()]:
            process.join(10)
        self._idle.clear()
        self._busy.clear()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error) -> None:
        self.close()
