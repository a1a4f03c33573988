"""A cache of keys and values whose tensors never move, so that a CUDA graph can write to it.

Rows of a batch are padded on the left, so that all of them have their newest token in the same
column. While a prompt is read, layers hand out what is filled and transformers does the rest;
while new tokens are decoded, the column to write to is a value on the device, and layers hand out
all of their columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from qmoe_kernels.attention import store_kv


class Columns:
    """Which columns of a cache are filled, and which of each row count.

    Attributes:
        rows, length: how many texts, and tokens of each, padding and new tokens included.
        decoding: whether new tokens are decoded, and not a prompt is read.
        filled: columns that the prompt has filled; only kept while it is read.
        column: (1,) int64, the column of the next token: so many are filled.
        end: (1,) int32, the column after it.
        start: (rows,) int32, the first column of each row that is no padding.
        windows: for each layer, how many columns its masks let a token look back; None for all.
    """

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.rows, self.length = rows, length
        self.windows: list[int | None] = []
        self.decoding = False
        self.filled = 0
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.end = torch.ones(1, dtype=torch.int32, device=device)
        self.start = torch.zeros(rows, dtype=torch.int32, device=device)

    def extend(self, columns: int) -> None:
        """Count columns of a prompt that have been read."""
        self.filled += columns

    def begin_decoding(self, columns: int) -> None:
        """Prompts of so many columns are read; new tokens follow, a column each."""
        self.column.fill_(columns)
        self.end.fill_(columns + 1)
        self.decoding = True

    def advance(self) -> None:
        """Count a column of new tokens, on the device."""
        self.column.add_(1)
        self.end.add_(1)


class DecodeCache(Cache):
    """The cache of a whole model for a number of rows of a number of columns.

    Attributes:
        columns: where its layers read and write. Layers hold these and not the cache, so that its
            memory goes with the last reference to it.
    """

    def __init__(self, config: Any, rows: int, length: int, device: torch.device) -> None:
        """Allocate nothing yet: layers do when their first keys and values come.

        Raises:
            ValueError: a layer keeps something that this cache does not know.
        """
        self.columns = Columns(rows, length, device)
        layers: list[Any] = []
        for layer in StaticCache(config, max_cache_len=length).layers:
            # A window only hides columns: masks and attention see to that.
            self.columns.windows.append(None)
            if type(layer) in (StaticLayer, StaticSlidingWindowLayer):
                layers.append(KeysAndValues(self.columns))
                if type(layer) is StaticSlidingWindowLayer:
                    self.columns.windows[-1] = layer.max_cache_len  # at most `length`
            elif type(layer) is LinearAttentionLayer:
                layers.append(layer)  # a state of fixed size, updated in place
            else:
                raise ValueError(f"its cache has layers of the kind {type(layer).__name__}")
        super().__init__(layers=layers)

    @property
    def has_columns_only(self) -> bool:
        """Whether everything that is remembered belongs to one column."""
        return all(isinstance(layer, KeysAndValues) for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys, values and states that are allocated."""
        held = (value for layer in self.layers for value in vars(layer).values())
        return sum(value.nbytes for value in held if isinstance(value, Tensor))

    def begin(self, attention_mask: Tensor) -> None:
        """Forget everything; a batch of prompts is going to be read.

        Args:
            attention_mask: (rows, columns of the prompts), 0 where they are padded on the left.
        """
        self.columns.decoding = False
        self.columns.filled = 0
        self.columns.start.copy_((attention_mask == 0).sum(-1))
        for layer in self.layers:
            if not isinstance(layer, KeysAndValues):
                layer.reset()


class KeysAndValues(CacheLayerMixin):
    """Keys and values of one layer.

    Attributes:
        keys, values: (rows, length, num_kv_heads, head_dim); a token's heads lie together. The two
            need not have the same sizes.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        self.columns = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states (rows, num_kv_heads, ..., head_dim) like these."""

        def storage(states: Tensor) -> Tensor:
            rows, heads, _, width = states.shape
            # Zeros: what a mask hides is multiplied by 0, and must be finite.
            return states.new_zeros(rows, self.columns.length, heads, width)

        self.keys, self.values = storage(key_states), storage(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new states (rows, num_kv_heads, tokens, head_dim); all so far, in that layout."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        if self.columns.decoding:
            store_kv(key_states, value_states, keys, values, self.columns.column)
            return keys.transpose(1, 2), values.transpose(1, 2)
        past, end = self.columns.filled, self.columns.filled + key_states.shape[2]
        keys[:, past:end] = key_states.transpose(1, 2)
        values[:, past:end] = value_states.transpose(1, 2)
        if past == 0:
            return key_states, value_states
        return keys[:, :end].transpose(1, 2), values[:, :end].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that `update` hands out with so many new ones, and the first of them."""
        if self.columns.decoding:
            return self.columns.length, 0
        return self.columns.filled + query_length, 0

    def get_seq_length(self) -> Any:
        """Columns that are filled: a number, or (1,) on the device while decoding."""
        return self.columns.column if self.columns.decoding else self.columns.filled

    def get_max_length(self) -> int:
        """Columns that there are."""
        return self.columns.length
