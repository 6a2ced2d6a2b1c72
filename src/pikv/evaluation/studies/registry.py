"""The studies by name."""

from pikv.evaluation.studies.base import Builder, Study
from pikv.evaluation.studies.calibration import CALIBRATION
from pikv.evaluation.studies.eplb_duo import EPLB_DUO_STUDY
from pikv.evaluation.studies.mix import MIX
from pikv.evaluation.studies.presses import COMBINATIONS, duo_and_router, expert_alone, routed, router_presses, single_presses
from pikv.registry import unknown
from pikv.routing.experts import EXPERTS

RATIOS = (0.1, 0.3, 0.5, 0.7)


def _sensitivity() -> dict[str, Builder]:
    return {f"moe_pikv:{ratio:g}": routed("pikv", ratio) for ratio in RATIOS}


def _experts() -> dict[str, Builder]:
    return {name: expert_alone(name) for name in EXPERTS}


STUDIES = {
    study.name: study
    for study in (
        Study(
            name="routers",
            description="every router at the same ratio",
            builders=lambda: router_presses(0.5),
        ),
        Study(
            name="presses",
            description="single presses, with and without routers",
            builders=single_presses,
        ),
        Study(
            name="combos",
            description="combinations of presses beside single ones",
            builders=single_presses,
            combined=COMBINATIONS.copy,
        ),
        Study(
            name="sensitivity",
            description="one press at rising ratios",
            builders=_sensitivity,
        ),
        Study(
            name="experts",
            description="every retention expert alone",
            builders=_experts,
            has_own_amounts=True,
        ),
        Study(
            name="benchmark",
            description="single presses beside a combination that removes about as much, more often",
            builders=single_presses,
            combined=lambda: {"duo:0.2+moe_pikv:0.2": duo_and_router("pikv", 0.2)},
            num_repeats=10,
        ),
        EPLB_DUO_STUDY,
        CALIBRATION,
        MIX,
    )
}


def get_study(name: str) -> Study:
    """The study of a name.

    Raises:
        ValueError: for an unknown name, with the nearest.
    """
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    return STUDIES[name]
