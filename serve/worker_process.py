"""A child process that owns a model, and the socket to it: the server's end and the child's end.

A process and not a thread, so that computing never holds up the event loop, and so that a crash in native code is an
error of some requests and not the server's end. Messages are msgpack over a socket pair (serve/protocol/frames.py);
nothing is pickled.
"""

import asyncio
import contextlib
import importlib
import itertools
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from serve.protocol.frames import frame, read_frame, receive, send

CLOSE_SECONDS = 5.0  # a worker gets this long to end by itself
BUFFER = 1 << 20  # bytes


class WorkerDied(Exception):
    """The process ended; the text says how."""


class WorkerProcess:
    """The server's end. Started with `start`; `ask` sends a message and awaits its answer."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._on_message: Callable[[dict[str, Any]], None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self.hello: dict[str, Any] = {}
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # how the process ended

    @classmethod
    async def start(
        cls,
        module: str,
        settings: dict[str, Any],
        *,
        timeout_s: float,
        on_message: Callable[[dict[str, Any]], None] | None = None,
    ) -> "WorkerProcess":
        """Run `python -m module` and wait until it says hello, i.e. until its model is warm.

        on_message: takes what the process sends unasked. Raises ValueError with the process's own words if it cannot load
        its model, WorkerDied if it ends or says nothing in time.
        """
        ours, theirs = socket.socketpair()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))}
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", module, str(theirs.fileno()), pass_fds=(theirs.fileno(),), env=environment
            )
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=BUFFER)
        worker = cls(process, reader, writer)
        try:
            writer.write(frame(settings))
            worker.hello = await asyncio.wait_for(read_frame(reader), timeout_s)
        except (EOFError, TimeoutError, ConnectionError) as error:
            code = await worker._end(kill=True)
            how = f"said nothing for {timeout_s:.0f} s" if isinstance(error, TimeoutError) else _ending(code)
            raise WorkerDied(f"A worker process ({module}) {how} while it was starting.") from error
        except asyncio.CancelledError:
            await worker._end(kill=True)
            raise
        if "failed" in worker.hello:
            await worker._end(kill=False)
            raise ValueError(worker.hello["failed"])
        worker._on_message = on_message
        worker._reading = asyncio.create_task(worker._read())
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, message: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """The answer to a message. Raises WorkerDied if the process ends; one that is silent for timeout_s is killed."""
        number = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            await self.post(message | {"id": number})
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            reason = f"The worker process computed for more than {timeout_s:.0f} s and was killed."
            self._fail(reason)  # before its end is seen as any other
            self._process.kill()
            raise WorkerDied(reason) from None
        finally:
            self._waiting.pop(number, None)

    async def post(self, message: dict[str, Any]) -> None:
        """Send without waiting for an answer. Raises WorkerDied if the process is gone."""
        if self.died.done():
            raise WorkerDied(self.died.result())
        try:
            self._writer.write(frame(message))
            await self._writer.drain()
        except ConnectionError as error:
            raise WorkerDied(await asyncio.shield(self.died)) from error

    async def close(self) -> None:
        """Hang up and wait for the process to end; kill it if it does not."""
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        await self._end(kill=False)
        self._fail("The worker process was closed.")

    async def _read(self) -> None:
        try:
            while True:
                message = await read_frame(self._reader)
                future = self._waiting.get(message.get("id"))
                if future is not None:
                    if not future.done():
                        future.set_result(message)
                elif self._on_message is not None:
                    self._on_message(message)
        except EOFError:
            self._fail(f"The worker process {_ending(await self._end(kill=True))}.")

    def _fail(self, reason: str) -> None:
        if not self.died.done():
            self.died.set_result(reason)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(WorkerDied(reason))

    async def _end(self, *, kill: bool) -> int:
        """Close the socket, wait, kill what stays; the exit code."""
        self._writer.close()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self._process.wait()), 0.5 if kill else CLOSE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        return await self._process.wait()


class ServerLink:
    """The child's end: what the server sends, in order; ends this process when the server is gone."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._sending = threading.Lock()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the server's business: it closes the socket when it is done
        self.settings = receive(self._socket)
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        with self._sending:
            send(self._socket, message)

    def next_message(self, *, wait: bool = True) -> dict[str, Any] | None:
        """The next message; without `wait`, None if there is none."""
        try:
            return self._messages.get(block=wait)
        except queue.Empty:
            return None

    def _read(self) -> None:
        """Also in the middle of a computation: a server that was killed leaves no process behind."""
        try:
            while True:
                self._messages.put(receive(self._socket))
        except (EOFError, OSError):
            os._exit(0)
        except Exception:  # a message that cannot be read: a process that hears nothing more must not look alive
            traceback.print_exc()
            os._exit(1)


def resolve(target: str) -> Any:
    """The function or class of "module:name". Raises ValueError if there is none."""
    module_name, colon, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{target!r} names nothing ({error}); write module:function.") from error


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
