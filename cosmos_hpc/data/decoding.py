"""Decoding where it can do no harm: in a child process that is killed when it hangs and replaced when it dies."""

import contextlib
import ctypes
import gc
import math
import mmap
import os
import signal
import time
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cosmos_hpc.data.choosing import ChosenClip, ClipKind, choose
from cosmos_hpc.data.clips import Fault, UndecodableError, memory_file
from cosmos_hpc.data.decoders import Wanted, decode_boxes, suitable_decoders
from cosmos_hpc.data.packets import Cutter, Packets, scanned
from cosmos_hpc.data.workers import PR_SET_PDEATHSIG, SIGNALS_TO_THE_RANK, give_memory_back

IDLE_SHARE = 0.05
"""Of the time limit: a decoder that had less of the processor than this while it passed is not at work."""


DIED = "died"
"""What the keeper tells when a process that decoded is dead."""


class Request(NamedTuple):
    """What a child is asked for; the video's bytes lie in the memory that both share."""

    number: int
    """Which one; the answer bears it, as one that waited for a process that died is answered by the next, too."""

    kinds: tuple[ClipKind, ...]
    """What each of the K clips out of one decoded stretch looks like."""

    seed: int | None
    """Of all that is chosen by chance; none: the middle."""

    decoder: str
    """The one to begin with."""

    has_mask: bool
    """Whether the video's mask lies in its own memory; without one, all of the picture counts."""

    @property
    def clip_bytes(self) -> int:
        """Of the uint8 clips, one behind the other."""
        return sum(math.prod(kind.shape) for kind in self.kinds)

    def clips_in(self, memory: Tensor) -> list[Tensor]:
        """Views of them, uint8 [C, T, H, W] each."""
        parts = memory[: self.clip_bytes].split([math.prod(kind.shape) for kind in self.kinds])
        return [part.view(kind.shape) for part, kind in zip(parts, self.kinds, strict=True)]


class ClipDecoder:
    """Clips out of encoded videos, through a child process of the one that asks first."""

    def __init__(self, timeout_s: float, decoder: str = "decord") -> None:
        """The child starts with `start`, or with the first clip.

        Args:
            timeout_s: Seconds of the processor that a call may take. A decoder that sleeps is given as long by the
                clock; one that only waits for a busy processor is left to it.
            decoder: `decord`, `pyav` or `torchcodec`.
        """
        self._timeout_s = timeout_s
        self._decoder = decoder
        self._child: _Child | None = None
        self._num_asked = 0

    def clips(self, raw: bytes, kinds: Sequence[ClipKind], seed: int | None, mask: bytes | None = None) -> list[Tensor]:
        """Decode clips out of one stretch of a video.

        Args:
            raw: A video file's bytes.
            kinds: What each clip looks like.
            seed: Of all that is chosen by chance; none: the middle of the video and of the picture.
            mask: A picture's or video's bytes, of the video's size, for kinds that have one.

        Returns:
            uint8 [C, T, H, W] of each kind.

        Raises:
            UndecodableError: if the video can't be decoded, is too short, or hangs or kills the decoder.
        """
        self._num_asked += 2
        request = Request(self._num_asked, tuple(kinds), seed, self._decoder, mask is not None)
        try:
            return self._ask(raw, mask, request)
        except EOFError:  # the child died: of the video, or of something that a second one is spared
            try:
                return self._ask(raw, mask, request._replace(number=self._num_asked + 1))
            except EOFError:
                raise UndecodableError("the decoder crashed twice", Fault.CRASHING) from None

    def start(self) -> None:
        """Fork now, while the process is small: what it holds then, the child holds as long as it lives."""
        if self._child is None or self._child.parent != os.getpid():  # a forked process needs one of its own
            self._child = _Child()

    def close(self) -> None:
        """End the child; a further clip starts another."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def _ask(self, raw: bytes, mask: bytes | None, request: Request) -> list[Tensor]:
        self.start()
        child = self._child
        assert child is not None, "start makes one"
        try:
            error = child.answer(raw, mask, request, self._timeout_s)
        except DecoderDiedError:
            raise
        except EOFError:
            self.close()
            raise
        except TimeoutError:
            child.replace()
            reason = f"the decoder took more than {self._timeout_s:g} s"
            raise UndecodableError(reason, Fault.HANGING) from None
        if error is not None:
            raise error
        return [clip.clone() for clip in request.clips_in(child.output)]


class DecoderDiedError(EOFError):
    """The process that decodes is dead, and another one in its place."""


class _Child:
    """A process that keeps one that decodes, and the memory shared with that.

    The keeper is forked early and decodes nothing, so that whatever decodes after a hang is small, too: forked from a
    worker with its buffers full, it would hold on to what was in them.
    """

    def __init__(self) -> None:
        self.parent = os.getpid()
        self._input = os.memfd_create("video", os.MFD_CLOEXEC)
        self._mask = os.memfd_create("mask", os.MFD_CLOEXEC)
        self._output = os.memfd_create("clip", os.MFD_CLOEXEC)
        self.output = torch.empty(0, dtype=torch.uint8)
        self._decoder: list[int] = []
        self._connection, childs_end = Pipe()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_TO_THE_RANK)
        keeper = os.fork()
        if keeper == 0:
            try:
                self._connection.close()
                self._keep(childs_end)
            finally:
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        childs_end.close()
        descriptors = self._input, self._mask, self._output
        self.end = weakref.finalize(self, _end, self.parent, keeper, self._decoder, self._connection, descriptors)

    def answer(self, raw: bytes, mask: bytes | None, request: Request, timeout_s: float) -> UndecodableError | None:
        """Have the clips put into `output`.

        Raises:
            EOFError: if the child is dead.
            TimeoutError: if it hangs.
        """
        if not raw:
            return UndecodableError("the file is empty")
        _put(raw, self._input)
        if mask is not None:
            _put(mask, self._mask)
        if len(self.output) < request.clip_bytes:
            os.ftruncate(self._output, request.clip_bytes)
            self.output = _mapped(self._output, request.clip_bytes)
        try:
            if not self._decoder:
                self._decoder.append(self._connection.recv())
            self._connection.send(request)
            while True:
                self._wait(timeout_s)
                found = self._connection.recv()
                if found == DIED:
                    self._decoder.clear()
                    raise DecoderDiedError
                number, error = found
                if number == request.number:
                    return error
        except TimeoutError:
            raise
        except OSError as error:
            raise EOFError from error

    def replace(self) -> None:
        """Kill what decodes; the keeper starts another."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._decoder[0], signal.SIGKILL)
        with contextlib.suppress(EOFError, OSError):  # the next call finds that the keeper is dead
            while self._connection.recv() != DIED:
                pass
        self._decoder.clear()

    def _wait(self, timeout_s: float) -> None:
        """Until there is an answer.

        Raises:
            TimeoutError: if the decoder has used up its time, or sleeps.
        """
        (pid,) = self._decoder
        first = before = _processor_s(pid)
        asked = time.monotonic()
        while not self._connection.poll(timeout_s):
            now, used = time.monotonic(), _processor_s(pid)
            was_stopped = now - asked > 2 * timeout_s  # with its parent: it had no chance
            sleeps = used - before < IDLE_SHARE * timeout_s and not _is_runnable(pid)
            if not was_stopped and (used - first >= timeout_s or sleeps):
                if self._connection.poll():  # it sleeps since it has answered, while this process had no processor
                    return
                raise TimeoutError
            asked, before = now, used

    def _keep(self, connection: Connection) -> None:
        """In the child: have a process that decodes, until one leaves by itself."""
        _live_only_below(self.parent)
        signal.set_wakeup_fd(-1)
        for number in SIGNALS_TO_THE_RANK:
            signal.signal(number, signal.SIG_IGN)
        give_memory_back()
        gc.enable()
        gc.freeze()
        torch.set_num_threads(1)  # a pool of threads doesn't outlive a fork
        keeper = os.getpid()
        while True:
            decoder = os.fork()
            if decoder == 0:
                _live_only_below(keeper)
                connection.send(os.getpid())
                self._serve(connection)
                os._exit(0)
            _, status = os.waitpid(decoder, 0)
            if status == 0:
                return
            connection.send(DIED)

    def _serve(self, connection: Connection) -> None:
        """In the child's child: answer until there is no more to do."""
        output = torch.empty(0, dtype=torch.uint8)
        while (request := connection.recv()) is not None:
            if len(output) < request.clip_bytes:
                output = _mapped(self._output, request.clip_bytes)
            try:
                video, mask = (f"/proc/self/fd/{descriptor}" for descriptor in (self._input, self._mask))
                cut_clips(video, mask, request, request.clips_in(output))
                connection.send((request.number, None))
            except UndecodableError as error:
                connection.send((request.number, error))
            except Exception as error:  # reaches the user as the reason
                connection.send((request.number, UndecodableError(f"{type(error).__name__}: {error}")))


def _live_only_below(parent: int) -> None:
    """Die with the process that forked this one."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def cut_clips(video: str, mask: str, request: Request, output: Sequence[Tensor]) -> None:
    """Decode and crop in this process.

    Args:
        video: Its path.
        mask: That of its mask, if the request says that there is one.
        request: Which clips.
        output: uint8 [C, T, H, W] of each, written into.

    Raises:
        UndecodableError: if the video or its mask can't be decoded or is too short.
    """
    with scanned(video) as (packets, cutter):
        chosen = choose(packets, request.kinds, request.seed)
        _cut(packets, cutter, chosen, request.decoder, [clip[:3] for clip in output])
    masks = [clip[3:] for clip in output]
    if not request.has_mask:
        for each in masks:
            each.fill_(255)
        return
    try:
        with scanned(mask) as (mask_packets, cutter):
            _cut(mask_packets, cutter, _of_mask(chosen, packets, mask_packets), request.decoder, masks)
    except UndecodableError as error:
        raise UndecodableError(f"its mask is of no use: {error}", error.fault) from error


def _of_mask(chosen: Sequence[ChosenClip], video: Packets, mask: Packets) -> list[ChosenClip]:
    """The same frames of the mask; of a picture, its only one."""
    (height, width), (other_height, other_width) = (each.upright_size for each in (video, mask))
    if (height, width) != (other_height, other_width):
        reason = f"it is {other_width} x {other_height} for a video of {width} x {height}, upright"
        raise UndecodableError(reason)
    if mask.num_frames not in (1, video.num_frames):
        raise UndecodableError(f"it has {mask.num_frames} frames for a video of {video.num_frames}")
    turns = (video.num_quarter_turns - mask.num_quarter_turns) % 4  # a picture stands upright as it is
    return [
        each._replace(
            frames=np.minimum(each.frames, mask.num_frames - 1), box=each.box.turned(turns, video.height, video.width)
        )
        for each in chosen
    ]


def _cut(packets: Packets, cutter: Cutter, chosen: Sequence[ChosenClip], decoder: str, output: list[Tensor]) -> None:
    """Decode the chosen clips into uint8 [1 or 3, T, H, W] of each."""
    decoders = suitable_decoders(decoder, packets)
    users = _users(chosen)
    for stretch in cutter.stretches(sorted(users)):
        targets = [target for frame in stretch for target in users[frame]]

        def put(number: int, picture: np.ndarray, targets: list[tuple[int, int]] = targets) -> None:
            clip, place = targets[number]
            upright = np.rot90(picture, packets.num_quarter_turns)
            mirrored = upright[:, ::-1] if chosen[clip].is_mirrored else upright
            output[clip][:, place] = _fitted(mirrored[..., : len(output[clip])], output[clip])

        with memory_file("stretch") as path_of_cut:
            frames = cutter.cut(stretch, path_of_cut)
            wanted = [
                Wanted(frame, [chosen[clip].box for clip, _ in users[original]])
                for frame, original in zip(frames, stretch, strict=True)
            ]
            decode_boxes(path_of_cut, wanted, put, decoders)


def _users(chosen: Sequence[ChosenClip]) -> dict[int, list[tuple[int, int]]]:
    """For each frame that is needed, the clips that need it and its place in them."""
    users: dict[int, list[tuple[int, int]]] = {}
    for clip, each in enumerate(chosen):
        for place, frame in enumerate(each.frames.tolist()):
            users.setdefault(frame, []).append((clip, place))
    return users


def _fitted(picture: np.ndarray, output: Tensor) -> Tensor:
    """[H, W, C] pixels as [C, H', W'] of the output, resized where that is another size."""
    size = output.shape[-2:]
    pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
    if pixels.shape[-2:] == size:
        return pixels
    return interpolate(pixels.unsqueeze(0), size=tuple(size), mode="bilinear", antialias=True)[0]


def _put(raw: bytes, descriptor: int) -> None:
    """Make them all that a file in memory holds."""
    os.ftruncate(descriptor, len(raw))
    written = 0
    while written < len(raw):
        written += os.pwrite(descriptor, memoryview(raw)[written:], written)


def _mapped(descriptor: int, num_bytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)


def _processor_s(pid: int) -> float:
    """Processor seconds that a process has had, all threads together; 0 where it is gone."""
    try:
        fields = _fields(Path(f"/proc/{pid}/stat"))
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _is_runnable(pid: int) -> bool:
    """True if a thread of the process works, or would if it had a processor."""
    try:
        return any(_fields(path)[0] in "RD" for path in Path(f"/proc/{pid}/task").glob("*/stat"))
    except OSError:
        return False


def _fields(stat: Path) -> list[str]:
    """What a process's or thread's line says from its state on: proc(5)."""
    return stat.read_text(encoding="utf-8").rpartition(")")[2].split()


def _end(parent: int, keeper: int, decoder: list[int], connection: Connection, descriptors: tuple[int, ...]) -> None:
    if parent == os.getpid() and decoder:
        with contextlib.suppress(ProcessLookupError):
            os.kill(decoder[0], signal.SIGKILL)  # it may hang
    if parent == os.getpid():
        with contextlib.suppress(OSError):
            connection.send(None)  # whatever decodes now, and with it the keeper, leaves
        os.waitpid(keeper, 0)
    connection.close()
    for descriptor in descriptors:
        os.close(descriptor)
