"""The processes that train one model together. torchrun, or what stands in for it, starts them.

They talk in two ways: tensors of a step through PyTorch's default process group, and everything else (who
failed, what was decided, results) through a second one on the CPU, which never waits for a device. What one
of them has to say when it ends early stands in the store by which they found each other.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store as _default_store
from torch.distributed.rendezvous import rendezvous

from fastmrcnn.errors import UserError

T = TypeVar("T")

MEETING = datetime.timedelta(minutes=10)  # how long the first process waits for the last one
PATIENCE = datetime.timedelta(hours=1)  # for the first process to read, judge or save what is large
LAST_WORDS_S = 2.0  # for the message of a process that has ended to arrive
PIECE = 16 * 2**20  # bytes that are sent at a time
_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Told(SystemExit):
    """This process ends without a word: the first one knows why, and says it."""


class LostError(UserError):
    """Another process of the run has gone."""


class Group(NamedTuple):
    """This process among those of the run. All of them come to each method that speaks of all, in the same
    order; alone such a method does nothing but what it is given."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of its machine

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def lead(self, make: Callable[[], T]) -> T:
        """What `make` gives to the first process, on all. What it raises there ends the others without a
        word."""
        if self.size == 1:
            return make()
        answer: list[Any] = [None, None]
        if not self.leads:
            with _telling_of_lost():
                dist.broadcast_object_list(answer, src=0, group=_control())
            if answer[1] is not None:
                raise Told(answer[1])
            return answer[0]
        try:
            answer[0] = make()
        except BaseException as error:
            answer[1] = exit_code(error)
            with contextlib.suppress(RuntimeError):  # the reason itself goes on
                dist.broadcast_object_list(answer, src=0, group=_control())
            raise
        with _telling_of_lost():
            dist.broadcast_object_list(answer, src=0, group=_control())
        return answer[0]

    def each(self, make: Callable[[], T]) -> T:
        """`make()` on every process, each for itself; a failure of one is one of all, as `agree` has it."""
        if self.size == 1:
            return make()
        try:
            value = make()
        except KeyboardInterrupt:  # does not wait until the others are here
            raise
        except BaseException as error:
            self.agree(error)
            raise
        self.agree()
        return value

    def agree(self, error: BaseException | None = None) -> None:
        """Go on only if no process came here with an error.

        Raises:
            Its own error on a process that has one and that others cannot speak for; UserError on the first
            process, with the others' reason; Told on the others.
        """
        said = self.gather(None if error is None else (one_line(error), exit_code(error)))
        failed = [(rank, *words) for rank, words in enumerate(said) if words is not None]
        if not failed:
            return
        rank, reason, code = failed[0]
        if error is not None and (self.leads or not isinstance(error, UserError)):
            raise error
        if self.leads:
            raise UserError(f"process {rank}: {reason}")
        raise Told(code)

    def end(self, error: UserError) -> NoReturn:
        """Raise what all processes have found alike, so that the first one alone says it."""
        if self.leads:
            raise error
        raise Told(exit_code(error))

    def gather(self, value: T) -> list[T]:
        """The value of each process, on all. For what is small."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _telling_of_lost():
            dist.all_gather_object(found, value, group=_control())
        return found

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each of these numbers, place by place. It takes a fraction of a millisecond."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64)
        with _telling_of_lost():
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_control())
        return values.tolist()

    def collect(self, items: Iterable[T]) -> list[list[T]]:
        """The items of each process, on the first one; none on the others. They may be many and large: they
        are sent one after the other, in pieces of bounded size."""
        if self.size == 1:
            return [list(items)]
        if not self.leads:
            with _telling_of_lost():
                for item in items:
                    _send(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL))
                _send(b"")
            return [[] for _ in range(self.size)]
        found: list[list[T]] = [list(items)]
        with _telling_of_lost():
            for rank in range(1, self.size):
                theirs: list[T] = []
                while data := _receive(rank):
                    theirs.append(pickle.loads(data))
                found.append(theirs)
        return found


ALONE = Group()

_groups: dict[str, Any] = {}  # what `joined` has made: "control", a process group, and "store"


def group_of_environment(environment: Mapping[str, str] | None = None) -> Group:
    """The group that RANK, WORLD_SIZE and LOCAL_RANK describe; ALONE if neither of the first two is set.

    Without LOCAL_RANK each process is taken to have a machine, or a container, of its own.

    Raises:
        UserError: some of what belongs together is missing, or no number.
    """
    given = os.environ if environment is None else environment
    if not given.get("RANK") and not given.get("WORLD_SIZE"):
        return ALONE
    missing = [name for name in _REQUIRED if not given.get(name)]
    if given.get("WORLD_SIZE") == "1":
        missing = [name for name in missing if name in ("RANK", "WORLD_SIZE")]
    if missing:
        there = [name for name in (*_REQUIRED, "LOCAL_RANK") if given.get(name)]
        raise UserError(
            f"{', '.join(there)} of a run of several processes {'is' if len(there) == 1 else 'are'} set, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not; start it with torchrun, or "
            "unset them to train in one process"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = given.get(name) or "0"
        if not text.isdecimal():
            raise UserError(f"{name}={text}: expected a number; start the run with torchrun")
        numbers[name] = int(text)
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise UserError(f"RANK={numbers['RANK']} is not below WORLD_SIZE={numbers['WORLD_SIZE']}")
    return Group(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"])


@contextlib.contextmanager
def joined(group: Group) -> Iterator[Group]:
    """A block in which the processes know each other: NCCL for tensors on GPUs, gloo for those on the CPU.

    Alone it does nothing.

    Raises:
        UserError: not all came within ten minutes, or they cannot reach each other.
    """
    if group.size == 1:
        yield group
        return
    found = dist.is_initialized()  # Ray Train joins before it calls
    _meet(group, found)
    try:
        yield group
    except BaseException as error:
        # No farewell: others may wait in an operation that comes to its end only with this process.
        if not isinstance(error, SystemExit):
            tell(group, error)
        raise
    else:
        if not found:
            dist.destroy_process_group()
    finally:
        _groups.clear()


@contextlib.contextmanager
def first_speaks(group: Group) -> Iterator[None]:
    """What the other processes print goes nowhere, and their errors say whose they are."""
    if group.leads:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            yield
        except UserError as error:
            raise UserError(f"process {group.rank}: {error}") from error


def _meet(group: Group, found: bool) -> None:
    """
    Args:
        found: the default process group is there.
    """
    if not found:
        _find_each_other(group)
    store = dist.PrefixStore("fastmrcnn", _default_store())
    _groups.update(store=store, control=dist.new_group(backend="gloo", timeout=PATIENCE))


def _find_each_other(group: Group) -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = next(iter(rendezvous("env://", group.rank, group.size, timeout=MEETING)))
        # torchrun's store outlives the processes: what those of an earlier start left in it leads nowhere.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        own = dist.PrefixStore("fastmrcnn", store)
        own.set(f"here/{rank}", "")
        own.wait([f"here/{number}" for number in range(size)], MEETING)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the {group.size} processes of the run did not find each other at {place} ({one_line(error)}); "
            "check that all were started, and that each machine reaches MASTER_ADDR and MASTER_PORT"
        ) from error


def tell(group: Group, error: BaseException) -> None:
    """Leave word of why this process ends."""
    store = _groups.get("store")
    if store is not None:
        with contextlib.suppress(RuntimeError):
            store.set(f"gone/{group.rank}", one_line(error))


def lost_peer(error: BaseException) -> str | None:
    """One line if an error is torch's word that another process of the run has gone."""
    if not _groups or not isinstance(error, RuntimeError):
        return None
    text = str(error)
    lost = isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    )
    if not lost:
        return None
    words = _last_words()
    if words:
        return "; ".join(f"process {rank}: {reason}" for rank, reason in words.items())
    return f"another process of the run has ended without a word ({one_line(error)})"


def _last_words() -> dict[int, str]:
    """What processes that have ended left in the store, by rank."""
    store, size = _groups["store"], dist.get_world_size()
    until = time.monotonic() + LAST_WORDS_S
    while True:
        found = {}
        try:
            for rank in range(size):
                if store.check([f"gone/{rank}"]):
                    found[rank] = store.get(f"gone/{rank}").decode()
        except RuntimeError:  # the store was with the process that has gone
            return {}
        if found or time.monotonic() > until:
            return found
        time.sleep(0.05)


@contextlib.contextmanager
def _telling_of_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if (reason := lost_peer(error)) is None:
            raise
        raise LostError(reason) from error


def exit_code(error: BaseException) -> int:
    """With which a process ends by an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", 2)
    return 2 if isinstance(error, UserError) else 1


def one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return f"was stopped by signal {getattr(error, 'number', 2)}"
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _control() -> Any:
    return _groups["control"]


def _send(data: bytes) -> None:
    control = _control()
    dist.send(torch.tensor([len(data)]), 0, group=control)
    for start in range(0, len(data), PIECE):
        piece = torch.frombuffer(bytearray(data[start : start + PIECE]), dtype=torch.uint8)
        dist.send(piece, 0, group=control)


def _receive(rank: int) -> bytes:
    control, size = _control(), torch.zeros(1, dtype=torch.int64)
    dist.recv(size, rank, group=control)
    data = torch.empty(int(size), dtype=torch.uint8)
    for piece in data.split(PIECE):
        if len(piece):
            dist.recv(piece, rank, group=control)
    return data.numpy().tobytes()
