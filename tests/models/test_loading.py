import pytest
from transformers import BloomConfig

from pikv.models.demo.tokenizer import build_tokenizer
from pikv.models.loading import load_model
from tiny import build


def test_a_local_folder(tmp_path):
    build("llama").save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path), dtype="bfloat16")
    assert str(model.dtype) == "torch.bfloat16"
    assert not model.training
    assert len(tokenizer) == 512


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("./nowhere", {}, "cannot load|no config.json"),
        ("nowhere/", {}, "no config.json"),
        (
            "no-such-organisation/no-such-model",
            {},
            "cannot load model 'no-such-organisation/no-such-model', which is no folder here: ",
        ),
        ("demo", {"dtype": "int3"}, "unknown dtype 'int3'"),
        ("demo", {"device": "abacus"}, "cannot use device 'abacus'"),
        ("demo", {"device": "cuda:99"}, "cannot use device 'cuda:99'"),
    ],
)
def test_what_cannot_be_loaded(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_model(name, **options)


def test_folders_without_a_readable_model(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load model"):
        load_model(str(tmp_path))


def test_a_folder_without_a_tokenizer_says_how_to_save_one(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the folder has no tokenizer; save it there: tokenizer\.save_pretrained\("):
        load_model(str(tmp_path))


def test_an_unsupported_architecture_is_refused_before_its_weights_are_read(tmp_path):
    BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bloom: its attention does not go through"):
        load_model(str(tmp_path))  # there are no weights at all
