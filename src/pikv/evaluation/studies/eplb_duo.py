"""EPLB routing with DuoAttention, beside DuoAttention alone and no compression, as the guide compares them."""

from pikv.evaluation.studies.base import Builder, Study
from pikv.evaluation.studies.presses import moe_press
from pikv.presses.composed import ComposedPress
from pikv.presses.duo import DuoAttentionPress

DUO, EPLB_DUO = "duo_attention", "eplb_duo"
_DUO_RATIO, _EPLB_SHARE, _DUO_SHARE = 0.5, 0.35, 0.15  # the guide's

EXPECTED = (
    "What the guide expects (not measured here)",
    ["pair", "memory reduction", "speed", "quality kept"],
    [
        ["duo_attention against none", "30-50%", "1.2-1.5x", "95-98%"],
        ["eplb_duo against none", "40-60%", "1.5-2.0x", "93-97%"],
        ["eplb_duo against duo_attention", "15-25%", "1.1-1.2x", "a little lower"],
    ],
)


def _single() -> dict[str, Builder]:
    return {DUO: lambda settings: DuoAttentionPress(_DUO_RATIO)}


def _combined() -> dict[str, Builder]:
    return {EPLB_DUO: lambda settings: ComposedPress([moe_press(settings, "eplb", _EPLB_SHARE), DuoAttentionPress(_DUO_SHARE)])}


EPLB_DUO_STUDY = Study(
    name="eplb_duo",
    description="EPLB routing with DuoAttention, DuoAttention alone, no compression",
    builders=_single,
    combined=_combined,
    data="demo",
    num_repeats=3,
    num_new_tokens=32,
    pairs=((DUO, "none"), (EPLB_DUO, "none"), (EPLB_DUO, DUO)),
    expected=EXPECTED,
)
