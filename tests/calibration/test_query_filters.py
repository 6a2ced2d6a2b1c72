import pytest
import torch
from safetensors.torch import save_file

from pikv.calibration.query_filters import find_query_filters, load_query_filters
from pikv.hf.hooks import observe
from pikv.presses import QFiltersPress
from tiny import batch_of, build


def queries_of(model, ids):
    """Queries after RoPE by layer, of each KV head's group together, ``[G, n, D]``."""
    found = {}

    def after_attention(call):
        found[call.layer_idx] = call.queries[0].unflatten(0, (call.rows.num_kv_heads, -1)).flatten(1, 2).double()

    with torch.no_grad(), observe(model, after_attention=after_attention):
        model(ids)
    return found


def test_filters_are_principal_directions_of_the_queries_turned_towards_them(model, monkeypatch):
    ids, _ = batch_of([60])
    monkeypatch.setattr("pikv.calibration.query_filters._sample", lambda *args: ids[0].tolist())
    filters = find_query_filters(model)
    for layer, queries in queries_of(model, ids).items():
        for found, group in zip(filters[layer], queries, strict=True):
            direction = torch.linalg.svd(group, full_matrices=False).Vh[0]
            direction = direction * (group @ direction).mean().sign()
            torch.testing.assert_close(found, direction.float(), atol=1e-3, rtol=0)


def test_filters_are_remembered_by_model_object(model):
    filters = find_query_filters(model)
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    assert filters.shape == (3, heads, 16)
    torch.testing.assert_close(filters.norm(dim=-1), torch.ones(3, heads))
    assert find_query_filters(model) is filters
    assert torch.equal(find_query_filters(build(model.config.model_type)), filters)
    assert not torch.equal(find_query_filters(model, seed=1), filters)


def test_keys_along_a_filter_draw_more_attention(demo):
    model, tokenizer = demo
    filters = find_query_filters(model, tokenizer)
    found = {}

    def after_attention(call):
        queries = call.queries[0].unflatten(0, (call.rows.num_kv_heads, -1)).flatten(1, 2).mean(1)
        keys, _ = call.rows.blocks[0].dense()
        found[call.layer_idx] = torch.stack(
            [
                torch.corrcoef(torch.stack([keys[g] @ queries[g], keys[g] @ filters[call.layer_idx, g]]))[0, 1]
                for g in range(len(keys))
            ]
        )

    with torch.no_grad(), observe(model, after_attention=after_attention):
        model(batch_of([200], vocabulary=len(tokenizer))[0])
    assert torch.stack(list(found.values())).median() > 0.5


def test_files(llama, tmp_path):
    filters, path = find_query_filters(llama), tmp_path / "filters.safetensors"
    save_file({"query_filters": filters}, path, {"model_type": "llama"})
    assert torch.equal(load_query_filters(path, llama.config), filters)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    for given in (filters, path, str(path)):
        with QFiltersPress(0.5, filters=given)(llama):
            llama(batch_of([20])[0])


def test_files_and_filters_that_do_not_fit(llama, tmp_path):
    path = tmp_path / "filters.safetensors"
    with pytest.raises(ValueError, match="cannot read query filters"):
        load_query_filters(path, llama.config)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot read query filters"):
        load_query_filters(path, llama.config)
    save_file({"query_filters": torch.rand(3, 4, 16)}, path, {"model_type": "qwen3"})
    with pytest.raises(ValueError, match="for qwen3; this is llama"):
        load_query_filters(path, llama.config)
    with (
        pytest.raises(ValueError, match=r"shape \(2, 4, 16\); this llama needs \(3, 4, 16\)"),
        QFiltersPress(filters=torch.rand(2, 4, 16))(llama),
    ):
        pass


def test_weights_that_are_nan_are_refused_in_one_line(llama):
    with torch.no_grad():
        llama.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="contain NaN or infinity"), QFiltersPress(0.5)(llama):
        pytest.fail("the block was entered")
