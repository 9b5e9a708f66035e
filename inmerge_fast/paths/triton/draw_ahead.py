"""Drawing for several calls at once, where steps that follow each other evenly tell what the next calls will be."""

from __future__ import annotations

from typing import NamedTuple

from ...draw import MAX_STEP

DRAW_AHEAD = 4  # calls in one launch: a quarter of a launch each; with 8 an eighth, for twice the memory


class Drawn(NamedTuple):
    """What the latest launch has drawn.

    Attributes:
        seed: seed of all its draws.
        coin: the coin's threshold of all its draws.
        step: step of the first one.
        stride: from one step to the next; None if the call before was of another kind.
        first: number of the call that the first draw is for.
        end: number of the call after those it has drawn for.
    """

    seed: int
    coin: int
    step: int
    stride: int | None
    first: int
    end: int

    def step_of(self, call: int) -> int:
        """Step of a call, if the calls go on as they did."""
        return self.step + (call - self.first) * (self.stride or 0)

    def serves(self, call: int, seed: int, step: int, coin: int) -> bool:
        """Whether a call with these numbers finds its draw made."""
        return call < self.end and step == self.step_of(call) and coin == self.coin and seed == self.seed


def next_draw(last: Drawn | None, call: int, seed: int, step: int, coin: int) -> Drawn:
    """What to draw for a call that nothing was drawn for: its own draw, and the next ones' if they can be told.

    They can when the step is as far from the last as that one was from the one before, with the same seed and prob. So
    nothing is drawn ahead for calls without a seed, which draw one each, nor while a schedule changes prob. A wrong
    guess costs two memsets, which is why two equal distances are waited for.
    """
    if last is None or (last.seed, last.coin) != (seed, coin):
        return Drawn(seed, coin, step, None, call, call + 1)
    stride = step - last.step_of(call - 1)
    goes_on = stride == last.stride and 0 <= step + (DRAW_AHEAD - 1) * stride <= MAX_STEP
    return Drawn(seed, coin, step, stride, call, call + (DRAW_AHEAD if goes_on else 1))
