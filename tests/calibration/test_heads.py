import pytest
import torch

from pikv.calibration.heads import find_retrieval_heads, load_head_scores, save_head_scores
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
    save_head_scores(tmp_path / "heads.safetensors", scores, llama.config)
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
    save_head_scores(path, torch.rand(2, 4), llama.config)
    with pytest.raises(ValueError, match=r"needs \(3, 4\)"):
        load_head_scores(path, llama.config)
    save_head_scores(path, torch.rand(3, 4), build("qwen3").config)
    with pytest.raises(ValueError, match="for qwen3; this llama"):
        load_head_scores(path, llama.config)
