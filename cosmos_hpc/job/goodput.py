"""Where the seconds of an attempt went, from what rank 0 says of itself and what the supervisor's clock says of it."""

from collections.abc import Mapping, Sequence

from cosmos_hpc.config.run_state import AttemptRecord, Goodput


def account(seconds: Mapping[str, float], *, run_s: float, silence_s: float, before: Goodput) -> Goodput:
    """The seconds of one attempt before it is known which of its steps are lost.

    What rank 0 does not account for lies before its first heartbeat (imports) or after its last one (silence).

    Args:
        seconds: rank 0's own, by the names of the heartbeat.
        run_s: since the launcher was started.
        silence_s: since the last sign of life; 0 where there was none at all, for then nothing but the start-up was.
        before: the waits before the launcher was started: `queue_s` without an allocation, or `backoff_s` within it.
    """
    told = {name: seconds.get(name, 0.0) for name in ("train", "data", "validate", "save", "start")}
    untold_s = max(0.0, run_s - sum(told.values()))
    silence_s = min(silence_s, untold_s)
    return Goodput(
        allocated_s=before.backoff_s + max(run_s, sum(told.values())),
        productive_s=told["train"],
        startup_s=told["start"] + untold_s - silence_s,
        data_s=told["data"],
        validation_s=told["validate"],
        checkpoint_s=told["save"],
        backoff_s=before.backoff_s,
        silence_s=silence_s,
        queue_s=before.queue_s,
    )


def settle_lost_steps(attempts: Sequence[AttemptRecord]) -> None:
    """Move seconds between productive and lost, now that it is known from where later attempts went on.

    A step is lost if a later attempt started below it. While none has, an ended attempt keeps what its newest
    checkpoint holds, and a living one everything.
    """
    starts: list[int] = []
    for record in reversed(attempts):
        if record.goodput is not None:
            _split(record, record.goodput, _kept_step(record, starts))
        if record.resumed_step is not None:
            starts.append(record.resumed_step)


def _kept_step(record: AttemptRecord, later_starts: Sequence[int]) -> int | None:
    """The last step of an attempt that counts; none where all do."""
    if later_starts:
        return min(later_starts)
    return None if record.ended is None or record.saved_step is None else record.saved_step


def _split(record: AttemptRecord, goodput: Goodput, kept_step: int | None) -> None:
    first, last = record.resumed_step or 0, record.step or 0
    if last <= first:
        return
    kept = last if kept_step is None else min(max(kept_step, first), last)
    trained_s = goodput.productive_s + goodput.lost_s
    goodput.lost_s = trained_s * (last - kept) / (last - first)
    goodput.productive_s = trained_s - goodput.lost_s
