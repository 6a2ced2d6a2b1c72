"""Who keeps most quality at equal bytes."""

import math

import pandas as pd

from pikv.evaluation.methods import FULL
from pikv.evaluation.notes import FEW_RIGHT

_SAME_BYTES = 1.05  # methods whose bytes differ by no more than this factor are compared with each other
_MIN_ANSWERS, _MIN_CONTEXTS = 8, 2  # fewer rank nobody


def rank_at_equal_bytes(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """Groups the compressing methods of ``summary_frame`` by the bytes they hold, and ranks each group by quality.

    Quality is accuracy, or agreement where no answers are known. Methods that hold what no other does are left out, and all
    where fewer than 8 questions or only one context were asked about, or the full cache itself mostly fails.

    Returns:
        groups from most to fewest bytes, each with the rows of two or more methods and a column ``rank`` (ties share one)
    """
    enough = (frame["num_answers"] >= _MIN_ANSWERS) & (frame["num_contexts"] >= _MIN_CONTEXTS)
    rows = frame[enough & (frame["method"] != FULL)].sort_values("quality_kv_bytes", ascending=False)
    if (frame.loc[frame["method"] == FULL, "accuracy"] < FEW_RIGHT).any():
        return []
    numbers, number, most = [], -1, math.inf
    for held in rows["quality_kv_bytes"]:
        if number < 0 or most > held * _SAME_BYTES:
            number, most = number + 1, held
        numbers.append(number)
    ranked = []
    for _, group in rows.groupby(numbers):
        if len(group) > 1:
            quality = group["accuracy"].fillna(group["agreement"])
            members = group.assign(rank=quality.rank(ascending=False, method="min").astype(int))
            ranked.append(members.sort_values(["rank", "quality_kv_bytes"]))
    return ranked
