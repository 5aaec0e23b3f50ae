"""How a job's process and the world talk: status.json out, heartbeat included; stop, save and sample in, as files."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from ..files.atomic import locked, write_atomically, write_json
from ..files.folder import Inside, inside
from ..files.strangers import plain, read_json
from .config import read
from .job import LOCK, LOG
from .loop import Stopped, TrainingFailed
from .watch import Silent, Watcher

STATUS, COMMANDS_FOLDER = "status.json", "commands"
COMMANDS = ("stop", "save", "sample")
State = Literal["queued", "running", "stopped", "finished", "failed", "died"]

LOOK_EVERY = 0.2  # seconds between looks for commands
WRITE_EVERY = 1.0
BEAT_EVERY = 5.0
SILENT_AFTER = 120.0  # a process that has written nothing for so long is gone, or its machine is
LOG_EVERY = 30.0
LOG_LINES, LOG_BYTES = 15, 8192
LETTING_GO = 2.0
STALE = 60.0  # seconds after which a temporary file has no writer any more
MOST_PID, MOST_NUMBER = 2**31 - 1, 2**53
MOST_MESSAGE, MOST_NAME = 2000, 255  # characters of a text that a stranger's status may hold

_log = logging.getLogger("retort.job")


class Process(Protocol):
    """What is asked of a process that this one has started."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...


_children: dict[int, Process] = {}
_NO_PHASE: dict[str, Any] = {"phase": "", "part": 0, "parts": 0}


@dataclass(frozen=True)
class Status:
    """Where a job stands.

    rate: steps a second; eta: seconds left of the steps, or of the phase, None where unknown. phase: what goes on
    before the steps, "" during them; part, parts: how far it has come. memory: the most bytes that torch has held on
    the card so far, card: all that it has; 0 where nothing is measured. pid, machine: of the process. time: when it was
    written (seconds since 1970). lora: the finished file's name in the loras folder. preview: the latest, inside the
    folder. "died" and log (the log's last lines, for "failed" too) are what `read_status` finds; no process writes
    them.
    """

    state: State = "queued"
    step: int = 0
    steps: int = 0
    rate: float = 0.0
    eta: float | None = None
    pid: int = 0
    machine: str = ""
    time: float = 0.0
    message: str = ""
    lora: str = ""
    preview: str = ""
    log: str = ""
    phase: str = ""
    part: int = 0
    parts: int = 0
    memory: int = 0
    card: int = 0

    @property
    def going(self) -> bool:
        """Whether a process works on it, or is about to."""
        return self.state in ("queued", "running")

    def __str__(self) -> str:
        parts = [f"{self.state}, step {self.step} of {self.steps}"]
        if self.state == "running" and self.phase:
            parts.append(f"{self.phase}: {self.part} of {self.parts}")
        if self.state == "running" and self.rate:
            parts.append(f"{self.rate:.3g} steps/s")
        if self.state == "running" and self.eta is not None:
            parts.append(f"{self.eta / 60:.0f} min left")
        return ", ".join(parts) + (f": {self.message}" if self.message else "")


def write_status(folder: Path | Inside, status: Status) -> None:
    """Write status.json, atomically. OSError names the file."""
    write_json(inside(folder) / STATUS, dataclasses.asdict(replace(status, time=time.time())))


def has_status(folder: Path | Inside) -> bool:
    """Whether a folder says how a run stands."""
    return (inside(folder) / STATUS).is_file()


def read_status(folder: Path | Inside) -> Status:
    """Where the job in a folder stands, a process that vanished included. ValueError when none was ever started."""
    path = inside(folder) / STATUS
    if not path.is_file():
        raise ValueError(f"{folder} holds no job that was started; start it with `retort train {folder}`")
    found = read_json(path)
    try:
        status = _checked(read(Status, found, "status"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete the file, and start the run again to go on") from error
    if status.going and not _alive(folder, status):
        text = f"the process ended without a word at step {status.step}; start it again to go on from its last save"
        return replace(status, state="died", message=text, log=log_tail(folder))
    return replace(status, log=log_tail(folder)) if status.state == "failed" else status


def _checked(status: Status) -> Status:
    """A status with numbers that processes and clocks have, and texts as long as one is shown. ValueError names one."""
    numbers = dict.fromkeys(("step", "steps", "part", "parts", "memory", "card"), MOST_NUMBER)
    bounds = {"pid": MOST_PID, **numbers, "rate": 1e12, "eta": math.inf, "time": 1e12}
    for name, most in bounds.items():
        value = getattr(status, name)
        if value is not None and not 0 <= value <= most:
            raise ValueError(f"status.{name} must be a number from 0 to {most}, got {value!r:.40}")
    eta = status.eta if status.eta is not None and math.isfinite(status.eta) else None
    # A stranger's file may speak to the terminal that shows it.
    cut: dict[str, Any] = {name: plain(getattr(status, name)[:MOST_NAME]) for name in ("machine", "lora", "preview")}
    cut["phase"] = plain(status.phase[:MOST_NAME])
    return replace(status, eta=eta, message=plain(status.message[:MOST_MESSAGE]), log="", **cut)


def log_tail(folder: Path | Inside) -> str:
    """The last lines of a job's log, empty when there is none."""
    path = inside(folder) / LOG
    if not path.is_file():
        return ""
    with path.open() as handle:
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - LOG_BYTES))
        lines = handle.read(LOG_BYTES).decode(errors="replace").splitlines()
    return plain("\n".join(lines[-LOG_LINES:]))


def send(folder: Path | Inside, command: str) -> None:
    """Ask a job's process to "stop" (it saves first), "save" or "sample". ValueError for any other command."""
    if command not in COMMANDS:
        raise ValueError(f"command {command!r} is not known; use one of {', '.join(COMMANDS)}")
    write_atomically(inside(folder) / COMMANDS_FOLDER / command, b"")


def clear_commands(folder: Path | Inside) -> None:
    """Forget commands that an earlier process did not live to hear."""
    for command in COMMANDS:
        (inside(folder) / COMMANDS_FOLDER / command).remove()


@contextmanager
def holding(folder: Path | Inside) -> Iterator[None]:
    """Be the one who writes a run's status; BlockingIOError while another is.

    A process that has just written how it ended needs a moment to let go.
    """
    until = time.monotonic() + LETTING_GO
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder, LOCK))
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        yield


def started(process: Process) -> None:
    """Tell of a process of a job that this one has started, so that its end is seen at once."""
    _children[process.pid] = process


def _alive(folder: Path | Inside, status: Status) -> bool:
    fresh = abs(time.time() - status.time) < SILENT_AFTER
    if status.machine != socket.gethostname():
        return fresh
    child = _children.get(status.pid)
    # A child that has ended stays in the system's table until someone asks for it. Other programs' are theirs to ask.
    if child is not None and child.poll() is not None:
        _children.pop(status.pid, None)
        return False
    if not _exists(status.pid):
        return False
    # A number is given again one day: then the lock, which its process holds, tells.
    return fresh or (inside(folder) / LOCK).held()


if sys.platform == "win32":
    import ctypes

    def _exists(pid: int) -> bool:
        # os.kill would send the process Ctrl+C there.
        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)
        if not handle:
            return False
        code = ctypes.c_ulong()
        ctypes.windll.kernel32.GetExitCodeProcess(handle, ctypes.byref(code))
        ctypes.windll.kernel32.CloseHandle(handle)
        return code.value == 259
else:

    def _exists(pid: int) -> bool:
        if pid <= 0:
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


class FileWatcher:
    """Tells a folder about a run and hears its commands; a `trainers.watch.Watcher`, to be entered around the run.

    before: what an earlier process left. alone: no other process trains with this one, so that it may end between
    steps. show: who else watches. A thread writes, so that neither a slow disk nor a slow step holds up the other.
    Entering raises OSError where the folder cannot be written.
    """

    def __init__(
        self, folder: Path | Inside, before: Status | None = None, alone: bool = True, show: Watcher | None = None
    ):
        self._folder, self._alone, self._show = inside(folder), alone, show or Silent()
        self._before = before
        begun = replace(before or Status(), state="running", message="loading", rate=0.0, eta=None, log="", **_NO_PHASE)
        self.status = replace(begun, pid=os.getpid(), machine=socket.gethostname())
        self._written = self.status
        self._asked_to_stop = self._moved = False
        self._looked = self._logged = self._stepped = 0.0
        self._phase: tuple[str, int, float] | None = None  # its name, where it was first counted, and when
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="retort job status", daemon=True)

    def __enter__(self) -> FileWatcher:
        # What a kill left; whoever started this process may be writing one now.
        self._folder.forget_parts(STATUS, older=STALE)
        write_status(self._folder, self.status)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._silence()

    def ask_to_stop(self) -> None:
        """As the command "stop"; may be called from a signal's handler."""
        self._asked_to_stop = True

    def end(self, state: State, message: str = "", lora: str = "") -> None:
        """Write how it ended; a LoRA that the run wrote earlier stays named unless there is another.

        OSError where the folder cannot be written.
        """
        self._silence()
        # A finished run that is asked for again makes no step, and is at its end all the same.
        step = self.status.steps if state == "finished" else self.status.step
        lora = lora or self.status.lora
        self.status = replace(self.status, state=state, step=step, message=message, lora=lora, eta=None, **_NO_PHASE)
        write_status(self._folder, self.status)

    def _leave(self, state: State, message: str, note: str) -> None:
        """As `end`, but a run that had ended well stays as it was, with a note, where this attempt made no step."""
        before = self._before
        if self._moved or before is None or before.state not in ("finished", "stopped"):
            self.end(state, message)
            return
        self._silence()
        self.status = replace(before, message=note)
        write_status(self._folder, self.status)

    def stop(self, message: str) -> None:
        """Write that somebody stopped it. OSError where the folder cannot be written."""
        self._leave("stopped", message, "the last request was stopped before its first step")

    def fail(self, error: BaseException) -> None:
        """Write that an error ended it. A disk that is full must not hide the error, which the log tells."""
        told = isinstance(error, ValueError | OSError | ImportError | TrainingFailed)
        text = str(error) if told else f"{type(error).__name__}: {error}"
        try:
            self._leave("failed", text, f"last request {'refused' if told else 'failed'}: {text}")
        except OSError as full:
            _log.warning("status not written: %s", full)

    def check(self) -> None:
        """Before the first step a stop ends the run at once; later it waits for the end of the step."""
        self._show.check()
        if self._alone and not self._moved:
            self._look()
            if self._asked_to_stop:
                raise Stopped("run it again to go on")

    def commands(self) -> set[str]:
        """Commands that have come, each once."""
        found = self._look()
        if self._asked_to_stop:
            found.add("stop")
        return found | self._show.commands()

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Count."""
        moved, self._moved = self._moved, True
        self._show.step(done, total, metrics)
        now, rate = time.monotonic(), self.status.rate
        if moved:
            latest = 1 / max(1e-9, now - self._stepped)
            rate = 0.9 * rate + 0.1 * latest if rate else latest
        self._stepped = now
        eta = (total - done) / rate if rate else None
        held: dict[str, Any] = {name: int(metrics[name]) for name in ("memory", "card") if name in metrics}
        self.status = replace(self.status, step=done, steps=total, rate=rate, eta=eta, message="", **held, **_NO_PHASE)
        if now - self._logged > LOG_EVERY or done == total:
            self._logged = now
            _log.info("step %d of %d, loss %.6g, %.3g steps/s", done, total, metrics.get("student_loss", 0.0), rate)

    def preview(self, images: Tensor, done: int, path: Inside) -> None:
        """Name it."""
        self._show.preview(images, done, path)
        self.status = replace(self.status, preview="/".join(path.parts))

    def says(self, text: str) -> None:
        """Into the status and the log."""
        self._show.says(text)
        self.status = replace(self.status, message=text)
        _log.info("%s", text)

    def phase(self, name: str, done: int, total: int) -> None:
        """Count, and foretell from how fast it has gone so far."""
        self._show.phase(name, done, total)
        now = time.monotonic()
        if self._phase is None or self._phase[0] != name:
            self._phase = name, done, now
        _, first, begun = self._phase
        eta = (total - done) * (now - begun) / (done - first) if done > first else None
        self.status = replace(self.status, phase=name, part=done, parts=total, eta=eta, message="")
        _log.info("%s: %d of %d", name, done, total)

    def _look(self) -> set[str]:
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return set()
        self._looked = now
        found = set()
        for command in COMMANDS:
            if (self._folder / COMMANDS_FOLDER / command).remove():
                found.add(command)
        self._asked_to_stop |= "stop" in found
        return found

    def _beat(self) -> None:
        written_at = time.monotonic()
        while not self._ended.wait(WRITE_EVERY):
            status = self.status
            if status == self._written and time.monotonic() - written_at < BEAT_EVERY:
                continue
            try:
                write_status(self._folder, status)
            except OSError as error:
                # The run itself says so when it cannot save; until then it goes on.
                _log.warning("status not written: %s", error)
            self._written, written_at = status, time.monotonic()

    def _silence(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()


class Follower(Silent):
    """What a process beside the first knows of the world: only whether it was told to end."""

    def __init__(self) -> None:
        self._asked_to_stop = False

    def ask_to_stop(self) -> None:
        """May be called from a signal's handler."""
        self._asked_to_stop = True

    def commands(self) -> set[str]:
        """A stop."""
        return {"stop"} if self._asked_to_stop else set()
