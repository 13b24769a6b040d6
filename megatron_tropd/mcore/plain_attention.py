"""PyTorch's attention over packed sequences and context-parallel shares, where Transformer Engine is absent.

On CUDA padded sequences go to it, too: Megatron's local attention keeps [s, s] probabilities per head. On a CPU they go
to Megatron's. With context parallelism the keys and values of a layer are gathered on every rank, their gradient
reduce-scattered: memory for simplicity, where Transformer Engine's ring or all-to-all attention is absent.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron_tropd.parallel.context_parallel import share_places
from megatron_tropd.parallel.variable_length import attends_variable_lengths, variable_length_attention


class PlainAttention(DotProductAttention):
    """Causal attention of a rank's queries over the keys of their own sequences."""

    def __init__(self, config: Any, *args: Any, pg_collection: Any = None, **kwargs: Any):
        """Take what Megatron's DotProductAttention takes."""
        single = copy.copy(config)
        single.context_parallel_size = 1  # what Megatron's own class insists on
        super().__init__(single, *args, pg_collection=pg_collection, **kwargs)
        self.cp_group = pg_collection.cp
        self.whole_sequences = False  # set while generating, when every rank holds all of a sequence

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend from query [s/cp, b, np, hn] to key and value [s/cp, b, ng, hn]; return [s/cp, b, np * hn].

        Packed, all are [t/cp, heads, hn] of several sequences one after the other, each of them split over the
        context-parallel ranks by itself; returns [t/cp, np * hn].
        """
        size = 1 if self.whole_sequences else self.cp_group.size()
        if packed_seq_params is None:
            if size == 1 and not self._takes_plain_causal(query, key, attention_mask):
                return super().forward(query, key, value, attention_mask, *args, **kwargs)
            return self._attend(query, key, value, [0, query.size(0) * size], size)
        if size == 1 and attends_variable_lengths(query):
            ends, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
            lengths = {"longest_q": longest, "longest_k": longest, "scale": self.softmax_scale}
            return variable_length_attention(query, key, value, ends, ends, **lengths).flatten(1)
        ends = packed_seq_params.cu_seqlens_q.tolist()
        return self._attend(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), ends, size).squeeze(1)

    def _takes_plain_causal(self, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Whether padded sequences go to scaled_dot_product_attention: on CUDA, where each token sees all before it.

        A decode step of the static engine has fewer queries than keys and goes to Megatron's attention.
        """
        return query.is_cuda and attention_mask is None and query.size(0) == key.size(0)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: list[int], size: int
    ) -> torch.Tensor:
        """Attend within each of the sequences [ends[i], ends[i + 1]), lengths counted over all ranks."""
        if size > 1:
            key, value = (gather_from_sequence_parallel_region(t, True, group=self.cp_group) for t in (key, value))
        local = query.size(0)
        outputs = []
        for start, stop in zip(ends, ends[1:], strict=False):
            own = query[start // size : stop // size]
            if size == 1:
                keys, values, visible = key[start:stop], value[start:stop], None
            else:
                places = [share_places(stop - start, rank, size, query.device) for rank in range(size)]
                mine = torch.arange(start // size, stop // size, device=query.device)
                rows = torch.cat([rank * local + mine for rank in range(size)])
                keys, values = key[rows], value[rows]
                visible = places[self.cp_group.rank()][:, None] >= torch.cat(places)[None]  # [own, keys]
            outputs.append(self._one(own, keys, values, visible))
        return torch.cat(outputs)

    def _one(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None
    ) -> torch.Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, tokens, hn]
        if q.is_cuda and (visible is not None or q.dtype == torch.float32):
            # Groups are then for the backend alone that keeps all scores.
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
        context = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=self.softmax_scale, enable_gqa=True
        )
        return context.permute(2, 0, 1, 3).flatten(2)
