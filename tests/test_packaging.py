"""The folder ``kernels/`` must never be taken for the PyPI package of that name."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.utils.import_utils import is_kernels_available

ROOT = Path(__file__).parent.parent


def test_the_installed_package_is_found_before_the_folder() -> None:
    if importlib.util.find_spec("kernels.layer") is None:
        pytest.skip("the PyPI package kernels is not installed here")
    spec = PathFinder.find_spec("kernels", [str(ROOT), *sys.path])
    assert spec is not None and spec.origin is not None
    assert not Path(spec.origin).is_relative_to(ROOT / "kernels")


def test_transformers_does_not_take_the_folder_for_the_package(monkeypatch) -> None:
    """From the repository's root, where the package has never been installed."""

    class OnlyHere:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> object:
            return PathFinder.find_spec(name, [str(ROOT)]) if name == "kernels" else None

    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "kernels":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    # A copy of the module of transformers that imports `kernels` where it finds it.
    hub_kernels = importlib.util.find_spec("transformers.integrations.hub_kernels")
    assert hub_kernels is not None and hub_kernels.loader is not None
    copy = importlib.util.module_from_spec(hub_kernels)
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [OnlyHere, *sys.meta_path])
    monkeypatch.setattr(importlib.metadata, "version", without)
    is_kernels_available.cache_clear()
    try:
        folder = importlib.util.find_spec("kernels")
        assert folder is not None and folder.origin is None
        assert not is_kernels_available()
        hub_kernels.loader.exec_module(copy)
        layer = copy.use_kernel_forward_from_hub("RMSNorm")(nn.Identity)
        assert layer()(torch.ones(2)).eq(1).all()
    finally:
        is_kernels_available.cache_clear()
        sys.modules.pop("kernels", None)  # the folder, which was imported to look for a version


@pytest.mark.parametrize("folder", ["kernels", "convert"])
def test_the_folder_is_no_package(folder) -> None:
    """An ``__init__.py`` would make it importable, and transformers probes for ``kernels``."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize(
    "module",
    [
        "qmoe.generation",
        "qmoe.loading.load",
        "qmoe.paging.model",
        "qmoe.progress",
        "qmoe.loading.patch",
        "qmoe.loading.config",
    ],
)
def test_examples_in_docstrings_run(module, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    results = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0 and results.failed == 0
