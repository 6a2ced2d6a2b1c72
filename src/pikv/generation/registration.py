"""The names of PiKV's pipeline, made known to transformers; the pipelines of transformers are not imported for it."""

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TASK = "pikv-text-generation"
KVPRESS_TASK = "kv-press-text-generation"
_PIPELINES = "transformers.pipelines"


def register_when_imported() -> None:
    """Registers the pipeline with transformers: now if its pipelines are imported already, else as soon as they are."""
    if _PIPELINES in sys.modules:
        _register()
    elif not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """A finder of ``sys.meta_path`` that waits until one module is run, and finds none itself."""

    def __init__(self) -> None:
        self._asks_others = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _PIPELINES or self._asks_others:
            return None
        self._asks_others = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asks_others = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:  # not before: who looks for a module need not run it
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.pipelines import PIPELINE_REGISTRY

        from pikv.generation.pipeline import PiKVTextGenerationPipeline
    except ImportError as error:  # whatever is wrong, the pipelines of transformers are to work
        warnings.warn(f"the pipeline {TASK} is not available: {error}", stacklevel=2)
        return
    registry: Any = PIPELINE_REGISTRY
    known = registry.get_supported_tasks()
    for task in (KVPRESS_TASK, TASK):
        if task not in known:  # where kvpress is imported, before or after, its name is its own
            registry.register_pipeline(task, pipeline_class=PiKVTextGenerationPipeline, pt_model=AutoModelForCausalLM)
