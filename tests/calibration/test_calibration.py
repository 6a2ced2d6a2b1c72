"""Training, what it leaves in a file, and to which model that belongs."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from calibrated import random_calibration
from pikv import PiKVCache
from pikv.calibration.default_calibration import calibrations_of
from pikv.calibration.files import FILE_NAME, FILE_PATTERN, file_name
from pikv.calibration.samples import make_samples
from pikv.calibration.targets import read_sample
from pikv.calibration.training import Trainer, TrainingSettings
from pikv.calibration.validation import validate
from pikv.evaluation.reading import continue_greedily, forward
from pikv.hf.identity import model_signature
from pikv.models.demo import WEIGHTS
from pikv.presses import MoERouterPress
from pikv.routing import Calibration, add_calibration, calibrate, calibration_of, use_calibration
from pikv.routing.experts import default_experts
from pikv.routing.factory import ROUTERS
from pikv.tasks.contexts import retrieval_samples
from tiny import batch_of, build

QUICK = dict(num_tokens=64, num_steps=4)


def tensors_of(calibration):
    found = {"profiles": calibration.profiles, "head_scores": calibration.head_scores, "fingerprint": calibration.fingerprint}
    for kind, states in calibration.mixers.items():
        for rank, state in enumerate(states):
            found |= {f"{kind}.{rank}.{name}": tensor for name, tensor in state.items()}
    return found


def assert_same(one, other):
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def trainer(model, *, num_tokens=64, texts=None, tokenizer=None, num_experts=4, **settings):
    settings = TrainingSettings(**{"kinds": ("eplb", "pikv"), "num_tokens": num_tokens, "num_steps": 6, **settings})
    samples = make_samples(model, texts, tokenizer, num_tokens=num_tokens, seed=settings.seed)
    return Trainer(model, samples, default_experts(num_experts), settings)


def test_it_is_deterministic_and_leaves_the_model_alone(llama):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one = calibrate(llama, **QUICK)
    assert torch.equal(torch.rand(2), expected)  # nor is anybody else's randomness touched
    assert_same(one, calibrate(build("llama"), **QUICK))
    other = calibrate(llama, **QUICK, seed=1)
    assert not torch.equal(one.mixers["base"][0]["router.gate.weight"], other.mixers["base"][0]["router.gate.weight"])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in llama.parameters())
    for name, tensor in llama.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not llama.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


def test_what_a_calibration_says(llama):
    calibration = calibrate(llama, **QUICK, kinds=("eplb", "adaptive", "eplb"), top_k=1, dropout=0.0)
    assert list(calibration.mixers) == ["eplb", "adaptive"]
    assert calibration.profiles.shape == (3, 4, 128)
    assert float(calibration.profiles.max()) == 1
    assert calibration.head_scores.shape == (3, 4)
    assert calibration.experts == tuple(default_experts())
    assert (calibration.settings["top_k"], calibration.settings["dropout"]) == (1, 0.0)
    taken = calibration.report["kept_share"]
    assert list(taken) == ["best", "eplb", "adaptive", "even"]
    for shares in taken.values():
        assert list(shares) == ["50%", "80%", "90%"]
        assert all(0 < share <= 1 for share in shares.values())
        assert shares["50%"] > shares["80%"] > shares["90%"]
    for ratio, best in taken["best"].items():
        assert all(best >= shares[ratio] for shares in taken.values())
    json.dumps(calibration.report)


def test_training_pays_on_samples_that_were_not_trained_on(demo):
    model, tokenizer = demo
    calibration = calibrate(model, tokenizer=tokenizer, num_tokens=256, num_steps=20, kinds=("eplb", "pikv"))
    taken = calibration.report["kept_share"]
    for kind in ("eplb", "pikv"):
        assert taken[kind]["50%"] > 0.95 > taken["even"]["50%"] + 0.3
        assert taken[kind]["80%"] > 0.9 > taken["even"]["80%"] + 0.4


def test_an_interrupted_training_ends_as_one_that_was_not(llama, tmp_path, monkeypatch):
    class Stopped(BaseException):
        pass

    def stop_after(steps):
        def progress(title, total):
            taken = iter(range(steps))

            def advance():
                if next(taken, None) is None:
                    raise Stopped

            return advance

        return progress

    monkeypatch.setattr("pikv.calibration.training._CHECKPOINT_EVERY", 2)
    path = tmp_path / "checkpoint"
    settings = dict(num_tokens=64, num_steps=7)
    uninterrupted = calibrate(llama, **settings)
    for steps in (3, 4):  # the second time 2 of these are done already
        with pytest.raises(Stopped):
            calibrate(llama, **settings, checkpoint=path, progress=stop_after(steps))
        assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]
    assert torch.load(path, weights_only=True)["step"] == 4
    advanced = []
    resumed = calibrate(llama, **settings, checkpoint=path, progress=lambda title, total: lambda: advanced.append(total))
    assert_same(uninterrupted, resumed)
    assert uninterrupted.report == resumed.report
    assert advanced == [7] * 7
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]  # until somebody has saved the result


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(num_steps=7),
        dict(top_k=1),
        dict(kinds=("eplb",)),
        dict(num_experts=3),
        dict(model="other weights"),
        dict(texts="others"),
    ],
    ids=str,
)
def test_checkpoints_of_another_training_are_refused(demo, change):
    model = build("llama", vocab_size=512, num_hidden_layers=1)
    given = dict(texts=[" ".join([f"fox {number + 10}"] * 40) for number in range(5)], tokenizer=demo[1], num_tokens=128)
    state = trainer(model, **given).state()
    trainer(model, **given).load(state)
    change = dict(change)
    if change.pop("model", None):
        with torch.no_grad():
            model.model.embed_tokens.weight[5:] += 0.01
    if change.pop("texts", None):
        given["texts"] = [f"{text} 77" for text in given["texts"]]
    with pytest.raises(ValueError, match=r"the checkpoint is of a calibration with other settings.*remove it to begin anew"):
        trainer(model, **given, **change).load(state)


def test_a_checkpoint_that_is_none(llama, tmp_path):
    for content in (b"", b"garbage", b"PK\x03\x04 cut off"):
        (tmp_path / "checkpoint").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read the checkpoint .*; remove it to begin anew"):
            calibrate(llama, **QUICK, checkpoint=tmp_path / "checkpoint")


def test_the_balance_loss_evens_out_what_experts_are_used_for(demo):
    model, tokenizer = demo

    def largest_share(weight):
        taught = trainer(model, tokenizer=tokenizer, kinds=("base",), num_steps=20, num_tokens=128, aux_loss_weight=weight)
        for _ in range(20):
            taught.take_step()
        readings = [read_sample(model, taught.samples.validation(number)) for number in range(4)]
        loads = []
        for rank, mixer in enumerate(taught.mixers["base"]):
            routings = [mixer.eval().router.route(sample[rank].view.hidden_states) for sample in readings]
            loads.append(sum(routing.load.sum(0) for routing in routings))
        return float((torch.stack(loads).double().amax(1) / torch.stack(loads).double().mean(1)).mean())

    free, weak, strong = (largest_share(weight) for weight in (0.0, 0.3, 30.0))
    assert free > weak > strong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kinds=("eplp",)), "unknown .*'eplp'.*'eplb'"),
        (dict(kinds=()), "name at least one kind of router"),
        (dict(num_steps=0), "at least 1 step, not 0"),
        (dict(aux_loss_weight=-1), "aux_loss_weight must be at least 0, not -1"),
        (dict(num_tokens=10), "contexts of 10 tokens are too short"),
        (dict(top_k=9), "top_k must lie between 1 and num_experts=4, not 9"),
        (dict(dropout=1.0), "dropout must lie in"),
        (dict(capacity_factor=0), "capacity_factor must be above 0"),
        (dict(texts_or_tasks=["a text"]), "texts need a tokenizer"),
    ],
    ids=lambda value: None if isinstance(value, dict) else "",
)
def test_impossible_trainings(llama, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(llama, **{**QUICK, **options})


def test_validation_by_hand(llama):
    """What is kept of what is taken, for one head budget that is even."""
    samples = make_samples(llama, None, None, num_tokens=64, seed=0)
    found = validate(llama, samples, default_experts(), {}, torch.ones(3, 4, 128))
    assert list(found) == ["best", "even"]
    shares = []
    for number in range(4):
        kept = total = 0.0
        for reading in read_sample(llama, samples.validation(number)):
            count = max(1, round(reading.future_attention.shape[1] * 0.2))
            kept += float(reading.future_attention.sort(dim=1, descending=True).values[:, :count].sum())
            total += float(reading.future_attention.sum())
        shares.append(kept / total)
    assert found["best"]["80%"] == pytest.approx(sum(shares) / 4, rel=1e-5)


# Files.


def test_a_file_holds_it_all_bit_by_bit(llama, tmp_path):
    calibration = random_calibration(llama)
    calibration.save(tmp_path / "one.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]
    loaded = Calibration.load(tmp_path / "one.safetensors", llama)
    assert_same(calibration, loaded)
    for name in ("facts", "experts", "options", "settings", "report"):
        assert getattr(calibration, name) == getattr(loaded, name)
    loaded.save(tmp_path / "two.safetensors")
    assert_same(loaded, Calibration.load(tmp_path / "two.safetensors"))
    assert kept(llama, MoERouterPress(calibration=calibration)) == kept(
        llama, MoERouterPress(calibration=tmp_path / "two.safetensors")
    )


def test_a_file_is_whole_or_not_there(llama, tmp_path, monkeypatch):
    def broken(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("pikv.hf.files.save_file", broken)
    with pytest.raises(ValueError, match=r"cannot write .*one.safetensors: disk full"):
        random_calibration(llama).save(tmp_path / "one.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_first_format_can_be_read(llama, tmp_path):
    calibration = dataclasses.replace(
        random_calibration(llama), settings={"samples": "synthetic"}, report={"kept_share": {"best": {"50%": 0.9}}}
    )
    path = tmp_path / "old.safetensors"
    calibration.save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    old = {}
    for name, tensor in tensors.items():
        if name.startswith("mixer."):
            name = "panel." + name.removeprefix("mixer.")
            if name.count(".") == 3:
                name = name.replace(".weight", ".trust").replace(".bias", ".level")
        old[name] = tensor
    assert {name.rsplit(".", 1)[1] for name in old if name.count(".") == 3} == {"trust", "level"}
    report = {"taken_from_kept": calibration.report["kept_share"]}
    changed = {"format": "pikv-calibration-1", "settings": json.dumps({"lessons": "synthetic"}), "report": json.dumps(report)}
    save_file(old, path, {**metadata, **changed})
    loaded = Calibration.load(path, llama)
    assert_same(loaded, calibration)
    assert (loaded.settings, loaded.report) == (calibration.settings, calibration.report)
    press = MoERouterPress(router_type="hierarchical", calibration=path)
    assert kept(llama, press) == kept(llama, MoERouterPress(router_type="hierarchical", calibration=calibration))
    assert press.get_stats()["calibrated"] is True


def test_a_trained_one_is_the_same_from_a_file(llama, tmp_path):
    calibration = calibrate(llama, **QUICK)
    calibration.save(tmp_path / FILE_NAME)
    loaded = Calibration.load(tmp_path / FILE_NAME, llama)
    assert_same(calibration, loaded)
    assert loaded.report == calibration.report
    assert loaded.settings == json.loads(json.dumps(calibration.settings))
    for kind in ROUTERS:
        mixers = loaded.build(llama, kind, 2)
        assert list(mixers) == [0, 1, 2]
        assert all(mixer.router.calibrated and not mixer.training for mixer in mixers.values())


def kept(model, press):
    cache = PiKVCache(model.config)
    with press(model), torch.no_grad():
        model(batch_of([40])[0], past_key_values=cache)
    return [row.tolist() for layer in range(3) for row in cache.positions(layer)[0]]


def other_model(which):
    if which == "architecture":
        return build("qwen3")
    if which == "shape":
        return build("llama", intermediate_size=128)
    model = build("llama")
    torch.nn.init.normal_(model.model.embed_tokens.weight, generator=torch.Generator().manual_seed(9))
    return model


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("architecture", "made for llama, this model is qwen3"),
        ("shape", "made for llama with intermediate_size=96, this model has 128"),
        ("weights", "made for a model of the same kind, but with other weights"),
    ],
)
def test_a_calibration_of_another_model_is_refused(llama, tmp_path, which, message):
    model, path = other_model(which), tmp_path / "calibration.safetensors"
    calibration = random_calibration(llama)
    calibration.save(path)
    attempts = [
        lambda: Calibration.load(path, model),
        lambda: calibration.check(model),
        lambda: use_calibration(model, path),
        lambda: use_calibration(model, calibration),
        lambda: MoERouterPress(calibration=path).bind(model),
        lambda: MoERouterPress(calibration=calibration).bind(model),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=message) as refused:
            attempt()
        assert "\n" not in str(refused.value)
    Calibration.load(path)  # of no model in particular


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_model_in_another_precision_is_the_same(llama, tmp_path, dtype):
    path = tmp_path / "calibration.safetensors"
    random_calibration(llama).save(path)
    coarse = build("llama", dtype)
    Calibration.load(path, coarse)
    press = MoERouterPress(0.5, calibration=path)
    kept(coarse, press)
    assert press.get_stats()["calibrated"] is True


def rewritten(path, metadata=None, leave_out=(), **tensors):
    """The file with some things changed."""
    with safe_open(path, framework="pt") as file:
        entries = {**file.metadata(), **(metadata or {})}
        found = {name: file.get_tensor(name) for name in file.keys() if name not in leave_out}  # noqa: SIM118
    save_file({**found, **tensors}, path, {name: value for name, value in entries.items() if name not in leave_out})


@pytest.mark.parametrize("damage", ["missing", "folder", "garbage", "empty", "truncated", "no calibration", "other format"])
def test_files_that_cannot_be_read(llama, tmp_path, damage):
    path = tmp_path / "calibration.safetensors"
    calibration = random_calibration(llama)
    if damage == "folder":
        path.mkdir()
    elif damage == "no calibration":
        save_file({"head_scores": torch.rand(3, 4)}, path, {"model_type": "llama"})
    elif damage != "missing":
        calibration.save(path)
    if damage in ("garbage", "empty"):
        path.write_bytes(b"nonsense" * (damage == "garbage"))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "other format":
        rewritten(path, metadata={"format": "pikv-calibration-99"})
    message = {"no calibration": "its format is None", "other format": "its format is pikv-calibration-99"}
    with pytest.raises(ValueError, match=message.get(damage, "cannot read a calibration from")) as refused:
        Calibration.load(path, llama)
    assert "\n" not in str(refused.value)


NOT_WHOLE = r"calibration.safetensors is damaged: \S"
NOT_ROUTERS = r"routers of the kind eplb are damaged: \S"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(leave_out=("facts",)), NOT_WHOLE),
        (dict(leave_out=("profiles",)), NOT_WHOLE),
        (dict(leave_out=("head_scores",)), NOT_WHOLE),
        (dict(metadata={"experts": "{"}), NOT_WHOLE),
        (dict(metadata={"facts": "null"}), NOT_WHOLE),
        (dict(metadata={"zeros": "3"}), NOT_WHOLE),
        (dict(metadata={"zeros": '{"mixer.eplb.1.weight": [1000000, 1000000]}'}), NOT_WHOLE),
        ({"mixer.eplb.7.weight": torch.ones(4, 4)}, NOT_WHOLE),
        ({"mixer.eplb.one.weight": torch.ones(4, 4)}, NOT_WHOLE),
        ({"mixer.eplb": torch.ones(4, 4)}, NOT_WHOLE),
        ({"mixer.eplb.1.weight": torch.ones(4, 3)}, NOT_ROUTERS),
        ({"mixer.eplb.1.further": torch.ones(4, 3)}, NOT_ROUTERS),
        (dict(leave_out=("mixer.eplb.1.weight",)), NOT_ROUTERS),
        (dict(profiles=torch.ones(2, 4, 128)), NOT_WHOLE),
        (dict(profiles=torch.ones(12, 128)), NOT_WHOLE),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_damaged_files(llama, tmp_path, changes, message):
    path = tmp_path / "calibration.safetensors"
    random_calibration(llama).save(path)
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=message) as refused:
        MoERouterPress(router_type="eplb", calibration=path).bind(llama)
    assert "\n" not in str(refused.value)


# Which one belongs to a model.


def test_a_default_can_be_set_and_taken_away(llama):
    assert calibration_of(llama) is None
    calibration = random_calibration(llama)
    use_calibration(llama, calibration)
    assert calibration_of(llama) is calibration
    press = MoERouterPress(0.5)
    kept(llama, press)
    assert press.get_stats()["calibrated"] is True
    use_calibration(llama, None)
    assert calibration_of(llama) is None
    assert calibration_of(build("llama")) is None


def test_a_default_from_a_file(llama, tmp_path):
    calibration = random_calibration(llama)
    calibration.save(tmp_path / "mine.safetensors")
    use_calibration(llama, tmp_path / "mine.safetensors")
    assert_same(calibration_of(llama), calibration)


def test_the_demo_model_has_one_of_all_kinds(demo):
    model, _ = demo
    calibration = calibration_of(model)
    assert calibration is not None
    assert set(calibration.mixers) == set(ROUTERS)
    assert calibration.experts == tuple(default_experts())
    assert model_signature(model.config) == calibration.facts
    ids = batch_of([100], vocabulary=400)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ROUTERS:
            press = MoERouterPress(0.7, router_type=kind)
            with press(model), torch.no_grad():
                model(ids)
            assert press.get_stats()["calibrated"] is True
            assert press.get_stats()["compression_ratio"] == pytest.approx(0.7)


def test_what_is_said_is_of_the_calibration_for_the_wanted_experts(demo):
    found, reason = MoERouterPress(router_type="adaptive", num_experts=2).find_calibration(demo[0])
    assert found is None
    assert reason.startswith("it has routers of the kinds base, ")


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob(FILE_PATTERN)), ids=lambda path: path.stem)
def test_the_demo_model_answers_with_every_bundled_calibration(demo, path):
    """At a tenth of the cache each press by name answers what the full cache answers."""
    model, tokenizer = demo
    calibration = Calibration.load(path, model)
    num_experts, presses = len(calibration.experts), {kind for kind in ROUTERS if ROUTERS[kind].is_press}
    assert path.name == file_name(num_experts)
    assert presses - set(calibration.mixers) == ({"adaptive"} if num_experts == 2 else set())
    (sample,) = retrieval_samples(tokenizer, num_tokens=512, num_samples=1, num_records=8, num_questions=3, seed=77)
    for kind in sorted(presses & set(calibration.mixers)):
        press, cache = MoERouterPress(0.9, router_type=kind, num_experts=num_experts), PiKVCache(model.config)
        with warnings.catch_warnings(), torch.no_grad(), press(model):
            warnings.simplefilter("error")
            model(torch.tensor([sample.context_ids]), past_key_values=cache, logits_to_keep=1)
        assert press.get_stats()["calibrated"] is True
        for question in sample.questions:
            mark = cache.mark()
            logits = forward(model, question.prompt_ids, cache)[:, -1]
            answer = continue_greedily(model, cache, logits, question.num_answer_tokens)
            assert tokenizer.decode(answer).split() == question.answer.split(), kind
            cache.rewind(mark)


def test_the_bundled_calibrations_are_small():
    files = WEIGHTS.glob(FILE_PATTERN)
    assert sum(file.stat().st_size for file in files) < 500_000


def test_several_lie_beside_a_model_and_each_press_takes_the_one_that_serves(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    for num_experts in (2, 4, 8):
        random_calibration(llama, experts=default_experts(num_experts)).save(tmp_path / file_name(num_experts))
    (tmp_path / "pikv_calibration_broken.safetensors").write_bytes(b"nonsense")
    model = type(llama).from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="a calibration is left out: .*pikv_calibration_broken"):
        assert [len(each.experts) for each in calibrations_of(model)] == [4, 2, 8]
    assert len(calibration_of(model).experts) == 4
    assert len(calibration_of(model, "eplb", list(default_experts(8))).experts) == 8
    for num_experts, is_there in ((2, True), (3, False), (4, True), (8, True)):
        press = MoERouterPress(0.5, router_type="eplb", num_experts=num_experts, calibration="auto")
        assert (press.find_calibration(model)[0] is not None) == is_there
    without = MoERouterPress(router_type="eplb", num_experts=3).find_calibration(model)
    assert without == (None, "it was made for the experts aggressive, moderate, conservative, selective")
    own = random_calibration(llama, kinds=("base", "eplb"), experts=default_experts(3))
    add_calibration(model, own)
    assert MoERouterPress(router_type="eplb", num_experts=3).find_calibration(model) == (own, "")
    assert MoERouterPress(router_type="eplb", num_experts=8).find_calibration(model)[1] == ""
    use_calibration(model, own)
    assert (
        MoERouterPress(router_type="eplb", num_experts=8)
        .find_calibration(model)[1]
        .startswith("it was made for the experts aggressive, mod")
    )


def test_parameters_that_are_zero_take_no_room(llama, tmp_path):
    calibration = random_calibration(llama, kinds=("flex",))
    calibration.save(tmp_path / "full.safetensors")
    for layer in calibration.mixers["flex"]:
        for name, parameter in layer.items():
            if "modality_gates" in name:
                parameter.zero_()
    calibration.save(tmp_path / "zeros.safetensors")
    assert_same(Calibration.load(tmp_path / "zeros.safetensors", llama), calibration)
    sizes = [(tmp_path / name).stat().st_size for name in ("full.safetensors", "zeros.safetensors")]
    assert sizes[1] < 0.6 * sizes[0]
    with safe_open(tmp_path / "full.safetensors", framework="pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "zeros"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "old.safetensors", {**metadata, "format": "pikv-calibration-2"})
    assert_same(Calibration.load(tmp_path / "old.safetensors", llama), random_calibration(llama, kinds=("flex",)))


def test_it_is_found_beside_a_saved_model(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    calibration = random_calibration(llama)
    calibration.save(tmp_path / FILE_NAME)
    assert_same(calibration_of(type(llama).from_pretrained(tmp_path)), calibration)
    coarse = type(llama).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same(calibration_of(coarse), calibration)


def test_a_model_that_was_changed_goes_without_and_says_so(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    random_calibration(llama).save(tmp_path / FILE_NAME)
    changed = type(llama).from_pretrained(tmp_path)
    with torch.no_grad():
        changed.model.embed_tokens.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="a calibration is left out: .*same kind, but with other weights"):
        assert calibration_of(changed) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibration_of(changed) is None  # which was said


def test_why_a_calibration_does_not_serve(llama):
    calibration = random_calibration(llama, kinds=("base", "pikv"))
    assert calibration.lacks("pikv", list(default_experts())) is None
    assert calibration.lacks("eplb", list(default_experts())) == "it has routers of the kinds base, pikv"
    assert calibration.lacks("pikv", ["aggressive"]).startswith("it was made for the experts aggressive, moderate")


def test_options_of_a_kind_of_router_come_with_it(llama):
    calibration = random_calibration(llama)
    press = MoERouterPress(router_type="pikv", calibration=calibration, cache_aware=False)
    press.bind(llama)
    assert press.routers[0].cache_weight == 2.0
    assert press.routers[0].cache_aware is False
    damaged = dataclasses.replace(calibration, options={})
    press = MoERouterPress(router_type="pikv", calibration=damaged)
    press.bind(llama)
    assert press.routers[0].cache_weight == 1.0
