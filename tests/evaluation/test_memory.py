"""Peak memory is what the process really held."""

import torch

from pikv.evaluation.memory import measure_peak, release, resident

MEBI = 1 << 20


def test_the_peak_includes_what_was_freed_again():
    release()
    before = resident()
    with measure_peak(torch.device("cpu")) as peak:
        block = torch.ones(200 * MEBI // 4)
        del block
    assert 180 * MEBI < peak.nbytes - before < 260 * MEBI
    release()
    assert resident() - before < 60 * MEBI


def test_an_earlier_peak_does_not_count():
    block = torch.ones(200 * MEBI // 4)
    del block
    with measure_peak(torch.device("cpu")) as peak:
        pass
    assert peak.nbytes - resident() < 60 * MEBI
