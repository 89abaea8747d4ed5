"""Compiled functions of tests."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile the function for all shapes, in one graph, when it is first called: torch imports its compiler for a
    second, which test processes would also do where these tests are skipped."""

    @functools.cache
    def compiled_function() -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=True)

    return lambda *arguments: compiled_function()(*arguments)
