import pytest
import torch
from safetensors.torch import save_file

from pikv.calibration.heads import find_retrieval_heads, judge_heads, load_head_scores
from tiny import build


def test_scores_are_shares_of_attention_and_are_remembered(model):
    scores = find_retrieval_heads(model)
    assert scores.shape == (3, 4)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert find_retrieval_heads(model) is scores
    assert torch.equal(find_retrieval_heads(build(model.config.model_type)), scores)


def test_on_the_demo_model_few_heads_retrieve(demo):
    scores = find_retrieval_heads(*demo)
    assert scores.max() > 0.5
    assert scores.median() < 0.1


def test_files(llama, tmp_path):
    scores = find_retrieval_heads(llama)
    save_file({"head_scores": scores}, tmp_path / "heads.safetensors", {"model_type": "llama"})
    assert torch.equal(load_head_scores(tmp_path / "heads.safetensors", llama.config), scores)
    (tmp_path / "full_attention_heads.tsv").write_text("\n".join("\t".join(map(str, row)) for row in scores.tolist()))
    torch.testing.assert_close(load_head_scores(tmp_path / "full_attention_heads.tsv", llama.config), scores)


def test_files_that_do_not_fit(llama, tmp_path):
    path = tmp_path / "heads.safetensors"
    with pytest.raises(ValueError, match="cannot read head scores"):
        load_head_scores(path, llama.config)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot read head scores"):
        load_head_scores(path, llama.config)
    save_file({"head_scores": torch.rand(2, 4)}, path, {"model_type": "llama"})
    with pytest.raises(ValueError, match=r"needs \(3, 4\)"):
        load_head_scores(path, llama.config)
    save_file({"head_scores": torch.rand(3, 4)}, path, {"model_type": "qwen3"})
    with pytest.raises(ValueError, match="for qwen3; this llama"):
        load_head_scores(path, llama.config)


def test_heads_that_separate():
    scores = torch.full((4, 8), 0.02)
    scores[1, 3], scores[2, 5], scores[3, 0] = 0.9, 0.7, 0.8
    verdict = judge_heads(scores)
    assert verdict.separates
    assert verdict.num_retrieving == 3
    assert verdict.threshold == pytest.approx((0.02 + 0.7) / 2)
    assert verdict.explained > 0.95
    assert verdict.message == "3 of 32 KV heads put 80% of their attention on the answer on average, the others 2%"


@pytest.mark.parametrize(
    "scores",
    [
        torch.linspace(0, 1, 32).view(4, 8),  # no gap anywhere: two halves of a ramp explain three quarters
        torch.tensor([[0.001, 0.001, 0.001, 0.15]]),  # a gap, but even the best look elsewhere
        torch.rand(4, 8, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["ramp", "weak", "random"],
)
def test_heads_that_do_not_separate(scores):
    verdict = judge_heads(scores)
    assert not verdict.separates
    assert 0 < verdict.num_retrieving < scores.numel()
    assert "does not separate them" in verdict.message
    assert f"put {float(scores.min()):.1%} to {float(scores.max()):.1%} of their attention" in verdict.message


@pytest.mark.parametrize("scores", [torch.full((3, 4), 0.7), torch.zeros(3, 4), torch.rand(1, 1)], ids=["alike", "zero", "one"])
def test_heads_that_are_all_alike(scores):
    verdict = judge_heads(scores)
    assert (verdict.separates, verdict.num_retrieving, verdict.explained) == (False, 0, 0.0)
    assert verdict.message == "all heads score alike: none stands out"
    assert not bool((scores > verdict.threshold).any())


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_there_is(seed):
    """Against every other cut, by brute force."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, 4, generator=generator, dtype=torch.float64) ** 3
    ranked = scores.flatten().sort().values

    def within(cut):
        return sum(float((part - part.mean()).square().sum()) for part in (ranked[:cut], ranked[cut:]))

    best = min(range(1, 12), key=within)
    verdict = judge_heads(scores)
    assert verdict.num_retrieving == 12 - best == int((scores > verdict.threshold).sum())
    total = float((ranked - ranked.mean()).square().sum())
    assert verdict.explained == pytest.approx(1 - within(best) / total)
