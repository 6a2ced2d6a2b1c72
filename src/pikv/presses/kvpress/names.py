"""kvpress's classes by name, and what stands for each of them here (https://github.com/NVIDIA/kvpress, 0.5.5)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_RATIO = "0.5 here, 0.0 there: a press that is asked for removes something"
_WINDOW = "32 here, 64 there: in contexts of a few hundred tokens, 64 would be much of what stays; pass `window_size=64`"
_FROM = "`from_kvpress(kvpress.{name}(...))` brings kvpress's own"
_REREADS = "it has the model read the context again under hooks of its own"


@dataclass(frozen=True, kw_only=True)
class Counterpart:
    """What stands for a class of kvpress.

    Attributes:
        ours: the name of our class; None where there is none
        defaults: for arguments whose default is another one, why
        missing: for arguments that ours does not take, what to do
        instead: what to use where we have no class
        refused: why ``from_kvpress`` does not take kvpress's own; empty where it does
        note: how else it differs
    """

    ours: str | None = None
    defaults: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    instead: str = ""
    refused: str = ""
    note: str = ""


def _scorer(
    ours: str, note: str = "", missing: Mapping[str, str] | None = None, refused: str = "", **defaults: str
) -> Counterpart:
    defaults = {"compression_ratio": _RATIO, **defaults}
    return Counterpart(ours=ours, defaults=defaults, missing=missing or {}, note=note, refused=refused)


def _brought(more: str = "") -> Counterpart:
    return Counterpart(instead=_FROM + more)


def _none(why: str) -> Counterpart:
    return Counterpart(instead=why, refused=why)


COUNTERPARTS: Mapping[str, Counterpart] = {
    "BasePress": Counterpart(ours="BasePress", note="`compress` in kvpress's way works, `forward_hook` does not"),
    "ScorerPress": _scorer("ScorerPress", note="`score` in kvpress's way works"),
    "RandomPress": _scorer("RandomPress", seed="0 here, None there: the same tokens every time"),
    "KnormPress": _scorer("KnormPress"),
    "SnapKVPress": _scorer("SnapKVPress", window_size=_WINDOW),
    "ExpectedAttentionPress": _scorer("ExpectedAttentionPress"),
    "StreamingLLMPress": _scorer("StreamingLLMPress", note="`n_sink` is `sink_size`; both work"),
    "TOVAPress": _scorer("TOVAPress"),
    "ObservedAttentionPress": _scorer(
        "ObservedAttentionPress", note="works with any attention; `H2OPress` is the paper's method"
    ),
    "QFilterPress": _scorer("QFiltersPress", note="measures the filters on the model, where kvpress downloads them"),
    "PyramidKVPress": _scorer("PyramidKVPress", window_size=_WINDOW),
    "LagKVPress": _scorer("LagKVPress"),
    "KeyDiffPress": _scorer("KeyDiffPress"),
    "NonCausalAttnPress": _scorer(
        "NonCausalAttentionPress", note="with the model's scaling of attention, which kvpress leaves out"
    ),
    "LeverageScorePress": _scorer("LeverageScorePress", note="the same random matrix every time"),
    "KVzipPress": _scorer(
        "KVzipPress",
        note="`n_sink` is `sink_size`; both work",
        missing={"kvzip_plus_normalization": "leave it out; KVzip+ is not here"},
        refused=_REREADS,
    ),
    "DuoAttentionPress": Counterpart(
        ours="DuoAttentionPress",
        defaults={"head_compression_ratio": "None here, 0.0 there: half of the tokens go unless one of the amounts is given"},
        missing={"on_the_fly_scoring": "leave it out; heads are always measured on the model, or given as `head_scores`"},
        note="takes `compression_ratio` and `budget` as well, and sizes of its own choice",
        refused="it needs no scores",
    ),
    "AdaKVPress": Counterpart(ours="AdaKVPress", note="memory is freed, head by head"),
    "CriticalKVPress": Counterpart(ours="CriticalKVPress"),
    "ChunkKVPress": Counterpart(ours="ChunkKVPress", note="meets the ratio exactly: of the last chunk the best tokens stay"),
    "ChunkPress": Counterpart(ours="ChunkPress"),
    "ComposedPress": Counterpart(ours="ComposedPress", note="of any presses; its ratio is known before it is used"),
    "KeyRerotationPress": Counterpart(
        ours="KeyRerotationPress", note="the kept tokens stand right before what comes next, not at the beginning"
    ),
    "PerLayerCompressionPress": Counterpart(ours="PerLayerPress", note="with any attention"),
    "DecodingPress": Counterpart(
        ours="DecodingPress",
        note="`base_press` is `press`, `hidden_states_buffer_size` is `buffer_size`; both work. Sizes by name: their order "
        "differs",
    ),
    "PrefillDecodingPress": Counterpart(ours="PrefillDecodingPress", note="needs its `decoding_press`"),
    "ThinKPress": Counterpart(
        ours="ThinKPress",
        defaults={"key_channel_compression_ratio": "0.5 here, 0.0 there"},
        note="memory is freed; sinks and the newest `window_size` tokens stay whole",
        refused="it removes channels of keys, not tokens",
    ),
    "BlockPress": _brought(),
    "CapPress": _brought(),
    "CompactorPress": _brought("; `LeverageScorePress` and `NonCausalAttentionPress` are its halves"),
    "CriticalAdaKVPress": _brought("; `AdaKVPress(CriticalKVPress(press))` is close to it"),
    "CURPress": _brought(),
    "ExpectedAttentionStatsPress": _brought("; `ExpectedAttentionPress` needs no statistics"),
    "KVzapPress": _brought(),
    "SimLayerKVPress": _brought(),
    "CAMPress": _none("it merges keys and values, which is not supported; use `DecodingPress(press)`"),
    "CompressionRatioDecodingPress": _none("its target grows while decoding; use `DecodingPress(press, target_size=...)`"),
    "DMSPress": _none("it evicts by a threshold, not by a number of tokens; use the press inside of it with a ratio"),
    "EntropyGatedChunkKVPress": _none("its chunks change in length with the scores; use `ChunkKVPress`"),
    "FastKVzipPress": _none("it waits for all layers under hooks of its own; use `KVzipPress`"),
    "FinchPress": _none("it looks for a delimiter in the text; use `KeyRerotationPress(ChunkPress(SnapKVPress(...)))`"),
    "KVComposePress": _none(_REREADS + "; use `KVzipPress`"),
    "KVgradPress": _none(_REREADS + "; use `KVzipPress`"),
    "LUKVPress": _none("it needs curves made for each model; use `AdaKVPress(ExpectedAttentionPress(...))`"),
    "MergingPress": _none("it changes the values of the tokens that stay, which is not supported; use the press inside of it"),
    "RestoreKVPress": _none("it adds tokens to the cache, which is not supported; use `KVzipPress`"),
    "KVPressTextGenerationPipeline": _none('use `pipeline("pikv-text-generation", ...)`'),
}


def why_refused(name: str) -> str | None:
    """Why ``from_kvpress`` does not take a class of kvpress, and what to use; None where it does, and for any other name."""
    found = COUNTERPARTS.get(name)
    if found is None or not found.refused:
        return None
    use = f"; use pikv.presses.{found.ours}" if found.ours else ""
    return found.refused.replace("`", "") + use


def our_name(name: str) -> str | None:
    """The name of our class for a class of kvpress that has another one here; None for any other name.

    Raises:
        ImportError: for a class of kvpress that has no counterpart, saying what to use.
    """
    found = COUNTERPARTS.get(name)
    if found is None:
        return None
    if found.ours is None:
        raise ImportError(f"kvpress's {name} has no counterpart in PiKV: {found.instead.format(name=name).replace('`', '')}")
    return found.ours if found.ours != name else None


def table() -> str:
    """The classes of kvpress beside ours, as a table in Markdown."""
    lines = ["| kvpress | PiKV | what differs |", "|---|---|---|"]
    for name, found in COUNTERPARTS.items():
        said = [f"`{argument}` {why}" for argument, why in found.defaults.items() if why != _RATIO]
        said += [f"no `{argument}`: {what}" for argument, what in found.missing.items()]
        said += [text for text in (found.note, found.instead.format(name=name)) if text]
        lines.append(f"| `{name}` | {f'`{found.ours}`' if found.ours else 'none'} | {'; '.join(said)} |")
    return "\n".join(lines)
