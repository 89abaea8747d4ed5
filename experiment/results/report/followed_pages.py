"""Pages of runs that are kept current: new log lines are read when a page is requested, and an answer has the changes
since the one before.

Runs are read by threads, so that a disk that does not answer holds up nothing else: a page shows the data read so far.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from pydantic_core import to_json

from experiment.config import read_recorded
from experiment.errors import UserError, describe_disk_error
from experiment.files import check_name
from experiment.formatting import counted
from experiment.results.charts import ChartsData
from experiment.results.history import History
from experiment.results.page import Block, Headline, Links, Page, Part, Text, render_page, render_parts
from experiment.results.report.pages import run_blocks, run_page, set_page
from experiment.results.report.run import OpenRuns, Run, last_start
from experiment.results.report.several_runs import overlay_blocks
from experiment.results.report.tasks import read_task_results
from experiment.run_files.run_folder import RunFolder, is_run, planned_folders, runs_in
from experiment.run_files.run_life import Life, read_life

_LOCATE_WAIT = 0.2  # seconds of the wait for runs until it is known which ones are the newest
_READERS = 2  # more would need more memory, and slow down the answers


@dataclass(frozen=True)
class Waits:
    """Limits of waiting for runs, pages and readers, in seconds."""

    runs: float = 1.0  # for runs that are read; then a page shows the data read so far
    page: float = 1.5
    stuck: float = 5.0  # without progress, after which readers count as waiting for their disks


_WAITS = Waits()


class BackgroundWork:
    """Work in a thread of its own, once at a time."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self.ended = threading.Event()
        self.ended.set()

    def ask(self) -> threading.Event:
        """Start the work, unless it is under way. Returns the event that it has ended."""
        with self._lock:
            if self.ended.is_set():
                self.ended.clear()
                try:
                    threading.Thread(target=self._run, daemon=True).start()
                except RuntimeError:  # there are too many; asked for again by the next page
                    self.ended.set()
        return self.ended

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self.ended.set()


class Readers:
    """Lets few threads read at a time, but more if these wait for their disks."""

    def __init__(self, stuck_seconds: float) -> None:
        self._stuck_seconds = stuck_seconds
        self._free = threading.BoundedSemaphore(_READERS)
        self._progress = time.monotonic()  # the last

    def note_progress(self) -> None:
        self._progress = time.monotonic()

    @contextmanager
    def slot(self) -> Iterator[None]:
        while not (found := self._free.acquire(timeout=self._stuck_seconds)):
            if time.monotonic() - self._progress > self._stuck_seconds:
                break
        try:
            yield
        finally:
            self.note_progress()
            if found:
                self._free.release()


class FollowedRun:
    def __init__(self, folder: RunFolder, readers: Readers) -> None:
        self._folder = folder
        self._readers = readers
        self._history = History(folder)
        self._life: Life | None = None
        self._exists = False
        self.started = 0.0  # when it was, or was resumed, as time.time()
        self._located = threading.Event()
        self._problem = ""
        self._values: dict[Path, tuple[object, Any]] = {}  # file -> its stamp, and its content
        self._reading, self._observing = BackgroundWork(self._read), BackgroundWork(self._observe)
        self.read_at = time.time()  # the time at which the known values were true

    @property
    def unread(self) -> float:
        """The share of the metrics that is still to be read."""
        return 0.0 if self._reading.ended.is_set() else self._history.unread

    def locate(self) -> threading.Event:
        """Find out when the run was started, and whether it is alive. Returns the event that the former is known."""
        self._located.clear()
        self._observing.ask()  # takes seconds for a run on another machine
        return self._located

    def ask(self) -> list[threading.Event]:
        """Start reading. Returns the events to wait for."""
        return [self._reading.ask(), *([self._observing.ended] if self._life is None else [])]

    def known(self, name: str, link: str) -> Run:
        config, results = (
            self._values.get(path, (None, None))[1] for path in (self._folder.config, self._folder.results)
        )
        life = replace(self._life, message=self._problem or self._life.message) if self._life else None
        shown = link if self._exists else None
        return Run(name, self._folder, self._history, config or {}, results, life, self.started, shown, followed=True)

    def _read(self) -> None:
        with self._readers.slot():
            now = time.time()
            try:
                self._history.read(self._readers.note_progress)
                self.read_at = now
                self._read_changed(self._folder.config, lambda folder: read_recorded(folder.config))
                self._read_changed(self._folder.results, read_task_results)
                self._problem = ""
            except (UserError, OSError) as error:
                self._problem = describe_disk_error(error) or str(error)

    def _read_changed(self, path: Path, read: Callable[[RunFolder], object]) -> None:
        try:
            stamp: object = (path.stat().st_mtime_ns, path.stat().st_size)
        except OSError:
            stamp = None
        if self._values.get(path, ("",))[0] != stamp:
            self._values[path] = stamp, read(self._folder)

    def _observe(self) -> None:
        self.started, self._exists = last_start(self._folder), self._folder.path.is_dir()
        self._located.set()
        self._life = read_life(self._folder)


class _FollowedPart(NamedTuple):
    part: Part
    version: int  # of its HTML
    data: ChartsData | None  # of its charts

    def changes(self, since: int) -> dict[str, Any]:
        """Return the key and the changes."""
        html = self.part.html if self.version > since else None
        data = None if self.data is None else self.data.changes(since)
        found = {"key": self.part.key, "html": html, "data": data}
        return {name: value for name, value in found.items() if value is not None}


class _State(NamedTuple):
    """A page at a time."""

    version: int
    title: str
    parts: Sequence[_FollowedPart]
    time: float  # at which it was true, as time.time()
    unread: float  # share of the metrics that is not read yet
    cost: float  # seconds of the processor


class FollowedPage:
    """A page that `make` builds again on every request, and the runs on it."""

    def __init__(self, make: Callable[[], tuple[Page, Sequence[FollowedRun]]], wait_seconds: float) -> None:
        self._make, self._wait_seconds = make, wait_seconds
        self._making = BackgroundWork(self._make_again)
        (header,) = render_parts(Page("report", [], Headline("reading", "plain", "", [])))
        self._state = _State(0, "report", [_FollowedPart(header, 0, None)], time.time(), 1.0, 0.0)

    def html(self) -> bytes:
        state = self.update()
        parts = [(each.part, None if each.data is None else each.data.changes()) for each in state.parts]
        return render_page(state.title, parts, state.version).encode()

    def changes(self, since: int) -> bytes:
        """Return the changes for `page.js`, as JSON. since: the version that a browser has."""
        state = self.update()
        parts = [part.changes(since) for part in state.parts]
        about = {"version": state.version, "title": state.title, "unread": state.unread, "parts": parts}
        return to_json(about | {"time": round(state.time * 1000), "cost": round(state.cost * 1000)})

    def update(self) -> _State:
        """Make the page again, or show the one before if that takes long."""
        self._making.ask().wait(self._wait_seconds)
        return self._state

    def _make_again(self) -> None:
        start, before = time.thread_time(), self._state
        page, runs = self._make()
        version = max(before.version + 1, time.time_ns() // 1000)  # grows, also if the server is restarted
        known = {each.part.key: each for each in before.parts}
        parts = []
        for part in render_parts(page):
            old = known.get(part.key)
            data = None if part.charts is None else ChartsData(part.charts, old.data if old else None, version)
            parts.append(_FollowedPart(part, old.version if old and old.part.html == part.html else version, data))
        read_at = min((run.read_at for run in runs), default=time.time())
        unread = sum(run.unread for run in runs) / max(len(runs), 1)
        self._state = _State(version, page.title, parts, read_at, unread, time.thread_time() - start)


class FollowedPages:
    """The pages of a server: the first one, and one for each run, sweep and comparison that pages link to."""

    def __init__(self, folders: Sequence[RunFolder], waits: Waits = _WAITS) -> None:
        """folders: of runs, sweeps and comparisons, or of folders of these."""
        self._folders, self._waits = folders, waits
        self._base = folders[0].path if len(folders) == 1 else Path(os.path.commonpath([each.path for each in folders]))
        self._linked: dict[str, RunFolder] = {}  # by name: the path below `_base`
        self._runs: dict[Path, FollowedRun] = {}
        self._readers = Readers(waits.stuck)
        self._pages = {"": FollowedPage(partial(self._make, ""), waits.page)}

    def page(self, name: str) -> FollowedPage | None:
        """Return a page; None if no page links to it. name: '' for the first page, otherwise as in a link."""
        if name and name not in self._linked:  # the address is from before a restart of the server
            self._pages[""].update()
        if name in self._linked and name not in self._pages:
            self._pages[name] = FollowedPage(partial(self._make, name), self._waits.page)
        return self._pages.get(name)

    def _make(self, name: str) -> tuple[Page, Sequence[FollowedRun]]:
        opened: list[FollowedRun] = []
        folders, is_first = ([self._linked[name]], False) if name else (self._folders, True)
        try:
            page = self._page(folders, partial(self._open, opened, is_first), is_first)
        except (UserError, OSError) as error:
            headline = Headline("cannot be read", "bad", describe_disk_error(error) or str(error), [])
            page = Page(folders[0].path.name, [], headline)
        return replace(page, home=None if is_first else "../"), opened

    def _page(self, folders: Sequence[RunFolder], open_runs: OpenRuns, is_first: bool) -> Page:
        if len(folders) == 1:
            (folder,) = folders
            if page := set_page(folder, open_runs):
                return page
            if is_run(folder):
                (run,) = open_runs({folder.path.name: folder})
                return run_page(run, run_blocks(run))
        runs = {self._name(path): RunFolder(path) for each in folders for path in runs_in(each.path)}
        blocks: list[Block] = []
        if sets := [path for each in folders for path in sorted(each.path.iterdir()) if planned_folders(path)]:
            links = [(self._name(path), self._link(RunFolder(path), is_first)) for path in sets]
            blocks.append(Links("Sweeps and comparisons", links))
        blocks += overlay_blocks(open_runs(runs)) if runs else [Text("There are no runs yet.")]
        return Page(folders[0].path.name if len(folders) == 1 else counted(len(runs), "run"), blocks)

    def _open(self, opened: list[FollowedRun], is_first: bool, folders: Mapping[str, RunFolder]) -> list[Run]:
        """Open the runs, read so far as is possible in a short time. is_first: whether it is the first page."""
        for folder in folders.values():
            if folder.path not in self._runs:
                self._runs[folder.path] = FollowedRun(folder, self._readers)
        found = [self._runs[folder.path] for folder in folders.values()]
        opened += found
        start = time.monotonic()
        for located in [run.locate() for run in found]:
            located.wait(max(0.0, start + _LOCATE_WAIT - time.monotonic()))
        newest_first = sorted(found, key=lambda run: run.started, reverse=True)  # the charts show these
        for event in [event for run in newest_first for event in run.ask()]:
            event.wait(max(0.0, start + self._waits.runs - time.monotonic()))
        return [
            run.known(name, self._link(folder, is_first))
            for run, (name, folder) in zip(found, folders.items(), strict=True)
        ]

    def _name(self, path: Path) -> str:
        name = os.path.relpath(path, self._base)
        check_name(name)
        return name

    def _link(self, folder: RunFolder, is_first: bool) -> str:
        """Return the link to the page of a folder, relative to the page that has it."""
        name = self._name(folder.path)
        self._linked[name] = folder
        return f"{'run/' if is_first else ''}{quote(name, safe='')}"
