"""What the guides that the project grew from expect of a router with DuoAttention, beside what a comparison measured."""

import math

from pikv.experiments.results import Comparison

_SAVED, _KEPT = (0.4, 0.6), (0.93, 0.97)


def judge_router_with_duo(comparison: Comparison) -> list[str]:
    """For every method made of an EPLB router and DuoAttention: does it save 40 to 60% at 93 to 97% of the quality?"""
    lines = []
    frame = comparison.frame()
    for _, row in frame[frame["num_answers"] > 0].iterrows():
        method, saved, kept = row["method"], row["quality_kv_removed"], row["quality_kept"]
        if not {"eplb", "duo"} <= {part.partition(":")[0] for part in method.split("+")} or math.isnan(kept):
            continue
        holds = saved >= _SAVED[0] and kept >= _KEPT[0]
        said = "holds" if holds else "does not hold"
        if holds and (saved > _SAVED[1] or kept > _KEPT[1]):
            said += ", and more than that"
        lines.append(
            f"Expected of EPLB with DuoAttention: 40 to 60% of the memory saved at 93 to 97% of the quality. This {said} here: "
            f"{method} saved {100 * saved:.0f}% of the bytes at {row['num_tokens']:,} tokens and kept {100 * kept:.1f}% of the "
            "accuracy."
        )
    return lines
