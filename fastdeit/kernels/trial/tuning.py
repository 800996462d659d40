"""`engine.autotune`: in the first steps of a run on a card without measurements, every op is tried out where it is
called.

At the first call of each op and shape (`_tried.Shape`) all candidates run on the call's own tensors
(`candidates.py`), before the call itself: the fastest that is right runs it, and all calls like it from then on. So
the bits of a run depend on the choices alone, and not on whether they were made in this run, come from the cache
(`store.py`), or from the checkpoint that is resumed, whose choices outrank the cache's. The main process tries, and all
others take what it has found. What the budget does not reach runs on PyTorch's own operations.

Where the run allows it (`presets`), a rehearsal of the first step's forward and backward comes before them and changes
nothing. In it the ops are tried, and then both are timed as a whole in each preset (`presets.py`), of which the fastest
decides.

On a CPU nothing is tried unless it is asked for: there the choice would change bits, and gain little.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import Any, Literal

import torch
from torch import Tensor

from fastdeit.kernels import _op, _tried
from fastdeit.kernels._op import REFERENCE, Backend, Op
from fastdeit.kernels._tried import INDUCTOR, Choice, Shape, Tried
from fastdeit.kernels.trial import candidates
from fastdeit.kernels.trial import presets as trial_presets
from fastdeit.kernels.trial.candidates import BrokenDevice, Call, Clock, Findings, NothingToSee
from fastdeit.kernels.trial.presets import DEFAULT
from fastdeit.kernels.trial.store import Row, Store, Whole, calls_of, place

Mode = Literal["auto", "on", "off"]
BUDGET = 60.0
"""Seconds that the trials of a run may take, compilation included; Inductor's begin in the first half of them."""
_OF_PRESETS = 0.5
"""Share of the budget that comparing presets may take besides: what compiling has taken is not missing there."""
STEPS = 8
"""Steps in which trials may be made: an update that is skipped, as the first ones of fp16 may be, proves nothing. A
recorded step begins later."""
State = list[list[Any]]
"""Choices for a checkpoint, in values that JSON can hold: [op, shape, backend] each."""


class Tuning:
    """Trials of one run, and their results in this process.

    mode      auto: on a CUDA device, what `choices.json` has no measurement of; on: everything, on any device; off
    recorded  whether the run's steps are CUDA graphs, so that launches by the host do not count
    share     the main process's value on every process; collective
    main      whether this is the main process
    say       takes what a person should read, a line each
    budget    seconds; presets have half as many besides
    anew      whether to try again what the cache knows
    presets   whether whole steps are compared as well: their forward and backward can be made once more
    clock     how calls and steps are timed; by default by `recorded`
    """

    def __init__(
        self,
        mode: Mode,
        device: torch.device,
        *,
        recorded: bool = False,
        share: Callable[[Any], Any] = lambda value: value,
        main: bool = True,
        say: Callable[[str], None] = print,
        budget: float = BUDGET,
        anew: bool = False,
        presets: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.active = mode == "on" or (mode == "auto" and device.type == "cuda")
        self.rows: list[Row] = []
        self.wholes: list[Whole] = []
        self.changed = False
        self._everything, self._device, self._anew = mode == "on", device, anew
        self._share, self._main, self._say = share, main, say
        self._budget = self._left = budget
        self._left_of_presets = _OF_PRESETS * budget
        timed = "device" if recorded and device.type == "cuda" else "wall"
        make = candidates.of_the_device if timed == "device" else candidates.with_launches
        self._clock = clock or make(device)
        self._step_clock = clock or candidates.of_a_step(device, timed)
        self._timed = timed
        self._store: Store | None = None
        self._stored: dict[tuple[str, Shape], Row] = {}
        self._stored_wholes: dict[str, Whole] = {}
        self._tried: Tried | None = None
        self._outer: Tried | None = None
        self._steps, self._open = 0, self.active
        self._presets = self._to_rehearse = presets
        self._deferred = self._news = self._kept = False
        self._untried: list[str] = []
        self._unfinished: list[str] = []

    # ---- for the run -------------------------------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        """Whether the next step is one in which trials may be made."""
        return self._open

    @property
    def rehearses(self) -> bool:
        """Whether the step that is made now wants a rehearsal of its forward and backward first."""
        return self._open and self._to_rehearse

    def reopen(self) -> None:
        """Try out the shapes that a new phase of the run brings."""
        self._open, self._steps, self._to_rehearse = self.active, 0, self._presets

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Around a step: ops are tried out at the first call of each shape. `changed` says whether any was."""
        self.changed = False
        if not self._open:
            yield
            return
        tried = self._install()
        self._deferred = False
        self._steps += 1
        tried.open(self._meet)
        try:
            yield
        finally:
            tried.open(None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # of copies in float64
        self._open = self._deferred and self._steps < STEPS
        if not self._open and self._news:
            self.changed, self._news = True, False
            if self._main:
                self._say(self.summary())

    def rehearse(self, run: Callable[[], object]) -> None:
        """Inside `trying`, on every process: try the ops of `run()`, which makes a forward and backward and changes
        nothing, and then take the preset in which it is the fastest."""
        self._to_rehearse = False
        known = {(row.op, row.shape) for row in self.rows}
        run()
        new = [row for row in self.rows if (row.op, row.shape) not in known]
        # The rows are the main process's alone.
        calls, choices, whole = self._share(self._presets_of(new) if self._main else None)
        if whole is None and len(choices) > 1:
            whole = self._compared(calls, choices, run)
        if whole is not None:
            self._take(choices[whole.preset], _reason_of_whole(whole))
            self.wholes.append(whole)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside `trying`, around calls whose shapes differ between processes: they are not tried."""
        if not self._open:
            yield
            return
        self._tried.open(None)
        try:
            yield
        finally:
            self._tried.open(self._meet)

    def left_to_compiler(self) -> bool:
        """Whether `torch.compile` may now see through an op that was opaque to it before it was tried."""
        chosen = self._tried.chosen if self._tried is not None else {}
        return any(
            all(choice.backend in (REFERENCE, INDUCTOR) for choice in own.values())
            for name, own in chosen.items()
            if not _op.OPS[name].mutated and self._usable(_op.OPS[name])
        )

    def state(self) -> State | None:
        """The choices of the run, for its checkpoint; None where it makes none."""
        if self._tried is None:
            return None if not self.active else []
        chosen = self._tried.chosen.items()
        return [[op, list(shape), choice.backend] for op, own in chosen for shape, choice in own.items()]

    def begin(self, step: int, state: State | None) -> None:
        """Before anything runs. From now on, what was not tried runs on PyTorch's own operations.

        step   number of the next step. From 1 on it is that of a checkpoint with `state`, whose choices hold whatever
               the cache has, so that the run keeps its bits. None there: the run was begun without trials, and makes
               none now
        """
        if step and state is None:
            if self.active:
                self._say("kernels: the run was begun without trials of them, and goes on as it was begun")
            self.active = self._open = False
        if state is None and not self.active:
            return
        tried = self._install()
        for op, shape, backend in state or ():
            problem = self._problem(op, backend)
            if problem:
                self._say(f"kernels: the checkpoint's choice of {backend} for {op} does not hold here: {problem}")
            else:
                chosen = Choice(backend, "chosen in the first steps of this run")
                tried.chosen.setdefault(op, {})[Shape(*shape)] = chosen

    def close(self) -> None:
        """Take the choices of the run out of this process."""
        if self._tried is not None:
            _tried.install(self._outer)
            self._tried = None

    def summary(self) -> str:
        """What was chosen, in one line."""
        ops: dict[str, list[Row]] = {}
        for row in self.rows:
            ops.setdefault(row.op, []).append(row)
        parts = [_of_op(op, rows) for op, rows in ops.items()]
        late = [
            (self._untried, "left no time, hence PyTorch's own operations, for"),
            (self._unfinished, "left the next run to try more candidates of"),
        ]
        parts += [f"the whole step {whole.preset}{_gain(whole)}" for whole in self.wholes]
        for names, what in late:
            if names:
                parts.append(f"the budget of {self._budget:g} s {what} {', '.join(dict.fromkeys(names))}")
        if self._kept:
            parts.append(f"stored in {self._store.path}")
        elif self.rows and self._stored:
            parts.append(f"as found before ({self._store.path})")
        return "kernels: " + "; ".join([", ".join(parts[: len(ops)]) or "nothing was tried", *parts[len(ops) :]])

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _presets_of(self, rows: Sequence[Row]) -> tuple[str, dict[str, list[tuple[str, Shape, str]]], Whole | None]:
        """(the name of a step with these rows, choices by preset, what was found before)"""
        calls, backends = calls_of(rows), trial_presets.distinct(rows)
        choices = {
            name: [(row.op, row.shape, backend) for row, backend in zip(rows, own, strict=True)]
            for name, own in backends.items()
        }
        stored = self._stored_wholes.get(calls)
        return calls, choices, stored if stored is not None and stored.preset in choices else None

    def _compared(self, calls: str, choices: dict[str, list[tuple[str, Shape, str]]], run: Callable) -> Whole | None:
        """The fastest preset of the step; None where the budget leaves no time for that."""
        before, rows = {op: dict(own) for op, own in self._tried.chosen.items()}, self.rows

        def step(preset: str) -> float:
            self._take(choices[preset], "")
            return self._step_clock(f"preset {preset}", run) if self._main else float(run() is None)

        began = monotonic()
        try:
            found = trial_presets.timed([*choices], step, self._left_of_presets, self._share)
        finally:
            self._left_of_presets -= monotonic() - began
            self._tried.chosen, self.rows = before, rows
        if not found.complete:
            self._unfinished.append("presets of the whole step")
            return None
        whole = self._share(trial_presets.judged(calls, found) if self._main else None)
        if self._main and not self._untried and not self._unfinished:
            self._kept = self._store.add(whole=whole) or self._kept
            self._speak()
        return whole

    def _take(self, choices: Sequence[tuple[str, Shape, str]], why: str) -> None:
        """From now on these calls run on these backends."""
        for op, shape, backend in choices:
            self._tried.chosen.setdefault(op, {})[shape] = Choice(backend, why)
        taken = {(op, shape): backend for op, shape, backend in choices}
        self.rows = [replace(row, backend=taken.get((row.op, row.shape), row.backend)) for row in self.rows]

    # ---- a call ------------------------------------------------------------------------------------------------------

    def _install(self) -> Tried:
        if self._tried is None:
            self._outer, self._tried = _tried.current(), Tried(untried=self._untried_choice)
            wrong = {}
            if self._main:
                self._store = Store(place(self._device, self._timed))
                found = self._store.read()
                if not self._anew:
                    self._stored, self._stored_wholes, wrong = found.rows, found.wholes, found.wrong
                self._speak()
            self._tried.wrong = self._share(wrong)
            for (op, backend), why in self._tried.wrong.items():
                self._say(f"kernels: {op} does not run on {backend} on this card, as was found before: {why}")
            _tried.install(self._tried)
        return self._tried

    def _meet(self, op: Op, args: Sequence[Any], shape: Shape) -> Choice | None:
        """Called at the first call of a shape, on every process."""
        recording = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if recording or self._left_alone(op, args):
            return None
        choice, wrong = self._share(self._decide(op, args, shape) if self._main else None)
        self._disable(op.name, wrong)
        if choice is None and self._steps < STEPS:
            self._deferred = True
            return Choice(REFERENCE, "to be tried at the first update that is not skipped")
        choice = choice or Choice(REFERENCE, f"not tried: the first {STEPS} updates were skipped")
        self._tried.chosen.setdefault(op.name, {})[shape] = choice
        self._news = True
        return choice

    def _left_alone(self, op: Op, args: Sequence[Any]) -> bool:
        """Whether a call is none of ours: on another device, or of a shape that was measured."""
        device = _op.tensors_in(args)[0].device
        measured = not self._everything and _op.measured(op.name, device, args)
        return measured or device.type != self._device.type

    def _untried_choice(self, op: Op, args: Sequence[Any]) -> Choice | None:
        return None if self._left_alone(op, args) else Choice(REFERENCE, "not tried on this card")

    def _disable(self, op: str, wrong: dict[str, str]) -> None:
        """Use these backends no more. Where they were right at another shape, that is tried again without them."""
        self._tried.wrong.update({(op, backend): why for backend, why in wrong.items()})
        chosen = self._tried.chosen.get(op, {})
        for shape in [shape for shape, choice in chosen.items() if choice.backend in wrong]:
            del chosen[shape]
        self.rows = [row for row in self.rows if row.op != op or row.backend not in wrong]

    def _decide(self, op: Op, args: Sequence[Any], shape: Shape) -> tuple[Choice | None, dict[str, str]]:
        """(the choice, None if the call proves nothing; backends that are wrong and why)"""
        row = self._stored.get((op.name, shape))
        if row is not None:
            problem = self._problem(op.name, row.backend)
            if problem is None:
                self.rows.append(row)
                return Choice(row.backend, _reason(row)), {}
            self._say(f"kernels: {self._store.path} has {row.backend} for {op.name}, which is not used: {problem}")
        if self._left <= 0:
            self._untried.append(op.name)
            return Choice(REFERENCE, f"not tried: the budget of {self._budget:g} s was spent"), {}
        began = monotonic()
        usable = self._usable(op)
        cast = op.cast(args)
        compiler = self._left - self._budget / 2
        try:
            found = candidates.apart(
                lambda: candidates.try_out(Call.of(op, cast, shape.trained), usable, self._left, compiler, self._clock),
                self._device,
            )
        except NothingToSee:
            return None, {}
        except torch.OutOfMemoryError:
            first = next(iter(usable), op.backends[-1])
            return Choice(first.name, "not tried: memory does not suffice to compare it"), {}
        except BrokenDevice as error:
            self._report(op, args, shape, Findings(wrong={error.backend: str(error)}))
            raise
        finally:
            self._left -= monotonic() - began
        self._report(op, args, shape, found)
        row = Row(op.name, shape, found.backend, found.seconds, found.failed)
        self.rows.append(row)
        if found.complete:
            self._kept = self._store.add(row) or self._kept
            self._speak()
        else:
            self._unfinished.append(op.name)
        return Choice(row.backend, _reason(row)), found.wrong

    def _report(self, op: Op, args: Sequence[Any], shape: Shape, found: Findings) -> None:
        """Say what is wrong, and keep it, with a report for those who can mend it."""
        for backend, why in found.wrong.items():
            content = {"why": why, "shape": str(shape), "arguments": list(map(_described, args))}
            path = self._store.report(op.name, backend, content | {"errors": found.errors.get(backend, [])})
            self._store.add(wrong={(op.name, backend): why})
            sending = f" Please send {path} with a bug report: it has sizes and errors, and no data." if path else ""
            self._say(f"kernels: WRONG ON THIS CARD and not used: {op.name} on {backend}: {why}.{sending}")
        self._speak()

    def _usable(self, op: Op) -> list[Backend]:
        """What may run the op here besides the reference."""
        able = [backend for backend in op.backends if backend.capability(self._device, False)[0]]
        return [b for b in able if b.name != REFERENCE and (op.name, b.name) not in self._tried.wrong]

    def _problem(self, op: str, backend: str) -> str | None:
        """Why a choice made elsewhere cannot be followed."""
        if op not in _op.OPS:
            return f"there is no op {op}"
        if (op, backend) in self._tried.wrong:
            return "it is wrong on this card"
        if backend == INDUCTOR:
            return None
        known = {known.name: known for known in _op.OPS[op].backends}
        if backend not in known:
            return f"{op} has {', '.join(known)}"
        able, reason = known[backend].capability(self._device, False)
        return None if able else reason

    def _speak(self) -> None:
        """Pass on the notes of the store, each once."""
        for note in dict.fromkeys(self._store.notes):
            self._say(f"kernels: {note}")
        self._store.notes.clear()


def _reason(row: Row) -> str:
    return f"fastest of {', '.join(row.seconds)} here: {row.gain:.2f}x PyTorch's own operations"


def _reason_of_whole(whole: Whole) -> str:
    others = f"fastest of {', '.join(whole.seconds)}" if whole.preset != DEFAULT else "no other was faster"
    return f"the whole step runs in the preset {whole.preset}: {others} here{_gain(whole)}"


def _gain(whole: Whole) -> str:
    """How many times as fast as in the default a step is in the preset; nothing to say of the default itself."""
    if whole.preset == DEFAULT or DEFAULT not in whole.seconds:
        return ""
    return f", {whole.seconds[DEFAULT] / whole.seconds[whole.preset]:.2f}x {DEFAULT}"


def _of_op(op: str, rows: Sequence[Row]) -> str:
    names = "/".join(dict.fromkeys(row.backend for row in rows))
    if names == REFERENCE:
        return f"{op} {names}"
    gain = sum(row.seconds[REFERENCE] for row in rows) / sum(row.seconds[row.backend] for row in rows)
    return f"{op} {names} ({gain:.1f}x PyTorch)"


def _described(value: Any) -> Any:
    """An argument without its values, but for plain numbers and words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}, strides {list(value.stride())}"
    if isinstance(value, list | tuple):
        return list(map(_described, value))
    return value if isinstance(value, bool | int | float | str | None) else str(value)
