"""A grammar of presses: Python expressions that build them, by specification where a specification says it all."""

from random import Random

import pikv.presses

# Where an expression is evaluated.
NAMESPACE = {name: getattr(pikv.presses, name) for name in pikv.presses.__all__}

# Options of the presses by name; what a name does not have here it has no options for.
_OPTIONS = {
    "streaming": {"sink_size": (0, 1, 4)},
    "snapkv": {"window_size": (1, 4, 8, 32), "kernel_size": (1, 5)},
    "h2o": {"recent_ratio": (0.0, 0.5, 1.0)},
    "expected": {"n_future_positions": (1, 32), "n_sink": (0, 4), "use_covariance": (False,), "use_vnorm": (False,)},
    "lagkv": {"n_sink": (0, 4), "lag_size": (1, 4, 16), "cross_scoring": (True,)},
    "leverage": {"sketch_dimension": (1, 12)},
    "noncausal": {"chunk_size": (1, 7, 256)},
    "random": {"seed": (3,)},
    "kvzip": {"layerwise": (True,), "chunk_size": (3, 16, 2048), "sink_size": (0, 4)},
    "duo": {"sink_size": (0, 2), "recent_size": (1, 6)},
    "pyramidkv": {"window_size": (1, 4), "kernel_size": (1, 3), "beta": (1, 20)},
    "cake": {"window_size": (4, 8), "kernel_size": (1,), "gamma": (0.0,)},
    "adakv": {"alpha_safeguard": (0.0, 0.5, 1.0)},
    "chunkkv": {"chunk_length": (1, 4, 20)},
    "criticalkv": {"first_stage_ratio": (0.0, 0.5, 1.0)},
    "chunk": {"chunk_length": (1, 5, 16)},
    "headwise": {"sink_size": (0, 2), "recent_size": (0, 4)},
    "cam": {"merge_budget": (1, 5), "seed": (None, 3)},
    "d2o": {"beta": (0.2, 1.0)},
}
# Presses that store tokens in formats, with groups and windows that short texts reach.
_INT_OPTIONS = {
    "group_size": (1, 3, 8),
    "key_axis": ("channel", "token"),
    "symmetric": (True,),
    "key_bits": (8, 4, 2),
    "value_bits": (8, 4, 2),
}
_TURBO_OPTIONS = {"value_bits": (1, 3, 4), "seed": (7,)}
_SVD_OPTIONS = {"group_size": (16, 24, 40), "value_rank": (1, 8)}
_THINK_OPTIONS = {"group_size": (1, 4, 16)}
_FORMATS = {
    **dict.fromkeys(("int8", "int4", "int2"), _INT_OPTIONS),
    **dict.fromkeys(("turbo:2", "turbo:3", "turbo:4"), _TURBO_OPTIONS),
    **dict.fromkeys(("svd:2", "svd:6"), _SVD_OPTIONS),
    "svd": {"energy": (0.5, 0.99), "group_size": (2, 16, 40)},
    **dict.fromkeys(("think:0.25", "think:0.7"), _THINK_OPTIONS),
}
_ROUTED = ("base", "topk_balanced", "adaptive", "pikv", "eplb", "hierarchical")
_ROUTED_OPTIONS = {
    "calibration": (None,),
    "top_k": (1, 2),
    "sink_size": (0, 4),
    "recent_size": (0, 4),
    "head_budgets": (False,),
}
_SCORERS = tuple("streaming knorm snapkv h2o tova expected keydiff lagkv leverage noncausal qfilters random".split())
_OTHERS = ("kvzip", "cake", "duo", "pyramidkv")
_WRAPPERS = ("adakv", "chunkkv", "criticalkv", "keyrotation", "chunk", "headwise", "cam", "d2o")
_RATIOS = (0.0, 0.05, 0.2, 0.3, 0.5, 0.5, 0.7, 0.9, 0.99)


def any_press(rng: Random) -> str:
    """An expression that builds a press."""
    return rng.choices(
        (_plain, _wrapped, _composed, _decoding, _prefill_decoding, _protected, _per_layer, _nested_composition, _storing),
        weights=(30, 22, 14, 10, 6, 8, 5, 5, 40),
    )[0](rng)


def has_amount_in_bytes(press: str) -> bool:
    """Whether what a sequence may keep depends on how many there are beside it."""
    return "max_bytes" in press


def changes_tokens(press: str) -> bool:
    """Whether tokens that are kept may become others: turned to other positions, merged, or stored in a format."""
    return stores(press) or any(word in press for word in ("keyrotation", "KeyRerotationPress", "cam", "d2o"))


def stores(press: str) -> bool:
    """Whether tokens may be stored in a format; those of a group that was evicted may also while they are generated."""
    names = {name.partition(":")[0] for name in _FORMATS}
    return any(f"{before}{name}" in press for name in names for before in '"+')


def _name(rng: Random) -> str:
    return rng.choice(rng.choices((_SCORERS, _OTHERS, _ROUTED), weights=(6, 3, 2))[0])


def _specification(rng: Random, depth: int) -> str:
    """A name, or wrappers around one, without a ratio."""
    if not depth:
        return _name(rng)
    wrapper = rng.choice(_WRAPPERS)
    if rng.random() < 0.15 and depth == 1:
        return wrapper  # around the press that it wraps by default
    return f"{wrapper}({_specification(rng, depth - 1)})"


def _get_press(rng: Random, spec: str) -> str:
    """A call of ``get_press`` with a ratio, or with options, some of which are amounts."""
    if spec == "none":
        return 'get_press("none")'
    if rng.random() < 0.4:
        return f'get_press("{spec}:{rng.choice(_RATIOS):g}")'
    options = {}
    amount = rng.random()
    if amount < 0.35 and "duo" not in spec:
        options["budget"] = rng.choice((1, 2, 5, 12, 20, 64))
    elif amount < 0.42 and "duo" not in spec:
        options["max_bytes"] = rng.choice((20_000, 100_000, 400_000))
    else:
        options["compression_ratio"] = rng.choice(_RATIOS)
    names = spec.replace(")", "").split("(")
    offered = {}
    for name in names:
        offered.update(_ROUTED_OPTIONS if name in _ROUTED else _OPTIONS.get(name, {}))
    for option, values in offered.items():
        if rng.random() < 0.4:
            options[option] = rng.choice(values)
    return f'get_press("{spec}", {", ".join(f"{name}={value!r}" for name, value in options.items())})'


def _plain(rng: Random) -> str:
    return _get_press(rng, "none" if rng.random() < 0.05 else _name(rng))


def _wrapped(rng: Random) -> str:
    return _get_press(rng, _specification(rng, rng.choice((1, 1, 1, 2, 2, 3))))


def _composed(rng: Random) -> str:
    """A composition by specification."""
    depths = [rng.choice((0, 0, 0, 1, 2)) for _ in range(rng.choice((2, 2, 2, 3)))]
    parts = [f"{_specification(rng, depth)}:{rng.choice(_RATIOS[:6]):g}" for depth in depths]
    return f'get_press("{"+".join(parts)}")'


def _one_stage(rng: Random) -> str:
    return rng.choice((_plain, _wrapped))(rng)


def _decoding(rng: Random) -> str:
    inner = rng.choice((_one_stage, _one_stage, _one_stage, _protected))(rng)
    sizes = f"target_size={rng.choice((1, 4, 10, 20, 40))}, compression_interval={rng.choice((1, 2, 3, 5))}"
    return f"DecodingPress({inner}, {sizes}, buffer_size={rng.choice((1, 2, 8))})"


def _prefill_decoding(rng: Random) -> str:
    return f"PrefillDecodingPress({rng.choice((_one_stage, _composed))(rng)}, {_decoding(rng)})"


def _protected(rng: Random) -> str:
    spans = []
    for _ in range(rng.choice((1, 1, 2))):
        start = rng.choice((0, 0, 3, 10, 30, 500))
        spans.append((start, start + rng.choice((1, 4, 12))))
    return f"ProtectedPress({_one_stage(rng)}, {spans})"


def _per_layer(rng: Random) -> str:
    """As many ratios as the model has layers that can be compressed, which the player fills in."""
    ratios = ", ".join(f"{rng.choice(_RATIOS[:7]):g}" for _ in range(3))
    return f"PerLayerPress({_one_stage(rng)}, [{ratios}][-NUM_LAYERS:])"


def _nested_composition(rng: Random) -> str:
    parts = [rng.choice((_plain, _wrapped, _protected, _per_layer, _composed))(rng) for _ in range(rng.choice((1, 2, 3)))]
    return f"ComposedPress([{', '.join(parts)}])"


def _format(rng: Random) -> str:
    name = rng.choice(sorted(_FORMATS))
    options: dict[str, object] = {"num_sinks": rng.choice((0, 1, 4)), "window_size": rng.choice((0, 1, 4, 8))}
    if name.startswith("think"):
        options["window_size"] = rng.choice((1, 4, 8))  # whose queries choose
    else:
        options["check"] = False
    options["skip_layers"] = rng.choice(([], [], [], [1]))
    for option, values in _FORMATS[name].items():
        if rng.random() < 0.6 or (option == "group_size" and name.startswith(("svd", "int"))):
            options[option] = rng.choice(values)
    return f'get_press("{name}", {", ".join(f"{option}={value!r}" for option, value in options.items())})'


def _storing(rng: Random) -> str:
    """A format alone, behind or before what evicts, and where it may be refused."""
    form = _format(rng)
    kind = rng.choices(
        ("alone", "behind", "before", "decoding", "prefill", "twice", "spec", "wrapped"), weights=(30, 35, 8, 15, 6, 5, 4, 3)
    )[0]
    if kind == "alone":
        return form
    if kind == "spec":
        return f'get_press("{_specification(rng, 1)}:0.5+{rng.choice(("int8", "turbo:3", "svd:4", "think:0.5"))}")'
    if kind == "wrapped":
        return rng.choice(("AdaKVPress({})", "DecodingPress({}, target_size=10)", "ProtectedPress({}, [(0, 4)])")).format(form)
    parts = {
        "behind": [rng.choice((_one_stage, _protected, _per_layer, _composed))(rng), form],
        "before": [form, _one_stage(rng)],
        "decoding": [rng.choice((_decoding, _prefill_decoding))(rng), form],
        "twice": [form, _format(rng)],
    }
    if kind == "prefill":
        return f"PrefillDecodingPress({form}, {_decoding(rng)})"
    return f"ComposedPress([{', '.join(parts[kind])}])"
